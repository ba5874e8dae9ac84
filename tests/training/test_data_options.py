"""Which records a run trains and validates on, and for how long: splits, limits, names of labels."""

import io
import json
import os
import signal
from collections import Counter

import pytest
import torch

from oracles.slow import only
from softprompt.errors import ConfigError, DataError, TrainingInterrupted, UsageError
from softprompt.evaluation import evaluate
from softprompt.training import Events, TuneSettings, tune
from softprompt.training.examples import read_data

QUICK = {"num_epochs": 1, "batch_size": 4, "tuning_config": {"num_virtual_tokens": 2}}


def read(train, validation=None, **options):
    (task,) = read_data(train, validation, TuneSettings(**options))
    return task


def prompt_of(tuned):
    return tuned.module.embedding.weight.detach()


class TestValidationSplit:
    def test_of_each_label_the_same_share_in_order_and_said(self, rows, caplog):
        uneven = [*rows, *([{"input": "it was a film", "output": "no"}] * 18)]
        uneven = [{"input": f"{n} {row['input']}", "output": row["output"]} for n, row in enumerate(uneven)]
        with caplog.at_level("INFO", "softprompt"):
            task = read(uneven, validation_split=0.25)
        assert caplog.messages == ["validation data: 10 of the 40 records, drawn from each label with seed 73"]
        assert Counter(each.target for each in task.validation) == {"yes": 3, "no": 7}
        assert (len(task.train), len(task.validation)) == (30, 10)
        assert task.fingerprints["train"]["rows"] == 30
        assert task.fingerprints["validation"]["rows"] == 10
        places = [int(each.fields["input"].split()[0]) for each in task.train]
        assert places == sorted(places)

    def test_the_seed_decides(self, rows):
        first, again = (read(rows, validation_split=0.3, seed=1).validation for _ in range(2))
        assert first == again
        assert first != read(rows, validation_split=0.3, seed=2).validation

    def test_free_text_is_drawn_from_everything(self, caplog):
        texts = [{"input": f"film {n}", "output": f"it was {n}"} for n in range(10)]
        with caplog.at_level("INFO", "softprompt"):
            task = read(texts, validation_split=0.2)
        assert (len(task.train), len(task.validation)) == (8, 2)
        assert caplog.messages == ["validation data: 2 of the 10 records, drawn with seed 73"]

    def test_a_label_of_one_record_is_trained_on(self, rows):
        task = read([*rows, {"input": "odd", "output": "maybe"}], validation_split=0.2)
        assert "maybe" in {each.target for each in task.train}
        assert task.labels == ("maybe", "no", "yes")

    @pytest.mark.parametrize(("share", "count"), [(0.01, 22), (0.9, 10)])
    def test_too_few_records_are_refused(self, rows, share, count):
        with pytest.raises(ConfigError, match=f"validation_split {share:g} of {count} records of 2 labels leaves"):
            read(rows[:count], validation_split=share)

    def test_two_ways_to_validate_are_refused(self, rows, held_out):
        with pytest.raises(UsageError, match="validation_data and validation_split both say"):
            read(rows, held_out, validation_split=0.2)

    def test_patience_needs_one_of_them(self, rows):
        with pytest.raises(ConfigError, match="needs validation_data or validation_split"):
            read(rows, early_stopping_patience=1)
        assert read(rows, early_stopping_patience=1, validation_split=0.2).validation


class TestSplitsOfDatasets:
    @pytest.fixture
    def splits(self, rows, held_out):
        datasets = pytest.importorskip("datasets")
        labels = datasets.ClassLabel(names=["no", "yes"])
        features = datasets.Features(input=datasets.Value("string"), output=labels)
        parts = {"train": rows, "validation": held_out, "test": held_out[:4]}
        made = {name: datasets.Dataset.from_list(part, features) for name, part in parts.items()}
        return datasets.DatasetDict(made)

    def test_the_validation_split_is_used_and_said(self, splits, rows, held_out, caplog):
        with caplog.at_level("INFO", "softprompt"):
            task = read(splits)
        assert "the validation split of the training data is validated on" in caplog.messages
        assert [each.target for each in task.train] == [row["output"] for row in rows]
        assert [each.target for each in task.validation] == [row["output"] for row in held_out]
        assert task.labels == ("no", "yes")
        assert len(read(splits, validation_split=0.5).validation) == 11
        assert len(read(splits["train"], splits).validation) == len(held_out)

    def test_training_validation_and_evaluation_have_the_names(self, llama, splits):
        tuned = tune(llama, splits, **QUICK)
        assert tuned.labels == ("no", "yes")
        assert "accuracy" in tuned.metrics["validation"]
        report = evaluate(tuned, splits)
        assert (report.rows, report.invalid) == (4, 0)
        assert {row.label for row in report.per_label} == {"no", "yes"}


