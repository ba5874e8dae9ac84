"""The playground in a real browser over the real server: what it shows is what the server says."""

from __future__ import annotations

import time

import pytest

from oracles.serving import app_over, running, write_prompt, write_tasks
from oracles.slow import only


def opened(page, server, **looks):
    page.open(f"{server.url}/", **looks)
    page.until(lambda: page.all("#prompts input") and page.all("#text"))


def choose(page, *names):
    for box in page.all("#prompts input"):
        if box.is_selected() != (box.get_attribute("value") in names):
            box.click()


def fill(page, *texts):
    page.until(lambda: len(page.all("#fields textarea")) == len(texts))
    for box, text in zip(page.all("#fields textarea"), texts, strict=True):
        box.clear()
        box.send_keys(text)


def run(page):
    page.find("#run").click()
    page.until(lambda: "answered in" in page.text("#progress"), 60)


def panel(name):
    return f'.panel[data-model="{name}"]'


def test_answers_are_the_servers(page, server, client):
    opened(page, server)
    assert "demo · forest engine" in page.text("#about")
    choose(page, "complaints", "writer")
    fill(page, "The kettle broke after one day.")
    run(page)
    assert "3 of 3 answered" in page.text("#progress")
    body = {"model": "writer", "prompt": "The kettle broke after one day.", "max_tokens": 64}
    said = client.post("/v1/completions", json={**body, "temperature": 0}).json()
    assert page.text(panel("writer") + " .text") == said["choices"][0]["text"]
    usage = said["usage"]
    counts = f"{usage['prompt_tokens']} + 3 virtual tokens in, {usage['completion_tokens']} out"
    assert counts in page.text(panel("writer") + " .state")
    body = {"model": "complaints", "input": "The kettle broke after one day."}
    found = client.post("/v1/classify", json=body).json()["data"][0]
    first = [each.text for each in page.all(panel("complaints") + " .bars li:first-child span")]
    assert first[0] == found["label"]
    assert first[1] == f"{found['probabilities'][found['label']] * 100:.1f} %"
    assert len(page.all(panel("demo") + " .bars li")) == 2, "the base's scores of the same labels"
    assert page.complaints() == []


@pytest.mark.slow
def test_cards_and_fields(page, server, client):
    opened(page, server)
    choose(page, "pairs")
    fill(page, "one thing", "another")
    run(page)
    asked = {"model": "pairs", "fields": {"first": "one thing", "second": "another"}}
    said = client.post("/v1/completions", json={**asked, "max_tokens": 64, "temperature": 0}).json()
    assert page.text(panel("pairs") + " .text") == said["choices"][0]["text"]
    page.find(panel("pairs") + " .tools button").click()
    page.until(lambda: page.all("#sheet tbody tr"))
    card = client.get("/v1/prompts/pairs/card").json()
    shown = page.text("#sheet")
    assert card["fingerprint"] in shown
    assert card["template"] in shown
    assert len(page.all("#sheet tbody tr")) == card["rows"]
    assert len(page.all("#sheet .near")) == 3 * card["rows"]
    page.find("#sheet-close").click()


@pytest.mark.slow
def test_fields_of_sections(page, base, tmp_path):
    template = "{{#vip}}Dear{{/vip}}{{^vip}}To{{/vip}} {{name}}{{#about}} on {{about}}{{/about}} :"
    write_prompt(tmp_path / "letter", base, task="generation", labels=None, template=template)
    with running(app_over(base, tmp_path)) as server, server.client() as client:
        opened(page, server)
        assert [each.text for each in page.all("#fields label")] == ["name", "about", "vip"]
        shown = [each.get_attribute("placeholder") for each in page.all("#fields textarea")]
        assert shown == ["", "May stay empty", "May stay empty"]
        fill(page, "", "parcels", "")
        page.find("#run").click()
        page.until(lambda: "needs name" in page.find("#text").get_property("validationMessage"))
        for fields, rendered in (
            ({"name": "one", "about": "", "vip": ""}, "To one :"),
            ({"name": "one", "about": "parcels", "vip": "yes"}, "Dear one on parcels :"),
        ):
            fill(page, *fields.values())
            run(page)
            own = {"max_tokens": 64, "temperature": 0}
            asked = {"letter": {"fields": fields}, "demo": {"prompt": rendered}}
            for name, body in asked.items():
                said = client.post("/v1/completions", json={"model": name, **body, **own}).json()
                assert page.text(panel(name) + " .text") == said["choices"][0]["text"]
            raw = {"model": "letter", "prompt": rendered, "raw": True, **own}
            same = client.post("/v1/completions", json=raw).json()["choices"][0]["text"]
            assert page.text(panel("letter") + " .text").strip() == same.strip()


