"""Source training over several data sets, target adaptation, and the prompt in use."""

import json
import os
import shutil
import signal

import pytest
import torch

from oracles.slow import only
from softprompt.errors import ConfigError, DataError, TrainingInterrupted, UsageError
from softprompt.evaluation import evaluate
from softprompt.inference import load
from softprompt.peft import PeftModel
from softprompt.training import Events, read_run, tune

MULTITASK = {"tuning_type": "MULTITASK_PROMPT_TUNING"}
QUICK = MULTITASK | {
    "num_epochs": 2,
    "batch_size": 6,
    "tuning_config": {"num_virtual_tokens": 3},
}


@pytest.fixture
def tasks(rows):
    """Two tasks with labels of their own."""
    fine = [{"input": row["input"], "output": "fine"} for row in rows[:4]]
    poor = [{"input": row["input"], "output": "poor news"} for row in rows[4:8]]
    return {"film": rows[:14], "news": fine + poor}


@pytest.fixture(scope="session")
def source(bases, tmp_path_factory):
    """A folder of source prompts with one, ``both``, for the causal base."""
    rows = [{"input": f"the film was {w}", "output": o} for w, o in (("good", "yes"), ("bad", "no"))]
    other = [{"input": row["input"], "output": {"yes": "fine", "no": "poor"}[row["output"]]} for row in rows]
    folder = tmp_path_factory.mktemp("sources")
    tune(
        bases / "llama",
        {"film": rows * 6, "news": other * 4},
        output=folder / "both",
        distillation_weight=0,
        **QUICK,
    )
    return folder


def adaptation(source, **tuning):
    given = {"num_virtual_tokens": 3, "prompt_tuning_init_source_model": "both"}
    given["prompt_tuning_init_method"] = "AVERAGE_SOURCE"
    return MULTITASK | {"source_prompt_base": str(source), "tuning_config": given | tuning}


def parameters(tuned):
    return tuned.module.state_dict()


@pytest.mark.parametrize("base", only(["bart"], ["llama", "bart"]))
def test_source_training_teaches_then_distils(bases, tasks, tmp_path, base):
    held_out = {name: rows[:6] for name, rows in tasks.items()}
    options = QUICK | {"num_epochs": 3, "task_verbalizers": {"news": "{{input}} ?"}}
    tuned = tune(bases / base, tasks, held_out, output=tmp_path / "out", **options)
    losses = [point["loss"] for point in tuned.history]
    assert losses[-1] < losses[0]
    assert tuned.history[-1]["distillation"] < tuned.history[0]["distillation"]
    assert tuned.metrics["teachers"]["updates"] == 3 * 4
    assert {"film accuracy", "news accuracy", "accuracy", "loss"} <= set(tuned.metrics["validation"])
    loaded = load(tmp_path / "out")
    assert loaded.manifest.tasks == ("film", "news")
    assert loaded.of_task("film").labels == ("no", "yes")
    assert loaded.of_task("news").labels == ("fine", "poor news")
    assert loaded.of_task(1).manifest.template == "{{input}} ?"
    text = "the film was good"
    assert loaded(text, task_name="film") in ("no", "yes")
    assert loaded(text, task_name="news") == tuned(text, task_name=1) in ("fine", "poor news")
    alone = loaded.of_task("news").classify([text])[0]
    assert loaded.classify([text], task_name="news")[0] == alone
    assert loaded.generate([text], task_name="film", max_new_tokens=2)
    scores = evaluate(loaded, tasks["news"], task_name="news")
    assert scores.rows == 8
    kept = tuned.history[tuned.metrics["epoch"] - 1]["validation"]
    again = evaluate(loaded, held_out["film"], task_name="film")
    assert again.accuracy == pytest.approx(kept["film accuracy"])
    names = {"training_logs.jsonl", "teacher_training_logs.jsonl"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}


