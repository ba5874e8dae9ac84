"""What cannot be served is listed apart with the reason, and no folder of the machine is told."""

import json
import logging
import re
import shlex
import socket
from types import SimpleNamespace

import pytest

from oracles.families import tiny
from oracles.serving import app_over, running, until, write_prompt, write_tasks
from oracles.slow import only
from softprompt.backbone import Base
from softprompt.server import app
from softprompt.server.settings import ServeSettings
from softprompt.server.start_lines import log_addresses, log_prompts


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    """Another base, as of a folder of this machine."""
    model = tiny("llama", vocab_size=len(base.tokenizer))
    return Base(model, base.tokenizer, str(tmp_path_factory.mktemp("models") / "other-base"))


@pytest.fixture(scope="module")
def root(base, other, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    trained = {"loss": 0.1, "seconds": 3.0, "validation": {"accuracy": 0.9, "loss": float("nan"), "rows": 3}}
    write_prompt(root / "good", base, metrics=trained)
    write_prompt(root / "demo", base)
    write_prompt(root / "foreign", other)
    write_prompt(root / "foreign-peft", other, manifest=False)
    changed = base.fingerprint.to_dict()
    changed["values"] = [None if v is None else v + 1 for v in changed["values"]]
    write_prompt(root / "retrained", base, base_model="/srv/models/older", base_fingerprint=changed)
    for name, change in (
        ("head", {"task_type": "SEQ_CLS"}),
        ("seq2seq", {"task_type": "SEQ_2_SEQ_LM"}),
        ("damaged", {"peft_type": "LORA"}),
    ):
        write_prompt(root / name, base, manifest=False)
        file = root / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return root


UNUSABLE = {
    "foreign": "made for other-base, not for demo: ",
    "foreign-peft": "token_dim",
    "retrained": "made for older, not for demo: .* sampled weights differ",
    "head": "it is for SEQ_CLS, with a head of its own",
    "seq2seq": "SEQ_2_SEQ_LM, the base demo is a causal model",
    "damaged": "LORA",
}


@pytest.fixture(scope="module")
def served(base, root):
    with running(app_over(base, root)) as server, server.client() as client:
        yield server, client


def test_they_are_listed_apart_with_the_reason(served):
    server, client = served
    found = client.get("/v1/models").json()
    assert [each["id"] for each in found["data"]] == ["demo", "demo-prompt", "good"]
    told = {each["id"]: each["problem"] for each in found["unusable"]}
    assert told.keys() == UNUSABLE.keys()
    for name, problem in UNUSABLE.items():
        assert re.search(problem, told[name]), (name, told[name])
    assert [each.id for each in server.openai().models.list()] == ["demo", "demo-prompt", "good"]
    reply = client.post("/v1/completions", json={"model": "foreign", "prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "prompt_unusable")
    assert found["data"][2]["metrics"] == {"accuracy": 0.9}


def test_a_base_that_is_taken_on_purpose_makes_them_usable(base, root):
    with running(app_over(base, root, ignore_fingerprint=True)) as server, server.client() as client:
        found = client.get("/v1/models").json()
        assert "retrained" in [each["id"] for each in found["data"]]
        assert "retrained" not in [each["id"] for each in found["unusable"]]


def test_the_base_under_names_of_its_own(base, root):
    app = app_over(base, root, served_model_name=("small", "gpt-4o"))
    with running(app) as server, server.client() as client:
        found = client.get("/v1/models").json()["data"]
        assert [(each["id"], each["parent"]) for each in found] == [
            ("small", None),
            ("gpt-4o", None),
            ("demo", "small"),
            ("good", "small"),
        ]
        body = {"prompt": "Hello", "max_tokens": 3, "temperature": 0}
        said = [client.post("/v1/completions", json={**body, "model": name}).json() for name in ("small", "gpt-4o")]
        assert [each["model"] for each in said] == ["small", "small"]
        assert said[0]["choices"] == said[1]["choices"]
        assert client.get("/v1/models/gpt-4o").json()["root"] == "small"
        assert client.get("/v1/prompts/good/card").json()["base_model"] == "small"


def test_no_folder_of_the_machine_is_told(other, root, base, tmp_path):
    """Base and prompts in folders, usable or not: whatever is asked, no answer holds a path."""
    here = Base(base.model, base.tokenizer, str(tmp_path / "models" / "base-folder"))
    write_prompt(root / "by-path", here, data={"train": str(tmp_path / "train.jsonl")})
    with running(app_over(here, root, admin_key_file=keys(tmp_path))) as server, server.client() as client:
        admin = {"Authorization": "Bearer secret"}
        names = [path.name for path in root.iterdir()]
        replies = [client.get(path) for path in ("/v1/models", "/openapi.json", "/version", "/ready", "/metrics")]
        replies += [client.get("/v1/prompts", headers=admin)]
        for name in [*names, "base-folder", "nope"]:
            replies += [client.get(f"/v1/models/{name}"), client.get(f"/v1/prompts/{name}/card")]
            replies += [client.post(f"/v1/prompts/{name}/load", headers=admin)]
            for route in ("completions", "classify", "chat/completions", "embeddings"):
                for body in ({"prompt": "x"}, {"input": "x"}, {"messages": [{"role": "user", "content": "x"}]}):
                    replies += [client.post(f"/v1/{route}", json={"model": name, **body})]
        assert client.get("/v1/models").json()["data"][0]["id"] == "base-folder"
        for reply in replies:
            for path in (str(tmp_path), str(root), other.name, "/srv/models"):
                assert path not in reply.text, (reply.request.url, reply.text)
    (root / "by-path" / "adapter_config.json").unlink()


def keys(folder):
    file = folder / "keys"
    file.write_text("secret\n")
    return str(file)


def test_what_is_said_at_the_start(served, caplog):
    server, client = served
    registry = server.service.registry
    with caplog.at_level(logging.INFO, logger="softprompt"):
        log_prompts(registry, server.service.batcher)
        log_addresses(registry, "0.0.0.0", 8000, asks_for_key=True)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "demo: 2 prompts ready, 6 unusable; forest engine"
    assert lines[1].startswith("the prompt in the folder demo has the base's name and is served as demo-prompt;")
    assert sum(line.startswith("the prompt ") and "cannot be served: it" in line for line in lines) >= 4
    assert lines[-3] == "page http://localhost:8000/ and API http://localhost:8000/docs"
    assert lines[-2].startswith("try curl http://localhost:8000/v1/classify -H 'Content-Type: application/json'")
    assert "'Authorization: Bearer KEY'" in lines[-2]
    assert lines[-1] == "listening on http://0.0.0.0:8000"


@pytest.mark.parametrize(
    "kind", only(["fields", "tasks", "vectors"], ["classifier", "fields", "tasks", "base", "vectors"])
)
def test_the_request_to_try_is_answered(base, tmp_path, caplog, kind):
    if kind == "tasks":
        own = {"template": "{{input}}", "labels": ["a", "b"], "task": "classification"}
        write_tasks(tmp_path / "several", base, {"one": own, "two": own})
    elif kind != "base":
        changes = {"template": "{{first}} and {{second}}", "task": "generation", "labels": None}
        own = write_prompt(
            tmp_path / "own", base, manifest=kind != "vectors", **(changes if kind == "fields" else {})
        )
        if kind == "vectors":
            file = own / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "FEATURE_EXTRACTION"}))
    with running(app_over(base, tmp_path)) as server, server.client() as client:
        with caplog.at_level(logging.INFO, logger="softprompt"):
            log_addresses(server.service.registry, "127.0.0.1", 8000, asks_for_key=False)
        words = shlex.split(caplog.records[-2].getMessage())
        route = words[2].removeprefix("http://127.0.0.1:8000")
        reply = client.post(route, content=words[-1], headers={"Content-Type": "application/json"})
        assert reply.status_code == 200, reply.text