class TestLimit:
    def test_only_the_first_records_are_trained_on(self, rows):
        task = read(rows, limit=6)
        assert [each.fields["input"] for each in task.train] == [row["input"] for row in rows[:6]]
        assert task.fingerprints["train"]["rows"] == 6
        assert len(read(rows, limit=10, validation_split=0.4).train) == 6

    def test_labels_beyond_it_are_noticed(self, rows):
        ordered = sorted(rows, key=lambda row: row["output"])
        assert read(ordered, limit=4).beyond_limit == ("yes",)
        assert read(rows, limit=4).beyond_limit == ()
        unread = [*ordered[:4], {"input": "it", "output": None}]
        assert read(unread, limit=4).beyond_limit == (), "what is not trained on need not be whole"


class TestMaxSteps:
    @pytest.mark.parametrize(("most", "epochs"), [(2, 1), (6, 1), (8, 2)])
    def test_it_is_the_number_of_updates(self, llama, rows, held_out, most, epochs):
        tuned = tune(llama, rows, held_out, max_steps=most, **QUICK)
        assert (tuned.metrics["updates"], tuned.metrics["epochs"]) == (most, epochs)
        assert [point["update"] for point in tuned.history] == [min(6 * n, most) for n in range(1, epochs + 1)]

    def test_all_steps_of_whole_epochs_are_those_epochs(self, llama, rows):
        by_steps = tune(llama, rows, max_steps=12, **QUICK)
        by_epochs = tune(llama, rows, **(QUICK | {"num_epochs": 2}))
        assert torch.equal(prompt_of(by_steps), prompt_of(by_epochs))

    @pytest.mark.parametrize("stopped_after", only([3], [3, 8]))
    def test_a_resumed_run_ends_bit_equal(self, llama, rows, tmp_path, monkeypatch, stopped_after):
        options = QUICK | {"max_steps": 8, "validation_split": 0.2, "limit": 20, "label_names": {"yes": "good"}}
        options["label_names"]["no"] = "bad"
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        straight = tune(llama, data, output=tmp_path / "a", **options)
        told = Events.update

        def tell(self, state, loss):
            told(self, state, loss)
            if state.update == stopped_after:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Events, "update", tell)
            with pytest.raises(TrainingInterrupted):
                tune(llama, data, output=tmp_path / "b", **options)
        resumed = tune(output=tmp_path / "b", resume=True)
        assert torch.equal(prompt_of(resumed), prompt_of(straight))
        assert resumed.history == straight.history
        assert resumed.labels == ("bad", "good")
        assert (tmp_path / "a" / "run.toml").read_text() == (tmp_path / "b" / "run.toml").read_text()


class TestLabelNames:
    def test_they_are_kept_with_the_prompt_and_hold_for_evaluation(self, llama, rows, tmp_path):
        numbered = [row | {"output": int(row["output"] == "yes")} for row in rows]
        tuned = tune(llama, numbered, output=tmp_path / "p", label_names=["bad", "good"], **QUICK)
        assert tuned.labels == ("bad", "good")
        recorded = json.loads((tmp_path / "p" / "softprompt.json").read_text())
        assert recorded["settings"]["label_names"] == {"0": "bad", "1": "good"}
        report = evaluate(tuned, numbered)
        assert (report.invalid, {row.label for row in report.per_label}) == (0, {"bad", "good"})
        assert evaluate(tuned, rows, label_names={"no": "bad", "yes": "good"}).accuracy == report.accuracy

    @pytest.mark.parametrize("names", [{}.values(), "yes", {0: 1}, {0: " "}, [None]])
    def test_what_names_nothing_is_refused(self, names):
        with pytest.raises(ConfigError, match="label_names takes names such as"):
            TuneSettings(label_names=names)

    def test_a_target_without_one_is_refused(self, rows):
        with pytest.raises(DataError, match="record 2: the target 'no' has no name in label_names, which has yes"):
            read(rows, label_names={"yes": "good"})

    def test_not_for_several_tasks(self, rows):
        settings = TuneSettings(tuning_type="MULTITASK_PROMPT_TUNING", label_names={"yes": "good"})
        with pytest.raises(ConfigError, match="label_names would rename the targets of every task"):
            read_data({"a": rows, "b": rows}, None, settings)


def test_standard_input_is_read_once_and_has_to_be_given_again(llama, rows, tmp_path, monkeypatch):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    tuned = tune(llama, "-", output=tmp_path / "p", **QUICK)
    assert torch.equal(prompt_of(tuned), prompt_of(tune(llama, rows, **QUICK)))
    assert "# train_data was in memory" in (tmp_path / "p" / "run.toml").read_text()
    assert tuned.manifest.data["train"]["path"] == "standard input"


def test_a_template_of_own_columns_needs_no_input_column(llama, rows):
    tweets = [{"Tweet text": row["input"], "Label": row["output"], "meta": {"id": 1}} for row in rows]
    tuned = tune(llama, tweets, verbalizer="{{Tweet text}} :", output_field="Label", **QUICK)
    assert evaluate(tuned, tweets).rows == len(rows)
    assert tuned({"Tweet text": "the film was good"}) == tuned("the film was good")


def test_a_frame_of_pandas_trains_as_its_rows(llama, rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    found = tune(llama, frame, frame, **QUICK)
    assert torch.equal(prompt_of(found), prompt_of(tune(llama, rows, rows, **QUICK)))