def test_progress_names_the_stage(llama, tasks, caplog):
    with caplog.at_level("INFO", "softprompt.training.events"):
        tune(llama, tasks, **QUICK)
    lines = [line for line in caplog.messages if line.startswith("epoch 1")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of the teachers", "epoch 1"]


def test_each_task_answers_from_its_own_rows_of_the_prompt(llama, tasks):
    tuned = tune(llama, tasks, distillation_weight=0, **QUICK)
    film, news = tuned.of_task("film"), tuned.of_task("news")
    assert not torch.equal(film.prompt().input, news.prompt().input)
    encoder = tuned.module
    assert torch.equal(news.prompt().input, encoder.materialize(1).detach())
    assert "teachers" not in tuned.metrics


def test_each_row_may_have_a_task_of_its_own(llama, tasks):
    tuned = tune(llama, tasks, distillation_weight=0, **QUICK)
    texts, names = ["the film was good", "the film was bad", "so it was"], ["news", "film", 1]
    alone = [tuned(text, task_name=name) for text, name in zip(texts, names, strict=True)]
    assert tuned(texts, task_name=names) == alone
    assert [each.label for each in tuned.classify(texts, task_name=names)] == alone
    limit = {"max_new_tokens": 3}
    written = [tuned.generate(t, task_name=n, **limit)[0] for t, n in zip(texts, names, strict=True)]
    assert [a.text for a in tuned.generate(texts, task_name=names, **limit)] == [answer.text for answer in written]
    with pytest.raises(ConfigError, match="one for each of the 3 rows; got 2"):
        tuned(texts, task_name=["film", "news"])
    with pytest.raises(ConfigError, match="no task 'flim'"):
        tuned(texts, task_name=["film", "news", "flim"])


def test_rows_of_several_tasks_are_evaluated_together(llama, tasks):
    tuned = tune(llama, tasks, distillation_weight=0, **QUICK)
    rows = [row | {"kind": name} for name in ("news", "film") for row in tasks[name][:5]]
    rows = rows[1::2] + rows[::2]
    report = evaluate(tuned, rows, task_field="kind")
    parts = {name: evaluate(tuned, tasks[name][:5], task_name=name) for name in ("film", "news")}
    assert report.tasks.keys() == parts.keys()
    for name, part in parts.items():
        assert report.tasks[name].accuracy == part.accuracy
        assert report.tasks[name].perplexity == pytest.approx(part.perplexity)
    assert (report.task, report.rows) == ("classification", 10)
    assert report.accuracy == pytest.approx(sum(part.accuracy for part in parts.values()) / 2)
    kinds = [row["kind"] for row in rows]
    assert evaluate(tuned, rows, task_name=kinds) == report
    assert evaluate(tuned, rows, task_name=kinds, limit=4).rows == 4
    assert report.to_dict()["tasks"]["film"]["rows"] == 5
    assert "film" in str(report)
    with pytest.raises(ConfigError, match="give one of them"):
        evaluate(tuned, rows, task_name="film", task_field="kind")
    with pytest.raises(DataError, match=r"record 1 has no task in 'kinds' \(did you mean 'kind'"):
        evaluate(tuned, rows, task_field="kinds")


def test_a_task_has_to_be_chosen_and_to_exist(llama, tasks):
    tuned = tune(llama, tasks, distillation_weight=0, **QUICK)
    for use in (tuned, tuned.classify, tuned.generate):
        with pytest.raises(
            ConfigError,
            match=r"has 2 tasks \(film, news\); choose one by .*task_name=.*--task-name",
        ):
            use("the film was good")
    with pytest.raises(ConfigError, match=r"no task 'flim' \(did you mean 'film'\?\)"):
        tuned("the film was good", task_name="flim")
    with pytest.raises(ConfigError, match="no task 2; its tasks are film, news"):
        tuned("the film was good", task_name=2)
    with pytest.raises(ConfigError, match="has 2 tasks"):
        evaluate(tuned, tasks["film"])


@pytest.mark.parametrize(
    ("stage", "update", "sampling"),
    only([("teacher", 3, "proportional")], [("teacher", 3, "proportional"), ("student", 4, "uniform")]),
)
def test_a_resumed_run_of_several_tasks_ends_bit_equal(
    llama, tasks, tmp_path, monkeypatch, stage, update, sampling
):
    options = QUICK | {"task_sampling": sampling, "accumulate_steps": 2, "keep_dropout": True}
    held_out = {name: rows[:4] for name, rows in tasks.items()}
    straight = tune(llama, tasks, held_out, output=tmp_path / "a", **options)
    told, seen = Events.update, []

    def tell(self, state, loss):
        told(self, state, loss)
        seen.append(state.update)
        if state.update == update and seen.count(1) == 1 + (stage == "student"):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", tell)
        with pytest.raises(TrainingInterrupted, match=f"after update {update} ") as error:
            tune(llama, tasks, held_out, output=tmp_path / "b", **options)
    assert ("of the teachers" in str(error.value)) is (stage == "teacher")
    resumed = tune(llama, tasks, held_out, output=tmp_path / "b", resume=True)
    for name, value in parameters(straight).items():
        assert torch.equal(parameters(resumed)[name], value)
    assert resumed.history == straight.history
    teachers = [dict(tuned.metrics["teachers"]) for tuned in (straight, resumed)]
    for each in teachers:
        del each["seconds"], each["seconds_by_part"], each["tokens_per_second"]
    assert teachers[0] == teachers[1]
    for log in ("training_logs.jsonl", "teacher_training_logs.jsonl"):
        lines = [(tmp_path / name / log).read_text().splitlines() for name in "ab"]
        steps = [[json.loads(line)["data"]["step"] for line in each] for each in lines]
        assert steps[0] == steps[1]


@pytest.mark.slow
def test_the_runs_own_file_repeats_several_tasks(llama, tasks, tmp_path):
    paths = {}
    for name, rows in tasks.items():
        paths[f"{name} 1"] = tmp_path / f"{name}.jsonl"
        paths[f"{name} 1"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = QUICK | {"distillation_weight": 0.5, "task_verbalizers": {"film 1": "{{input}} :"}}
    first = tune(llama, paths, output=tmp_path / "a", **options)
    again = tune(**read_run(tmp_path / "a" / "run.toml"), output=tmp_path / "b")
    for name, value in parameters(first).items():
        assert torch.equal(parameters(again)[name], value)
    assert (tmp_path / "a" / "run.toml").read_text() == (tmp_path / "b" / "run.toml").read_text()


def test_the_task_names_of_both_data_sets_must_agree(llama, tasks):
    with pytest.raises(UsageError, match=r"different tasks \(film, news and film\)"):
        tune(llama, tasks, {"film": tasks["film"]}, **QUICK)
    with pytest.raises(UsageError, match=r"train_data is an empty mapping; give \{task: data\}"):
        tune(llama, {}, **QUICK)
    with pytest.raises(UsageError, match="task names are texts; got 3"):
        tune(llama, {3: tasks["film"]}, **QUICK)
    with pytest.raises(ConfigError, match="need tuning_type MULTITASK_PROMPT_TUNING"):
        tune(llama, tasks)
    strange = tasks | {"news": [{"input": "it"}]}
    with pytest.raises(DataError, match="task news: record 1"):
        tune(llama, strange, **QUICK)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("AVERAGE_SOURCE", {}),
        pytest.param("AVERAGE_SOURCE_TASKS", {}, marks=pytest.mark.slow),
        ("EXACT_SOURCE_TASK", {"prompt_tuning_init_task": "news"}),
        pytest.param("EXACT_SOURCE_TASK", {"prompt_tuning_init_task": 1}, marks=pytest.mark.slow),
        ("ONLY_SOURCE_SHARED", {}),
    ],
)
def test_a_target_prompt_starts_from_its_source(llama, rows, source, method, extra):
    options = adaptation(source, prompt_tuning_init_method=method, **extra)
    tuned = tune(llama, rows, num_epochs=1, lr=1e-30, task_learning_rate=1e-30, **options)
    there = parameters(load(source / "both"))
    cols, own = there["prefix_task_cols"], there["prefix_task_rows"]
    matrix = {
        "ONLY_SOURCE_SHARED": torch.ones(1),
        "EXACT_SOURCE_TASK": cols[1] @ own[1],
    }.get(method, cols.mean(0) @ own.mean(0))
    expected = there["embedding.weight"] * matrix
    torch.testing.assert_close(tuned.prompt().input, expected)