def test_a_chat_is_the_servers(page, chat_server, server):
    opened(page, server)
    page.until(lambda: "demo" in page.text("#about"))
    assert not page.find("#mode").is_displayed(), "the base has no chat template"
    opened(page, chat_server)
    page.until(lambda: page.find("#mode").is_displayed())
    choose(page, "writer")
    page.find("#mode label:last-of-type").click()
    fill(page, "Be kind", "hi")
    run(page)
    assert "2 of 2 answered" in page.text("#progress")
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hi"}]
    body = {"model": "writer", "messages": messages, "max_tokens": 64, "temperature": 0}
    with chat_server.client() as client:
        found = client.post("/v1/chat/completions", json=body).json()
    assert page.text(panel("writer") + " .text") == found["choices"][0]["message"]["content"]
    used = f"{found['usage']['prompt_tokens']} + 3 virtual tokens in"
    assert used in page.text(panel("writer") + " .state")
    assert page.complaints() == []


def test_tasks_of_a_prompt(page, base, tmp_path):
    own = {
        "sort": {"template": "{{input}} :", "task": "classification", "labels": ["yes", "no"]},
        "pair": {"template": "{{first}} {{second}}", "task": "generation", "labels": None},
    }
    write_tasks(tmp_path / "several", base, own)
    with running(app_over(base, tmp_path)) as server, server.client() as client:
        opened(page, server)
        choose(page, "several · sort")
        fill(page, "The kettle broke.")
        run(page)
        body = {"model": "several", "task": "sort", "input": "The kettle broke."}
        found = client.post("/v1/classify", json=body).json()["data"][0]
        first = page.all(panel("several · sort") + " .bars li:first-child .label")[0].text
        assert first == found["label"]
        choose(page, "several · pair")
        fill(page, "one", "two")
        run(page)
        body = {"model": "several", "task": "pair", "fields": {"first": "one", "second": "two"}}
        body |= {"max_tokens": 64, "temperature": 0}
        found = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert page.text(panel("several · pair") + " .text") in (found, "(an empty answer)")
        page.find(panel("several · pair") + " .tools button").click()
        page.until(lambda: page.all("#sheet tbody tr"))
        assert "{{first}} {{second}}" in page.text("#sheet")
        page.find("#sheet-close").click()


def test_stop_reaches_the_engine(page, server, monkeypatch):
    runner = server.service.batcher._runner
    step = runner.step
    monkeypatch.setattr(type(runner), "step", lambda self: (time.sleep(0.05), step())[1])
    opened(page, server)
    choose(page, "writer")
    page.find("#base-choice input").click()
    page.find("#options summary").click()
    page.find("#max-tokens").clear()
    page.find("#max-tokens").send_keys("200")
    page.find("#temperature").clear()
    page.find("#temperature").send_keys("5")
    page.find("#seed").send_keys("1")  # a draw that does not end by itself before 200 tokens
    fill(page, "tell me all")
    page.find("#run").click()
    page.until(lambda: page.text(panel("writer") + " .text"))
    page.find("#stop").click()
    page.until(lambda: page.text("#progress") == "stopped")
    batcher = server.service.batcher
    page.until(lambda: batcher.stats.running == 0 and batcher.stats.waiting == 0)


def test_what_the_server_refuses_is_said(page, server):
    opened(page, server)
    choose(page, "writer", "complaints")
    # Typed key by key it would take seconds.
    page.script(
        "const b = document.querySelector('#text'); b.value = arguments[0];"
        "b.dispatchEvent(new Event('input', {bubbles: true}))",
        "word " * 400,
    )
    run(page)
    assert "tokens" in page.text(panel("complaints") + " .error")
    assert page.text(panel("complaints") + " .state") == "failed"


def test_key_of_a_server(page, base, prompts, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-some-length\n")
    keys.chmod(0o600)
    with running(app_over(base, prompts, api_key_file=str(keys))) as server:
        page.open(f"{server.url}/")
        page.until(lambda: page.find("#trouble").is_displayed())
        page.find("#key").send_keys("a-key-of-some-length\t")
        page.until(lambda: page.all("#prompts input"))
        page.script("sessionStorage.clear()")


@pytest.mark.parametrize("width", only([360], [360, 1280]))
def test_no_width_scrolls_sideways_with_real_answers(page, server, width):
    opened(page, server, width=width, height=800)
    choose(page, "writer", "complaints")
    fill(page, "The kettle broke after one day.")
    run(page)
    assert not page.script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")
