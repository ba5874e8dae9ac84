"""The playground in a real browser: a test clicks through it against made-up answers."""

from __future__ import annotations

import re
import runpy
import subprocess

import pytest
from page_stub import CARDS, MARKUP, PAGE, Stub

from oracles.slow import only


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.close()


def ready(page, stub, **looks):
    page.open(stub.address, **looks)
    page.until(lambda: page.all("#prompts input") and page.all("#text"))


def choose(page, *names):
    """Leave exactly these chosen."""
    for box in page.all("#prompts input"):
        if box.is_selected() != (box.get_attribute("value") in names):
            box.click()
    page.until(lambda: page.text("#count").startswith(f"{len(names)} chosen"))


def write(page, text, box="#text"):
    # The boxes follow the chosen prompts' cards, which may still be on their way.
    page.until(lambda: page.all(box))
    page.find(box).clear()
    page.find(box).send_keys(text)


def unfold(page):
    page.script("document.querySelectorAll('#fields details').forEach((each) => { each.open = true; })")


def answered(page):
    page.until(lambda: "answered in" in page.text("#progress"))


def asked(page, stub, *names):
    """Open the page and have these answer."""
    ready(page, stub)
    choose(page, *names)
    write(page, "x")
    page.find("#run").click()
    answered(page)


def panel(name):
    return f'.panel[data-model="{name}"]'


def test_base_and_prompts_answer_side_by_side(page, stub):
    ready(page, stub)
    assert "tiny · forest engine · 28 prompts" in page.text("#about")
    choose(page, "complaints", "reply")
    write(page, "The kettle broke.")
    page.find("#run").click()
    answered(page)
    assert "3 of 3 answered" in page.text("#progress")
    assert [each.text for each in page.all(".panel h3")] == ["Base model", "complaints", "reply"]
    tops = {each.rect["y"] for each in page.all(".panel")}
    assert len(tops) == 1, "the panels are not beside each other"
    assert page.text(panel("reply") + " .text").startswith("Thank you for writing: ä€")
    state = page.text(panel("reply") + " .state")
    assert re.fullmatch(r"first \d+ ms, all [\d.]+ m?s · 12 \+ 8 virtual tokens in, 8 out", state)
    assert [each.text for each in page.all(panel("complaints") + " .bars li:first-child span")][:2] == [
        "complaint",
        "75.0 %",
    ]
    fill, track = (page.find(panel("complaints") + f" .{name}").rect["width"] for name in ("fill", "track"))
    assert fill / track == pytest.approx(0.75, abs=0.01)
    sent = {body["model"]: (path, body) for path, body in stub.bodies}
    assert sent["complaints"] == (
        "/v1/classify",
        {"model": "complaints", "input": "The kettle broke."},
    )
    assert sent["tiny"][1]["input"] == "Message: The kettle broke.\nLabel:"
    assert sent["tiny"][1]["labels"] == ["complaint", "no complaint"]
    path, body = sent["reply"]
    assert (path, body["prompt"], body["stream"]) == ("/v1/completions", "The kettle broke.", True)
    assert body["stream_options"] == {"include_usage": True}
    assert page.complaints() == []


def test_markup_in_answers_and_cards_stays_text(page, stub):
    asked(page, stub, "reply")
    assert MARKUP in page.text(panel("reply") + " .text")
    page.find(panel("reply") + " .tools button").click()
    page.until(lambda: MARKUP.replace(" ", "␣") in page.text("#sheet table"))
    assert page.all("main img, dialog img") == []
    assert page.driver.title == "softprompt playground"


def test_stop_ends_a_stream_and_tells_the_server(page, stub):
    ready(page, stub)
    choose(page, "endless")
    page.find("#base-choice input").click()
    write(page, "go on")
    page.find("#run").click()
    page.until(lambda: len(page.text(panel("endless") + " .text")) > 20)
    output = page.find(panel("endless") + " .output")
    assert output.get_attribute("aria-live") == "polite"
    assert output.get_attribute("aria-busy") == "true"
    assert not page.find("#run").is_enabled()
    page.find("#stop").click()
    page.until(lambda: page.text("#progress") == "stopped")
    assert page.text(panel("endless") + " .state").startswith("stopped after")
    assert output.get_attribute("aria-busy") == "false"
    page.until(lambda: stub.gone == ["endless"])
    assert page.find("#run").is_enabled()
    assert len(page.all(".panel")) == 1, "the base was left out"