def test_a_target_prompt_loads_without_its_source(llama, rows, source, tmp_path):
    copy = tmp_path / "sources"
    shutil.copytree(source, copy)
    tuned = tune(llama, rows, output=tmp_path / "out", num_epochs=1, **adaptation(copy))
    shutil.rmtree(copy)
    loaded = load(tmp_path / "out")
    assert loaded("the film was good") == tuned("the film was good")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_tasks"]) == ("MULTITASK_PROMPT_TUNING", 1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_loads_a_target_prompt(llama, rows, source, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tuned = tune(llama, rows, output=tmp_path / "out", num_epochs=1, **adaptation(source))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7]])
    mask, task = torch.ones_like(ids), torch.tensor([0])
    expected = theirs(input_ids=ids, attention_mask=mask, task_ids=task).logits
    ours = PeftModel.of(tuned)(input_ids=ids, attention_mask=mask, task_ids=task).logits
    torch.testing.assert_close(ours[:, -3:], expected[:, -3:], atol=1e-5, rtol=1e-5)


def test_both_learning_rates_are_used(llama, rows, source):
    only = {"num_epochs": 1, "batch_size": 22}
    start = parameters(tune(llama, rows, **only, lr=1e-30, task_learning_rate=1e-30, **adaptation(source)))
    moved = parameters(tune(llama, rows, **only, lr=1e-30, task_learning_rate=0.1, **adaptation(source)))
    assert torch.equal(moved["embedding.weight"], start["embedding.weight"])
    step = (moved["prefix_task_cols"] - start["prefix_task_cols"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 0.1), atol=1e-3, rtol=0)
    moved = parameters(tune(llama, rows, **only, lr=0.05, task_learning_rate=1e-30, **adaptation(source)))
    assert not torch.equal(moved["embedding.weight"], start["embedding.weight"])
    assert torch.equal(moved["prefix_task_rows"], start["prefix_task_rows"])