def test_who_reads_the_address_is_not_refused(tmp_path, monkeypatch):
    """uvicorn takes connections a second after it; until then they wait."""
    reached = []

    def shown(registry, host, port, **_):
        with socket.create_connection((host, port), 5):
            reached.append(registry)

    built = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(registry="its prompts")))
    monkeypatch.setattr(app, "build_app", lambda *_: built)
    monkeypatch.setattr(app, "log_addresses", shown)
    monkeypatch.setattr(app, "_run", lambda *_: None)
    app.serve(ServeSettings(base_model="demo", prompts=str(tmp_path), port=0))
    assert reached == ["its prompts"]


def of_access(caplog):
    return [each.getMessage() for each in caplog.records if each.name.endswith("access_log")]


def test_the_access_log_tells_everything_but_what_was_said(base, root, caplog):
    secret = "the secret of the text"
    with (
        caplog.at_level(logging.INFO, logger="softprompt"),
        running(app_over(base, root, access_log=True)) as server,
    ):
        caplog.clear()
        with server.client() as client:
            body = {"model": "good", "prompt": secret, "max_tokens": 3, "temperature": 0}
            usage = client.post("/v1/completions", json=body).json()["usage"]
            client.post("/v1/completions?key=hidden", json={**body, "stream": True, "ignored": 1})
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                stream.read()
            client.post("/v1/classify", json={"model": "good", "input": [secret, secret]})
            client.get("/v1/prompts/a%0Ab/card")
            label = {"model": "good", "prompt": [secret, secret]}
            labels = client.post("/v1/completions", json=label).json()["usage"]
            with client.stream("POST", "/v1/completions", json={**label, "stream": True}) as stream:
                stream.read()
        # A line comes once all of its answer is sent, which its client need not wait for.
        until(lambda: len(of_access(caplog)) == 7)
    lines = of_access(caplog)
    tokens = f"input={usage['prompt_tokens']} virtual=4 output={usage['completion_tokens']}"
    number = r"\d+\.\d{3}s"
    match = re.fullmatch
    assert match(rf"POST /v1/completions 200 {number} prompt=good {tokens}", lines[0])
    assert match(rf"POST /v1/completions 400 {number}", lines[1])
    assert match(rf"POST /v1/completions 200 {number} prompt=good input=\d+ virtual=4 output=\d", lines[2])
    assert match(rf"POST /v1/classify 200 {number} prompt=good input=\d+ virtual=8 output=0", lines[3])
    assert match(rf"GET /v1/prompts/a%0Ab/card 404 {number}", lines[4])
    tokens = f"input={labels['prompt_tokens']} virtual=8 output={labels['completion_tokens']}"
    assert labels["completion_tokens"] > 2
    for line in lines[5:]:
        assert match(rf"POST /v1/completions 200 {number} prompt=good {tokens}", line), line
    assert secret not in caplog.text
    assert "hidden" not in caplog.text


def test_there_is_no_access_log_unasked(served, caplog):
    with caplog.at_level(logging.INFO, logger="softprompt"):
        served[1].get("/v1/models")
    assert of_access(caplog) == []