def test_keyboard_alone(page, stub):
    from selenium.webdriver.common.keys import Keys

    ready(page, stub)
    choose(page)
    page.keys(Keys.TAB)
    page.find("#search").click()
    page.keys("end")
    page.until(lambda: "1 shown" in page.text("#count"))
    page.keys(Keys.ARROW_DOWN)
    page.keys(" ")
    page.until(lambda: page.text("#count").startswith("1 chosen"))
    outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is not seen"
    page.script("document.querySelector('#text').focus()")
    page.keys("hello")
    page.keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text(panel("endless") + " .text"))
    page.keys(Keys.ESCAPE)
    page.until(lambda: page.text("#progress") == "stopped")
    page.find(panel("endless") + " .tools button").send_keys(Keys.ENTER)
    page.until(lambda: page.find("#sheet").is_displayed())
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.find("#sheet").is_displayed())
    assert page.script("return document.activeElement.textContent") == "Card"


def test_every_control_has_a_name(page, stub):
    ready(page, stub)
    page.find("#options summary").click()
    unnamed = page.script(
        "return [...document.querySelectorAll('input, textarea, select, button')]"
        ".filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.id)"
    )
    assert unnamed == []


@pytest.mark.slow
def test_card(page, stub):
    asked(page, stub, "complaints")
    page.find(panel("complaints") + " .tools button").click()
    page.until(lambda: page.all("#sheet svg.curve"))
    said = page.text("#sheet")
    for part in (
        "complaint, no complaint",
        "tiny",
        "8 \u00d7 16",
        "512 B",
        "validation accuracy0.9",
        "1.25",
    ):
        assert part in said
    assert len(page.all("#sheet .dot.train")) == len(page.all("#sheet .dot.valid")) == 5
    assert len(page.all("#sheet tbody tr")) == 8
    label = page.find("#sheet svg.curve").get_attribute("aria-label")
    assert label == "training loss from 1 to 0.2; validation loss from 1.2 to 0.24"
    page.find("#sheet-close").click()


def code_of(page, name):
    page.all(panel(name) + " .tools button")[-1].click()
    page.until(lambda: page.all("#sheet code"))
    codes = [each.get_attribute("textContent") for each in page.all("#sheet code")]
    return codes


@pytest.mark.parametrize(
    ("name", "boxes"),
    [
        pytest.param("reply", ["#text"], marks=pytest.mark.slow),
        pytest.param("complaints", ["#text"], marks=pytest.mark.slow),
        ("two-fields", ["#text", "#text-1"]),
        pytest.param("several · sort", ["#text"], marks=pytest.mark.slow),
        pytest.param("chat", ["#system", "#text"], marks=pytest.mark.slow),
    ],
)
def test_the_copied_code_asks_the_same(page, stub, tmp_path, name, boxes):
    stub.chat = name == "chat"
    ready(page, stub)
    if stub.chat:
        name = "reply"
        page.until(lambda: page.find("#mode").is_displayed())
        to_chat(page)
    choose(page, name)
    text = 'It\'s "broken" \\ ümlaut 😀 $HOME'
    for box in boxes:
        page.until(lambda box=box: page.all(box))
        # Chromium's driver types no character beyond the basic plane.
        page.script(
            "const b = document.querySelector(arguments[0]); b.value = arguments[1];"
            "b.dispatchEvent(new Event('input', {bubbles: true}))",
            box,
            text,
        )
    page.find("#run").click()
    answered(page)
    command, program = code_of(page, name)
    asked = next(body for _, body in stub.bodies if body["model"] == name.split(" ")[0])
    stub.bodies.clear()
    (tmp_path / "copied.py").write_text(program, encoding="utf-8")
    typed = ["bash", "-c", command.replace("curl ", "curl -sS --noproxy '*' ")]
    for call in (
        lambda: subprocess.run(typed, capture_output=True, timeout=60, check=True),
        lambda: runpy.run_path(str(tmp_path / "copied.py")),  # here, where the client is imported already
    ):
        call()
        _, body = stub.bodies.pop()
        assert {key: value for key, value in body.items() if value != ""} == asked
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    page.find("#sheet .snippet button").click()
    page.until(lambda: "Copied." in page.text("#sheet .snippet"))
    assert page.script("return navigator.clipboard.readText()") == command


@pytest.mark.slow
def test_without_a_clipboard_the_code_is_selected(page, stub):
    asked(page, stub, "reply")
    code_of(page, "reply")
    page.script("navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed'))")
    page.find("#sheet .snippet button").click()
    page.until(lambda: "Ctrl+C" in page.text("#sheet .snippet"))
    assert page.script("return getSelection().toString()").startswith("curl ")


