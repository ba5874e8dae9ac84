"""Prompts trained on chats and on templates behind the chat endpoint: said apart, and never mixed in silence."""

import json
import logging

import pytest

from oracles.serving import app_over, running, write_prompt, write_tasks
from softprompt.server.chat import chat_input

OWN = {"labels": None, "task": "generation", "template": "{{input}}"}
CHAT = {
    "chats": True,
    "in-system": True,
    "in-system-own": False,
    "plain": False,
    "framed": False,
    "no-record": None,
}


@pytest.fixture(scope="module")
def served(chat_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    for name in CHAT:
        changes = OWN | ({"template": "Text: {{input}}"} if name in ("framed", "in-system-own") else {})
        directory = write_prompt(
            root / name, chat_base, manifest=name != "no-record", chat=name == "chats", **changes
        )
        if name.startswith("in-system"):
            config = directory / "adapter_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"placement": "chat_system"}))
    tasks = {"talk": OWN | {"chat": True}, "tell": OWN}
    write_tasks(root / "both", chat_base, tasks)
    with running(app_over(chat_base, root)) as server:
        yield server


def test_the_listing_says_which_template_puts_an_input(served):
    with served.client() as client:
        found = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert {name: found[name]["chat"] for name in CHAT} == CHAT
    assert found["demo"]["chat"] is True, "the base has a chat template"
    assert found["both"]["chat"] is None
    assert [task["chat"] for task in found["both"]["tasks"]] == [True, False]


@pytest.mark.parametrize("name", [name for name in CHAT if CHAT[name] is not None])
def test_what_it_says_is_so(served, name):
    prompt = served.service.registry.get(name)
    asked = chat_input(prompt, [{"role": "user", "content": "hello there"}])
    assert (prompt.of_fields("hello there").ids == asked.ids) is CHAT[name]


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_prompt_of_another_template_is_warned_of_once(served, caplog, path):
    served.service._put_otherwise.clear()
    turn = [{"role": "user", "content": "hello"}]
    body = {"messages": turn} if path == "chat/completions" else {"input": turn}
    most = "max_tokens" if path == "chat/completions" else "max_output_tokens"
    asked = [{"model": name} for name in (*CHAT, "demo", "framed", "plain")]
    asked += [{"model": "both", "task": "talk"}, {"model": "both", "task": "tell"}]
    with caplog.at_level(logging.WARNING, logger="softprompt"), served.client() as client:
        for each in asked:
            found = client.post(f"/v1/{path}", json={**body, **each, most: 1})
            assert found.status_code == 200, found.text
            text = client.post("/v1/completions", json={**each, "prompt": "hello", "max_tokens": 1})
            assert text.status_code == 200, text.text
    warned = [record.getMessage() for record in caplog.records]
    assert [each.split()[2] for each in warned] == ["in-system-own", "plain", "framed", "both"]
    assert "with its template 'Text: {{input}}'" in warned[2]
    assert "/v1/completions" in warned[2]


def test_what_shows_no_system_turn_does_not_reach_a_prompt_in_it(served):
    """A chat with a system turn of its own has no place for the prompt, and bare text shows none."""
    system = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hello"}]
    with served.client() as client:
        chat = client.post("/v1/chat/completions", json={"model": "in-system", "messages": system})
        raw = client.post("/v1/completions", json={"model": "in-system", "prompt": "hello", "raw": True})
    for found, told in (
        (chat, "the prompt 'in-system' stands in the system turn; leave the system message out"),
        (raw, "the prompt 'in-system' stands in the system turn of a chat; send a text, or messages to "),
    ):
        assert found.status_code == 400
        assert found.json()["error"]["message"].startswith(told)
