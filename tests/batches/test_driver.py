"""The driver of a batch over a stand-in for Ray in this process, which ends parts in any order and loses some."""

import json
import random
import sys
import types
from pathlib import Path

import pytest

from softprompt import load
from softprompt.batches import BatchSettings, BatchTask, Parts, run_batch
from softprompt.errors import ConfigError, DataError, UsageError


class StandIn(types.ModuleType):
    """What the driver uses of Ray: actors in this process, whose calls end in any order."""

    def __init__(self, lost=()):
        super().__init__("ray")
        self.lost, self.waiting, self.killed, self.calls = set(lost), {}, 0, 0
        self.random = random.Random(1)
        self.exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))
        self.data = types.ModuleType("ray.data")
        self.data.read_text = self.read_text
        context = types.SimpleNamespace(execution_options=types.SimpleNamespace(preserve_order=False))
        self.data.DataContext = types.SimpleNamespace(get_current=lambda: context)

    is_initialized = staticmethod(lambda: True)
    cluster_resources = staticmethod(lambda: {"CPU": 2.0})
    nodes = staticmethod(lambda: [{}])

    def remote(self, **options):
        assert options["max_restarts"] == -1
        return lambda owner: types.SimpleNamespace(remote=lambda *given: Actor(self, owner(*given)))

    def wait(self, refs, num_returns):
        assert len(refs) <= 4  # two for each worker
        done = self.random.choice(refs)
        return [done], [each for each in refs if each is not done]

    def get(self, ref):
        return [self.get(each) for each in ref] if isinstance(ref, list) else ref()

    def kill(self, actor):
        self.killed += 1

    def read_text(self, paths):
        lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines() if line]

        def batches(batch_size, batch_format):
            for start in range(0, len(lines), batch_size):
                part = [{"text": line} for line in lines[start : start + batch_size]]
                yield types.SimpleNamespace(to_pylist=lambda part=part: part)

        return types.SimpleNamespace(iter_batches=batches)


class Actor:
    def __init__(self, ray, worker):
        self.ray, self.worker = ray, worker

    def __getattr__(self, name):
        def remote(*given):
            def call():
                if name == "answer":
                    self.ray.calls += 1
                    if given[1] in self.ray.lost:
                        raise self.ray.exceptions.RayError("The actor died: out of memory")
                return getattr(self.worker, name)(*given)

            return call

        return types.SimpleNamespace(remote=remote)


@pytest.fixture
def stand_in(monkeypatch):
    def use(**options):
        ray = StandIn(**options)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.data", ray.data)
        return ray

    return use


@pytest.fixture
def data(tmp_path, texts):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.jsonl").write_text(
            "".join(json.dumps({"input": f"{number} {t}"}) + "\n" for t in texts)
        )
    return folder


def test_answers_stand_in_the_order_of_the_records_and_only_lost_parts_have_errors(
    prompts, texts, data, tmp_path, stand_in
):
    ray = stand_in(lost={21})
    asked = BatchTask("classify", {"complaints": str(prompts / "complaints")})
    out, how = tmp_path / "out", BatchSettings(part_size=5, workers=2)
    found = run_batch(asked, [str(data)], out, how)
    assert found == {"records": 48, "parts": 10, "computed": 10, "errors": 5}
    assert ray.killed == 2
    rows = list(Parts(out, "jsonl").rows())
    assert [row["record"] for row in rows] == list(range(1, 49))
    assert {row["record"] for row in rows if row["error"]} == set(range(21, 26))
    assert "out of memory" in rows[20]["error"]
    expected = load(prompts / "complaints").classify([f"{number} {text}" for number in range(2) for text in texts])
    kept = [i for i in range(48) if not 20 <= i < 25]
    assert [rows[i]["label"] for i in kept] == [expected[i].label for i in kept]

    (out / "part-000004.jsonl").unlink()
    ray = stand_in()
    assert run_batch(asked, [str(data)], out, how, resume=True) == found | {"computed": 1, "errors": 0}
    assert ray.calls == 1
    assert [row["label"] for row in Parts(out, "jsonl").rows()] == [each.label for each in expected]
    with pytest.raises(UsageError, match="has part_size 5, not 6"):
        run_batch(asked, [str(data)], out, BatchSettings(part_size=6), resume=True)
    (data / "00.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="has files "):
        run_batch(asked, [str(data)], out, how, resume=True)


def test_what_cannot_be_read_or_has_no_ray_is_refused(prompts, data, tmp_path, stand_in, monkeypatch):
    asked = BatchTask("generate", {"writer": str(prompts / "writer")})
    stand_in()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="expected files of one of"):
        run_batch(asked, [str(tmp_path / "notes.txt")], tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        run_batch(asked, [str(tmp_path / "absent")], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'softprompt\[ray\]'"):
        run_batch(asked, [str(data)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