@pytest.mark.slow
def test_options_are_sent(page, stub):
    ready(page, stub)
    choose(page, "reply")
    page.find("#options summary").click()
    for box, value in (
        ("#max-tokens", "5"),
        ("#temperature", "0.7"),
        ("#top-p", "0.9"),
        ("#seed", "3"),
    ):
        write(page, value, box)
    write(page, "END", "#stop-text")
    write(page, "hello")
    assert page.text("#options-line") == "5 tokens, temperature 0.7"
    page.find("#run").click()
    answered(page)
    body = next(body for _, body in stub.bodies if body["model"] == "reply")
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (
        5,
        0.7,
        0.9,
        3,
    )
    assert body["stop"] == ["END"]
    stub.bodies.clear()
    write(page, "good, bad ,neither", "#labels")
    page.find("#run").click()
    page.until(lambda: len(page.all(panel("reply") + " .bars li")) == 3)
    assert all(body["labels"] == ["good", "bad", "neither"] for _, body in stub.bodies)


@pytest.mark.slow
def test_fields_of_a_template(page, stub):
    ready(page, stub)
    choose(page, "two-fields", "reply")
    page.until(lambda: len(page.all("#fields textarea")) == 3)
    labels = [each.get_attribute("textContent") for each in page.all("#fields label")]
    assert sorted(labels) == ["Text", "premise", "question"]
    unfold(page)
    for i, label in enumerate(labels):
        write(page, f"the {label}", f"#text-{i}" if i else "#text")
    page.find("#run").click()
    answered(page)
    sent = {body["model"]: body for _, body in stub.bodies}
    assert sent["two-fields"]["fields"] == {"premise": "the premise", "question": "the question"}
    assert "prompt" not in sent["two-fields"]
    assert sent["reply"]["prompt"] == "the Text"


@pytest.mark.slow
def test_several_templates_do_not_ask_for_everything_at_once(page, stub):
    ready(page, stub)
    choose(page, "reply", "two-fields", "banking", "complaints")
    groups = [each.text for each in page.all("#fields summary")]
    assert groups == [
        "Text for complaints, reply",
        "premise, question for two-fields",
        "premise, topic for banking",
    ]
    shown = [each for each in page.all("#fields textarea") if each.is_displayed()]
    assert len(shown) == 1
    write(page, "x")
    page.find("#run").click()
    answered(page)
    assert "3 of 3 answered" in page.text("#progress")
    assert {body["model"] for _, body in stub.bodies} == {"tiny", "complaints", "reply"}
    assert page.text(panel("two-fields") + " .note") == "waits for premise, question"
    assert page.text(panel("two-fields") + " .state") == "not asked"
    # A field of two templates is written once; what is missing beside it is asked for.
    stub.bodies.clear()
    unfold(page)
    write(page, "it rains", "#text-1")
    assert page.find("#text-3").get_attribute("value") == "it rains"
    page.find("#run").click()
    assert stub.bodies == []
    told = page.script("return document.querySelector('#text-2').validationMessage")
    assert told == "two-fields needs question as well, or none of its fields."
    write(page, "is it wet?", "#text-2")
    write(page, "weather", "#text-4")
    page.find("#run").click()
    page.until(lambda: "5 of 5 answered" in page.text("#progress"))
    sent = {body["model"]: body for _, body in stub.bodies}
    assert sent["banking"]["fields"] == {"premise": "it rains", "topic": "weather"}


def test_nothing_written_is_nothing_asked(page, stub):
    ready(page, stub)
    choose(page, "two-fields", "reply")
    page.find("#run").click()
    assert page.script("return document.querySelector('#text').validationMessage") == "Write a text."
    assert stub.bodies == []
    assert page.all(".panel") == []


@pytest.mark.slow
def test_many_labels_are_folded(page, stub):
    ready(page, stub)
    choose(page, "banking")
    write(page, "x")
    write(page, "y", "#text-1")
    page.find("#run").click()
    answered(page)
    bars = page.all(panel("banking") + " .bars li")
    assert (len(bars), sum(each.is_displayed() for each in bars)) == (77, 10)
    page.find(panel("banking") + " .more summary").click()
    assert page.text(panel("banking") + " .more summary") == "67 more labels"
    assert sum(each.is_displayed() for each in bars) == 77
    page.find(panel("banking") + " .tools button").click()
    page.until(lambda: page.all("#sheet .more"))
    assert page.text("#sheet .more summary").endswith("label 9 and 67 more")
    page.find("#sheet-close").click()


