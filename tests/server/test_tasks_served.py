"""Each task of a multitask prompt is listed, read and scored by its own template and labels."""

import json

import pytest

from oracles.serving import app_over, running, write_tasks
from softprompt import load
from softprompt.errors import ArtifactError, ConfigError
from softprompt.server.folder import PromptFolder
from softprompt.server.registry import Registry

TASKS = {
    "sort": {
        "template": "Text : {{input}} Label :",
        "task": "classification",
        "labels": ["complaint", "praise", "neither"],
    },
    "pair": {"template": "{{first}} and {{second}} :", "task": "generation", "labels": None},
    "yes": {"template": "Is it so : {{input}} ?", "task": "classification", "labels": ["y", "n"]},
}
TEXT = "My parcel is late"


@pytest.fixture(scope="module")
def root(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder / "several", base, TASKS)
    write_tasks(folder / "alike", base, {"a": TASKS["sort"], "b": TASKS["sort"]})
    write_tasks(folder / "plain-peft", base, {"a": None, "b": None}, manifest=False)
    return folder


@pytest.fixture(scope="module")
def several(root, base):
    return load(root / "several", base.model, tokenizer=base.tokenizer)


@pytest.fixture(scope="module")
def client(root, base):
    with running(app_over(base, root)) as server, server.client() as found:
        yield found


def test_the_listing_says_what_each_task_takes(client):
    found = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    expected = [{"name": name, "chat": False, **own} for name, own in TASKS.items()]
    assert found["several"]["tasks"] == expected
    assert client.get("/v1/models/several").json() == found["several"]
    for key in ("task", "labels", "template"):
        assert found["several"][key] is None, "no one of them is that of all tasks"
        assert found["alike"][key] == TASKS["sort"][key]
    assert [each["name"] for each in found["plain-peft"]["tasks"]] == ["0", "1"]
    assert found["plain-peft"]["tasks"][1]["template"] == "{{input}}"
    assert "tasks" not in found["demo"]


def test_the_card_says_it_too(client):
    found = client.get("/v1/prompts/several/card").json()
    assert found["tasks"] == [{"name": name, "chat": False, **own} for name, own in TASKS.items()]
    assert client.get("/v1/prompts/plain-peft/card").json()["tasks"][0]["name"] == "0"


@pytest.mark.parametrize("task", ["sort", "yes"])
def test_labels_are_the_tasks_own(client, several, task):
    (expected,) = several.of_task(task).classify([TEXT])
    body = {"model": "several", "task": task, "input": TEXT}
    (found,) = client.post("/v1/classify", json=body).json()["data"]
    assert list(found["scores"]) == TASKS[task]["labels"]
    assert found["scores"] == pytest.approx(dict(expected.scores), abs=1e-4)
    found = client.post("/v1/classify", json={**body, "task": "pair"})
    assert found.status_code == 400
    assert "no labels of its own" in found.json()["error"]["message"]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_read_by_the_tasks_own_template(client, several, task):
    fields = {"first": "one", "second": "two"} if task == "pair" else {"input": TEXT}
    (expected,) = several.of_task(task).generate([fields], max_new_tokens=5)
    body = {"model": "several", "task": task, "max_tokens": 5, "temperature": 0}
    found = client.post("/v1/completions", json={**body, "fields": fields}).json()
    assert found["choices"][0]["text"] == expected.text
    assert found["usage"]["prompt_tokens"] == expected.input_token_count


def test_a_task_must_be_named_and_known(client):
    for task, words in ((None, "sort, pair, yes"), ("sotr", "did you mean 'sort'")):
        body = {"model": "several", "task": task, "prompt": TEXT}
        found = client.post("/v1/completions", json=body)
        assert found.status_code == 400
        assert words in found.json()["error"]["message"]
    body = {"model": "several", "task": "s" * 5000, "prompt": TEXT}
    assert len(client.post("/v1/completions", json=body).content) < 500


@pytest.fixture
def registry(tmp_path, base):
    return Registry(PromptFolder.of(tmp_path), base, max_resident=8, max_bytes=2**20)


@pytest.mark.parametrize(
    "kept",
    [
        "text",
        ["sort"],
        {"sort": "x"},
        {"sort": {}},
        {"sort": {**TASKS["sort"], "labels": 3}},
        {"sort": {**TASKS["sort"], "template": None}},
        {"sort": {**TASKS["sort"], "task": "poetry"}},
    ],
)
def test_a_record_that_keeps_nonsense_of_a_task(registry, tmp_path, base, kept):
    directory = write_tasks(tmp_path / "several", base, TASKS)
    record = json.loads((directory / "softprompt.json").read_text())
    (directory / "softprompt.json").write_text(json.dumps({**record, "data": {"tasks": kept}}))
    assert "softprompt.json" in registry.outline("several").problem
    with pytest.raises(ArtifactError, match="cannot be served: expected"):
        registry.get("several", "sort")


def test_a_number_of_tasks_fills_no_memory(registry, tmp_path, base):
    directory = write_tasks(tmp_path / "many", base, {"a": None, "b": None}, manifest=False)
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_tasks": 2', '"num_tasks": 1000000'))
    assert "at most 1,000 tasks" in registry.outline("many").problem


def test_a_prompt_of_one_task_has_no_others(registry, tmp_path, base):
    write_tasks(tmp_path / "one", base, {"sort": TASKS["sort"]})
    assert registry.get("one").labels == tuple(TASKS["sort"]["labels"])
    assert registry.get("one", "sort") is registry.get("one", 0)
    with pytest.raises(ConfigError, match="no task 'x'"):
        registry.get("one", "x")
