"""Several processes give the prompt, the validation and the reports of one, and one that ends is named."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

from oracles.ranks import assert_close, run_ranks
from oracles.shared_jobs import JOBS, METHODS, tuned_of
from softprompt import load
from softprompt.cli.main import run
from softprompt.errors import ConfigError, ProcessLostError
from softprompt.training import tune
from softprompt.training.output import state_path
from softprompt.world import World, joined, world

SCRIPT = "from oracles.shared_jobs import main; main()"


@pytest.fixture(scope="module")
def folder(bases, tmp_path_factory):
    """Bases and data, which all processes read."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("llama", "bart"):
        shutil.copytree(bases / name, folder / name)
    kinds, tails = [("good", "yes"), ("bad", "no"), ("fine", "yes"), ("poor", "no")], ["", " news", " report it"]
    rows = [
        {"input": f"the film was {kinds[i % 4][0]}{tails[i % 3]}", "output": kinds[i % 4][1]} for i in range(22)
    ]
    for name, records in (("train", rows), ("test", rows[:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def shared(folder, *names, count=2):
    """What jobs came to in several processes: by rank, and as they ended."""
    ended = run_ranks(SCRIPT, folder, json.dumps(names), count=count, seconds=900)
    paths = [folder / f"found-{count}-{rank}.pt" for rank in range(count)]
    assert all(path.exists() for path in paths), ended
    return [torch.load(path) for path in paths], ended


@pytest.fixture(scope="module")
def two(folder):
    """One start of two processes for all that is looked at, since each imports torch anew."""
    names = "labels answered seeds tracked stopped refused diverged bent_between bent_at_the_end killed"
    return shared(folder, *names.split())


@pytest.mark.parametrize("name", ["labels", "seeds"])
def test_two_processes_give_what_one_gives(folder, two, name):
    (first, second), _ = two
    alone = JOBS[name](folder, folder / name)
    sizes = [each[name].pop("world", None) for each in (first, second, {name: alone})]
    assert sizes in ([(1, 2), (1, 2), (1, 1)], [None] * 3)  # outside a job a process is a world of its own
    assert_close(alone, first[name], name)
    for key, value in first[name].items():  # to the bit
        equal = torch.equal if isinstance(value, torch.Tensor) else lambda one, other: one == other
        assert equal(value, second[name][key]), key
    names = [
        sorted(each.relative_to(path) for each in path.rglob("*")) for path in (folder / name, folder / f"{name}-2")
    ]
    assert names[0] == names[1]


def test_commands_that_answer_share_their_inputs(folder, two):
    """Of stdin, a file and records on stdin; what is wrong with one is said once, with its number among all."""
    (first, second), _ = two
    alone = JOBS["answered"](folder, folder / "answered")
    assert_close(alone["said"], first["answered"]["said"], "said")
    assert [code for code, *_ in alone["said"]] == [0, 0, 0, 2] * 2
    assert alone["said"][3][1] == ["Error: empty.jsonl, line 4: expected a value in the field 'input', got None"]
    assert [(code, out) for code, _, out in second["answered"]["said"]] == [
        (code, None) for code, *_ in alone["said"]
    ]
    assert alone["counts"] == [3, 2, 9, 3, 2, 9]
    assert first["answered"]["counts"] == [2, 1, 5] * 2
    assert second["answered"]["counts"] == [1, 1, 4] * 2


def test_they_stop_together_and_another_number_goes_on(folder, two):
    (first, second), _ = two
    output = folder / "stopped-2"
    assert "after update 4 " in first["stopped"]["said"] and "after update 4 " in second["stopped"]["said"]
    assert f"--resume --output {output}" in first["stopped"]["said"]
    resumed = tune(output=output, resume=True)
    for name, value in resumed.module.stored().items():
        torch.testing.assert_close(value, first["labels"][name], atol=1e-5, rtol=1e-5)


def test_the_first_process_alone_tells_trackers(two):
    first, second = two[0]
    assert first["tracked"]["told"] == [1, 2, 3, 3, 4, 5, 6, 6, None]  # updates, validations, samples and path
    assert second["tracked"]["told"] == []


def test_a_group_that_somebody_else_made_names_no_process():
    said = World(1, 2)._lost(RuntimeError("connection closed"))
    assert said == "the processes lost each other (connection closed)"


def test_only_errors_of_collectives_are_those_of_a_lost_process():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a bug of ours")):
        with pytest.raises(type(error), match=str(error)) as caught, World(1, 2).together():
            raise error
        assert caught.value is error
    gloo = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:49798"
    for error in (RuntimeError(gloo), torch.distributed.DistBackendError("NCCL error")):
        with pytest.raises(ProcessLostError, match="the processes lost each other"), World(1, 2).together():
            raise error


def test_a_mistake_is_one_for_all(folder, two):
    (first, second), _ = two
    assert first["refused"] == second["refused"]
    exists, missing, infinite = first["refused"]["said"]
    assert "expected a new or empty output directory" in exists
    assert "none.jsonl" in missing
    assert infinite == "the loss of a row is not finite"


def test_unlike_prompts_fail_loudly(two):
    for found in two[0]:
        assert "after update 1 the prompt of rank 1 is not that of rank 0" in found["diverged"]["said"]


def assert_goes_on(folder, name):
    """The run that lost a process gives the prompt of one that did not."""
    resumed = tune(output=folder / name, resume=True)
    words = {"num_epochs": 3, "batch_size": 4, "accumulate_steps": 2, "tuning_config": {"num_virtual_tokens": 3}}
    straight = tune(folder / "llama", folder / "train.jsonl", **words)
    torch.testing.assert_close(resumed.prompt().input, straight.prompt().input, atol=1e-5, rtol=1e-5)
    assert not state_path(folder / name).parent.exists()


@pytest.mark.parametrize(("job", "update"), [("bent_between", 3), ("bent_at_the_end", 6)])
def test_prompts_that_part_on_the_way_fail_at_the_next_check(two, job, update):
    for found in two[0]:
        assert f"after update {update} the prompt of rank 1 is not that of rank 0" in found[job]["said"]


def test_a_process_that_is_killed_is_named_and_the_others_end(folder, two):
    (code, stdout, stderr), (killed, silent, mute) = two[1]
    assert (code, killed) == (2, -signal.SIGKILL)
    assert stdout == silent == mute == ""
    last = stderr.splitlines()[-1]
    assert last.startswith("Error: rank 1 of 2 ended: without a word; training was stopped after update 6 (epoch ")
    assert last.endswith(f"continue with: softprompt tune --resume --output {folder / 'killed-2'}")
    assert_goes_on(folder, "killed-2")


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "count"), [(0, 2), (0, 4), (2, 4)])
def test_whichever_process_is_killed_those_left_say_how_to_go_on(folder, rank, count):
    """Where rank 0 is killed that kept what they tell each other, none knows that another one speaks."""
    _, ended = shared(folder, f"killed_{rank}", count=count)
    code, stdout, _ = ended.pop(rank)
    assert (code, stdout) == (-signal.SIGKILL, "")
    assert [code for code, *_ in ended] == [2] * (count - 1)
    said = [stderr.splitlines()[-1] for _, _, stderr in ended if stderr]
    assert len(said) == count - 1 or rank  # rank 0 speaks for all, and one that is late may find it gone
    start = f"Error: rank {rank} of {count} ended: without a word; "
    assert said[0].startswith(start if rank else f"rank 1 of {count}: {start}")
    for line in said:
        assert line.endswith(f"continue with: softprompt tune --resume --output {folder}/killed_{rank}-{count}")
    assert_goes_on(folder, f"killed_{rank}-{count}")


def test_commands_for_one_process_say_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "serve runs in one process"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert run(["serve", "x"]) == 2
        assert capsys.readouterr().err.strip().startswith(f"Error: {said}" if said else "")


def test_a_launcher_says_where_to_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="nothing says where they meet"), joined():
        pass
    assert world() == World()


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("1", "1"), ("0", "0")])
def test_a_rank_that_is_none_of_the_processes_is_refused_before_they_meet(monkeypatch, capsys, rank, size):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(World, "speaks", lambda _: True)  # without the seconds in which others might
    assert run(["tune", "--base-model", "none", "--train-data", "none.jsonl", "--output", "none"]) == 2
    said = capsys.readouterr().err
    assert f"expected a RANK of at least 0 and below WORLD_SIZE, got RANK={rank} and WORLD_SIZE={size}; " in said