@pytest.mark.slow
def test_each_panel_is_as_high_as_its_answer(page, stub):
    ready(page, stub)
    choose(page, "complaints", "banking")
    write(page, "x")
    unfold(page)
    write(page, "y", "#text-1")
    write(page, "z", "#text-2")
    page.find("#run").click()
    answered(page)
    heights = {name: page.find(panel(name)).rect["height"] for name in ("complaints", "banking")}
    assert heights["complaints"] < heights["banking"] / 1.5


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_chosen_prompts_stand_first_and_a_long_list_scrolls_visibly(page, stub, width):
    ready(page, stub, width=width, height=844)
    choose(page, "quiet-17", "reply")
    boxes = page.all("#prompts input")
    names = [each.get_attribute("value") for each in boxes]
    assert names[:2] == ["reply", "quiet-17"]
    assert names[2:] == [key for key in names if key not in ("reply", "quiet-17")]
    # The box that was ticked keeps the focus where it went.
    page.script("document.querySelector('#prompts input[value=quiet-19]').focus()")
    page.keys(" ")
    page.until(lambda: page.text("#count").startswith("3 chosen"))
    assert page.script("return document.activeElement.value") == "quiet-19"
    assert [each.get_attribute("value") for each in page.all("#prompts input")][2] == "quiet-19"
    size = page.script(
        "const l = document.querySelector('#prompts');"
        "return [l.clientHeight, l.scrollHeight, l.offsetWidth - l.clientWidth]"
    )
    assert size[0] < size[1]
    assert size[2] >= 8, "the list has no scroll bar of its own"


@pytest.mark.slow
def test_accuracies_stand_in_the_list(page, stub):
    ready(page, stub)
    scores = {
        row.find_element("css selector", "input").get_attribute("value"): row.text.split("\n")[-1]
        for row in page.all("#prompts li")
    }
    assert scores["complaints"] == "91.2 %"
    assert scores["several · sort"] == "50.0 %"
    assert scores["reply"] == "reply", "free text has none"


@pytest.mark.slow
def test_what_cannot_be_chosen_is_told_apart_with_the_reason(page, stub):
    ready(page, stub)
    names = [each.get_attribute("value") for each in page.all("#prompts input")]
    assert not {"foreign", "vectors"} & set(names)
    assert page.text("#apart-count") == "2 cannot be chosen here"
    page.find("#apart summary").click()
    assert page.find("#apart-list").text.startswith("foreign\nit was made for other, not for tiny: <img")
    assert "vectors\ngives vectors: ask /v1/embeddings" in page.find("#apart-list").text
    assert page.all("aside img, .apart img") == []


@pytest.mark.slow
def test_the_page_of_the_api(page, server, client):
    """Drawn from the server's own description, without a file from elsewhere."""
    page.open(f"{server.url}/docs", width=390, height=844)
    page.until(lambda: page.all(".route"))
    shown = {each.text for each in page.all(".route h3 code")}
    assert shown == set(client.get("/openapi.json").json()["paths"])
    assert {"/v1/embeddings", "/v1/responses", "/v1/models"} < shown
    takes = next(each for each in page.all(".route summary") if each.text == "Takes: ResponsesBody")
    takes.click()
    rows = {row.text.split("\n")[0].split(" ")[0] for row in page.all(".route details[open] tr")}
    assert {"input", "instructions", "max_output_tokens", "text"} <= rows
    assert not page.script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert page.complaints() == []


def test_an_error_is_said_in_its_panel_alone(page, stub):
    asked(page, stub, "breaks", "reply")
    assert "2 of 3 answered" in page.text("#progress")
    assert page.text(panel("breaks") + " .error") == "16 requests wait already. Try again in 7 s."


@pytest.mark.slow
def test_a_server_that_is_gone(page, stub):
    ready(page, stub)
    choose(page, "reply")
    write(page, "x")
    stub.close()
    page.find("#run").click()
    page.until(lambda: "does not answer" in page.text(panel("reply") + " .error"))


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab(page):
    stub = Stub(key="secret")
    try:
        page.open(stub.address)
        page.until(lambda: "asks for a key" in page.text("#trouble"))
        assert page.find("#key").is_displayed()
        write(page, "secret\t", "#key")
        page.until(lambda: page.all("#prompts input"))
        assert not page.find("#trouble").is_displayed()
        page.driver.refresh()
        page.until(lambda: page.all("#prompts input"))
        choose(page, "reply")
        write(page, "x")
        page.find("#run").click()
        answered(page)
        assert all("secret" not in code for code in code_of(page, "reply"))
        assert page.script("return localStorage.length + document.cookie.length") == 0
    finally:
        stub.close()