@pytest.mark.parametrize(
    ("base", "tuning", "message"),
    [
        ("llama", {"num_virtual_tokens": 4}, "has 3 virtual tokens, this prompt needs 4"),
        ("llama", {"num_ranks": 2}, "has num_ranks 1, this prompt 2"),
        ("bart", {}, "does not fit .*: it was made for"),
        (
            "llama",
            {"prompt_tuning_init_source_model": "bth"},
            r"holds both \(did you mean 'both'\?\)",
        ),
        ("llama", {"prompt_tuning_init_source_model": "../both"}, "leads out of the folder"),
        ("llama", {"prompt_tuning_init_source_model": "/tmp"}, "leads out of the folder"),
        (
            "llama",
            {"prompt_tuning_init_method": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": "nws"},
            r"did you mean 'news'\?\); it has film, news",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused(bases, rows, source, base, tuning, message):
    with pytest.raises(ConfigError, match=message):
        tune(bases / base, rows, num_epochs=1, **adaptation(source, **tuning))


def test_a_source_continues_as_a_source(llama, tasks, source, tmp_path):
    options = adaptation(source) | {"num_epochs": 1, "distillation_weight": 0}
    tuned = tune(llama, tasks, output=tmp_path / "out", **options)
    assert tuned.manifest.tasks == ("film", "news")
    assert parameters(tuned)["prefix_task_cols"].shape[0] == 2