def test_a_port_that_is_in_use_is_one_clear_line(monkeypatch, capfd):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        assert run(["tune", "--base-model", "none", "--train-data", "none.jsonl", "--output", "none"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"Error: rank 0 of 2 cannot meet the others at 127.0.0.1:{port} (")
    assert last.endswith("a MASTER_PORT that is free there")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_method_sweep_and_distillation(folder, chat_folder, count):
    names = [*METHODS, "probed", "texts", "multitask", "from_source", "compared", "swept"]
    names += ["distilled", "distilled_of_a_document", "distilled_kv", "distilled_beside"]
    alone = {name: JOBS[name](folder, folder / f"{name}-alone-{count}") for name in names}
    found, _ = shared(folder, *names, count=count)
    for name in names:
        for rank in range(count):
            assert_close(alone[name], found[rank][name], f"{name} of rank {rank} of {count}")


@pytest.mark.slow
def test_processes_are_as_near_to_one_as_one_is_with_its_batches_split(folder):
    """Sums in another order differ in their last bits, and Adam, which divides by a gradient, enlarges that."""
    alone, split = JOBS["wide"](folder, None), JOBS["wide"](folder, None, max_tokens_per_batch=20)
    for found in shared(folder, "wide")[0]:
        for name, value in alone.items():
            ours, own = (float((each[name] - value).norm()) for each in (found["wide"], split))
            assert ours <= 4 * own, name


TORCHRUN = "torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2"
ACCELERATE = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0"
)