@pytest.mark.slow
def test_each_task_of_a_prompt_is_a_choice_with_fields_and_labels_of_its_own(page, stub):
    asked(page, stub, "several · sort")
    bars = [each.text for each in page.all(panel("several · sort") + " .bars .label")]
    assert bars == ["left", "right", "middle"]
    sent = {body["model"]: body for _, body in stub.bodies}
    assert sent["several"] == {"model": "several", "task": "sort", "input": "x"}
    assert sent["tiny"]["input"] == "Sort : x", "the base reads the text as this task does"
    assert sent["tiny"]["labels"] == ["left", "right", "middle"]
    stub.bodies.clear()
    choose(page, "several · tell", "several · sort")
    page.until(lambda: len(page.all("#fields textarea")) == 3)
    unfold(page)
    for box in page.all("#fields textarea"):
        box.clear()
        box.send_keys(f"the {box.get_attribute('data-field') or 'text'}")
    page.find("#run").click()
    answered(page)
    sent = {body["task"]: (path, body) for path, body in stub.bodies if "task" in body}
    path, body = sent["tell"]
    assert path == "/v1/completions"
    assert body["fields"] == {"who": "the who", "what": "the what"}
    assert sent["sort"] == (
        "/v1/classify",
        {"model": "several", "task": "sort", "input": "the text"},
    )
    page.find(panel("several · tell") + " .tools button").click()
    page.until(lambda: page.all("#sheet tbody tr"))
    said = page.text("#sheet")
    assert "Tell {{who}} about {{what}}" in said
    assert "generation" in said
    assert "sort, tell" in said
    assert "left" not in said, "labels of another task"


@pytest.fixture
def chatting():
    server = Stub(chat=True)
    yield server
    server.close()


def to_chat(page):
    page.find("#mode label:last-of-type").click()
    page.until(lambda: page.all("#system"))


@pytest.mark.slow
def test_a_chat_is_offered_where_there_is_a_template(page, stub, chatting):
    ready(page, stub)
    page.until(lambda: "tiny" in page.text("#about"))
    assert not page.find("#mode").is_displayed()
    ready(page, chatting)
    choose(page, "reply", "complaints")
    page.until(lambda: page.find("#mode").is_displayed())
    write(page, "a text")
    to_chat(page)
    assert [each.text for each in page.all("#fields label")] == ["System", "Message"]
    assert "same messages" in page.text("#base-hint")
    hint = page.text("#mode-hint")
    assert "chat template says. So they were for reply in training. Not so for complaints:" in hint
    assert "recorded" not in hint
    choose(page, "endless")
    assert page.text("#mode-hint").endswith("says. How endless was trained is not recorded.")
    choose(page, "reply", "complaints")
    page.find("#options summary").click()
    assert not page.find("#labels").is_displayed()
    write(page, "Hello there")
    page.find("#run").click()
    answered(page)
    assert "3 of 3 answered" in page.text("#progress")
    assert page.text(panel("reply") + " .text").startswith("Thank you for writing: ä€")
    assert "virtual tokens in, 8 out" in page.text(panel("complaints") + " .state")
    assert {path for path, _ in chatting.bodies} == {"/v1/chat/completions"}
    asked = {body["model"]: body for _, body in chatting.bodies}
    assert asked.keys() == {"tiny", "reply", "complaints"}
    for body in asked.values():
        assert body["messages"] == [{"role": "user", "content": "Hello there"}]
        assert body["stream"] is True
    chatting.bodies.clear()
    write(page, "Be kind", "#system")
    page.find("#run").click()
    answered(page)
    assert chatting.bodies[0][1]["messages"] == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Hello there"},
    ]
    page.find("#mode label:first-of-type").click()
    page.until(lambda: not page.all("#system"))
    assert page.find("#text").get_attribute("value") == "a text", "what was written is kept"
    assert page.find("#labels").is_displayed()
    assert page.complaints() == []


def test_a_chat_by_keyboard(page, chatting):
    from selenium.webdriver.common.keys import Keys

    ready(page, chatting)
    page.until(lambda: page.find("#mode").is_displayed())
    page.script("document.querySelector('#mode input').focus()")
    page.keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.all("#system"))
    shown = "return getComputedStyle(document.querySelector('#mode label:last-of-type')).outlineStyle"
    assert page.script(shown) == "solid", "the focus is not seen"
    page.keys(Keys.TAB)
    assert page.script("return document.activeElement.id") == "system"


@pytest.mark.slow
def test_search(page, stub):
    ready(page, stub)
    page.find("#search").send_keys("quiet 1")
    page.until(lambda: "shown" in page.text("#count"))
    shown = [each.text for each in page.all("#prompts li") if each.is_displayed()]
    assert shown == sorted(name for name in CARDS if "quiet" in name and "1" in name)
    page.find("#search").send_keys(" nothing")
    page.until(lambda: page.text("#count") == "No name fits.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dark"),
    [(width, dark) for width in (320, 390, 1280) for dark in (False, True)],
)
def test_no_width_scrolls_sideways(page, stub, width, dark):
    ready(page, stub, width=width, height=800, dark=dark)
    choose(page, "complaints", "reply", "two-fields")
    page.find("#options summary").click()
    unfold(page)
    for box in [f"#text-{i}" if i else "#text" for i in range(3)]:
        write(page, "long" * 60, box)
    page.find("#run").click()
    answered(page)
    too_wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.script(too_wide)
    if width < 600:
        assert len({each.rect["x"] for each in page.all(".panel")}) == 1, "one column"
    page.find(panel("complaints") + " .tools button").click()
    page.until(lambda: page.all("#sheet svg.curve"))
    assert not page.script("const s = document.querySelector('#sheet'); return s.scrollWidth > s.clientWidth")
    page.find("#sheet-close").click()


LUMINANCE = """
const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const light = (colour) => {
  probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...probe.getImageData(0, 0, 1, 1).data].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const shown = (name) => {
  document.body.style.color = `var(--${name})`;
  return getComputedStyle(document.body).color;
};
return Object.fromEntries(arguments[0].map(name => [name, light(shown(name))]));
"""


@pytest.mark.parametrize(
    ("dark", "theme"),
    only([(True, "light")], [(False, ""), (True, ""), (True, "light"), (False, "dark")]),
)
def test_colours_can_be_read(page, stub, dark, theme):
    """Of the system's theme, and of one that is chosen against it and kept."""
    ready(page, stub, dark=dark)
    if theme:
        dark = theme == "dark"
        page.script(
            "const t = document.querySelector('#theme'); t.value = arguments[0];"
            "t.dispatchEvent(new Event('change'))",
            theme,
        )
        page.driver.refresh()
        page.until(lambda: page.all("#prompts input"))
        assert page.find("#theme").get_attribute("value") == theme
        page.script("localStorage.clear()")
    names = [
        "ground",
        "surface",
        "ink",
        "quiet",
        "accent",
        "on-accent",
        "tint",
        "bad",
        "bad-tint",
        "strong-line",
    ]
    light = page.script(LUMINANCE, names)

    def contrast(first, second):
        low, high = sorted((light[first], light[second]))
        return (high + 0.05) / (low + 0.05)

    for text, ground in (
        ("ink", "ground"), ("ink", "surface"), ("ink", "tint"), ("quiet", "ground"), ("quiet", "surface"),
        ("accent", "surface"), ("on-accent", "accent"), ("bad", "surface"), ("bad", "bad-tint"),
    ):  # fmt: skip
        assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("strong-line", "ground") >= 3
    assert (light["ground"] < light["ink"]) == dark


@pytest.mark.slow
def test_nothing_moves_where_that_is_asked(page, stub):
    ready(page, stub, still=True)
    choose(page, "endless")
    write(page, "x")
    page.find("#run").click()
    page.until(lambda: page.text(panel("endless") + " .text"))
    moving = "return document.getAnimations().length"
    assert page.script(moving) == 0
    page.find("#stop").click()


def test_files_are_our_own_and_nothing_is_inline():
    html = (PAGE / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", html) == []
    assert not re.search(r"\son\w+=|\sstyle=", html)
    for path in PAGE.iterdir():
        text = path.read_text()
        outside = [url for url in re.findall(r"https?://[^\s\"')]+", text) if "www.w3.org" not in url]
        assert outside == [], path.name
        assert "innerHTML" not in text, path.name
        assert "insertAdjacentHTML" not in text, path.name
        assert len(text.splitlines()) <= 250, path.name