def under(launcher, *words):
    """Run the command line in two processes of a launcher, which chooses their ports."""
    launcher = ["-m", *launcher.split()]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "softprompt", *map(str, words)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_launcher_gives_the_prompt_of_one_process(folder, tmp_path, launcher):
    pytest.importorskip(launcher.partition(".")[0])
    words = ["tune", "--base-model", folder / "llama", "--train-data", folder / "train.jsonl", "--batch-size", 5]
    words += ["--num-epochs", 3, "--num-virtual-tokens", 3, "--accumulate-steps", 2, "--output"]
    assert run([*map(str, words), str(tmp_path / "one")]) == 0
    under(launcher, *words, tmp_path / "two")
    one, two = (load(tmp_path / name).module.stored() for name in ("one", "two"))
    assert_close(one, two, "the prompt")


@pytest.mark.slow
def test_torchrun_goes_on_with_what_one_process_began(folder, tmp_path):
    assert "after update 4 " in JOBS["stopped"](folder, tmp_path / "begun")["said"]
    under(TORCHRUN, "tune", "--resume", "--output", tmp_path / "begun")
    straight = tuned_of(folder, tmp_path / "straight").module.stored()
    assert_close(straight, load(tmp_path / "begun").module.stored(), "the prompt")


@pytest.fixture
def chat_folder(folder):
    from oracles import families
    from oracles.tokenizers import chat_bpe

    model = families.widened(families.causal("llama", vocab_size=330, max_position_embeddings=512))
    model.save_pretrained(folder / "chat")
    chat_bpe().save_pretrained(folder / "chat")
