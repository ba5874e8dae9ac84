"""What a run says before it starts, what it warns of, and the dry run."""

import logging
import re

import pytest
import torch

from softprompt.backbone import load_base
from softprompt.errors import DataError
from softprompt.training import DryRun, tune
from softprompt.training.loop import duration

QUICK = {"num_epochs": 1, "batch_size": 4, "tuning_config": {"num_virtual_tokens": 2}}


@pytest.fixture(scope="module")
def base():
    """The bundled model, whose tokenizer tells numbers apart."""
    return load_base("demo")


@pytest.fixture
def said(caplog):
    """Tune and return what was logged, the warnings apart."""

    def call(*arguments, **options):
        with caplog.at_level("INFO", "softprompt"):
            tune(*arguments, **(QUICK | options))
        return caplog.messages, [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]

    return call


def sentences(count, word="film"):
    return [{"input": f"{word} {n}", "output": ("yes", "no")[n % 2]} for n in range(count)]


def test_rows_labels_cuts_the_longest_row_and_steps(said, llama, rows, held_out):
    lines, _ = said(llama, rows, held_out, max_source_length=5, num_epochs=2)
    cut = sum(len(row["input"].split()) > 5 for row in rows)
    words = f"22 records, the longest of 7 tokens, {cut / 22:.0%} cut; 8 to validate on; labels: no 11, yes 11"
    assert words in lines
    assert 0 < cut < 22
    assert "12 steps, 6 of them an epoch" in lines


def test_many_labels_are_counted_and_free_text_has_none(said, base):
    many = [{"input": "a film", "output": f"{a} {b}"} for a in ("good", "bad", "fine") for b in "abcd"] * 2
    assert any("labels: 12 of 2 records each" in line for line in said(base, many)[0])
    assert not any("labels:" in line for line in said(base, many[:12])[0][-4:])


class TestWarnings:
    def test_nothing_is_wrong(self, said, llama, rows):
        unseen = [{"input": "poor news", "output": "no"}, {"input": "fine news", "output": "yes"}]
        _, warnings = said(llama, rows, unseen)
        assert [each for each in warnings if "answered" not in each and "learnt" not in each] == []

    @pytest.mark.parametrize(
        ("train", "validation", "options", "words"),
        [
            (sentences(4), sentences(2), {}, "2 of 2 validation records are training records too"),
            (
                sentences(4, "the film was good"),
                None,
                {"max_source_length": 3},
                "100% of the records are cut",
            ),
            ([{"input": f"film {n}", "output": "yes"} for n in range(3)], None, {}, "the same target, 'yes'"),
            (
                [{"input": "film", "output": n % 2} for n in range(6)],
                None,
                {},
                r"numbers \('0', '1'\).*label_names",
            ),
            (
                [{"input": "film", "output": f"LABEL_{n % 2}"} for n in range(6)],
                None,
                {},
                r"numbers .*label_names \(LABEL_0=..., LABEL_1=...\)",
            ),
            (
                sorted(sentences(8), key=lambda row: row["output"]),
                None,
                {"limit": 3},
                "only records beyond the limit have 'yes': the data is sorted",
            ),
            (sentences(8), sentences(9, "news")[::2], {}, "no validation record has 'no': the data is sorted"),
            (
                sentences(4),
                None,
                {"learning_rate": 50.0},
                "learning_rate 50 is far above what suits this",
            ),
            (sentences(4), None, {"learning_rate": 1e-5}, "learning_rate 1e-05 is far below"),
        ],
    )
    def test_what_looks_wrong_is_one(self, said, base, train, validation, options, words):
        found = said(base, train, validation, **options)[1]
        assert len([each for each in found if re.search(words, each)]) == 1

    def test_stars_are_no_ids(self, said, base):
        stars = [{"input": "film", "output": n % 5 + 1} for n in range(10)]
        assert not any("numbers" in each for each in said(base, stars)[1])


class TestNothingLearnt:
    def test_accuracy_not_above_the_commonest_label(self, said, llama, rows, tmp_path):
        held_out = [{"input": f"a report {n}", "output": "yes" if n < 6 else "no"} for n in range(8)]
        lines, _ = said(llama, rows, held_out, learning_rate=1e-6, output=tmp_path / "p")
        assert lines[-1].startswith("the prompt learnt nothing: validation accuracy ")
        assert "is not above 0.750, the share of the commonest label 'yes'" in lines[-1]

    def test_a_loss_that_did_not_fall(self, said, llama, rows):
        texts = [{"input": row["input"], "output": f"news {n}"} for n, row in enumerate(rows)]
        lines, _ = said(llama, texts, task="generation", learning_rate=1e-6, num_epochs=2)
        assert lines[-1].startswith("the prompt learnt nothing: the loss went from ")

    def test_one_that_did_says_nothing(self, llama, rows):
        tuned = tune(llama, rows, **(QUICK | {"num_epochs": 3}))
        assert "nothing_learnt" not in tuned.metrics


class TestDryRun:
    def test_it_says_what_the_run_would_do_and_leaves_nothing(self, llama, rows, tmp_path):
        found = tune(llama, rows, validation_split=0.25, output=tmp_path / "out", dry_run=True, **QUICK)
        assert isinstance(found, DryRun)
        assert not (tmp_path / "out").exists()
        assert found.steps == 4
        assert found.parameters == 2 * 16
        (task,) = found.tasks
        assert (task.records, task.validation_records, task.labels) == (16, 6, {"no": 8, "yes": 8})
        assert found.samples[0]["tokens"] == 6
        assert found.samples[0]["input"].startswith("[2 virtual tokens]the film was")
        assert found.seconds > 0
        assert "nothing was trained and nothing written" in str(found)
        assert found.to_dict()["tasks"][0]["longest"] == task.longest

    def test_the_run_behind_it_is_the_same(self, llama, rows):
        before = tune(llama, rows, **QUICK)
        tune(llama, rows, dry_run=True, **QUICK)
        after = tune(llama, rows, **QUICK)
        assert torch.equal(before.module.embedding.weight, after.module.embedding.weight)

    def test_a_prompt_inside_the_input_is_shown_there(self, llama, rows):
        settings = QUICK | {"tuning_config": {"num_virtual_tokens": 2, "placement": "suffix"}}
        assert tune(llama, rows, dry_run=True, **settings).samples[0]["input"].endswith("[2 virtual tokens]")

    def test_memory_grows_with_the_batch_as_what_is_kept_for_the_gradient_does(self, llama, rows):
        small, large = (tune(llama, rows, dry_run=True, **(QUICK | {"batch_size": n})).memory for n in (2, 16))
        weights = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
        assert weights < small < large
        assert 2 < (large - weights) / (small - weights) < 8

    def test_several_tasks_count_the_steps_of_both_stages(self, llama, rows):
        data = {"a": rows, "b": rows}
        found = tune(llama, data, tuning_type="MULTITASK_PROMPT_TUNING", dry_run=True, **QUICK)
        assert [task.name for task in found.tasks] == ["a", "b"]
        assert found.steps == 11 + 11

    def test_wrong_data_is_found(self, llama):
        with pytest.raises(DataError):
            tune(llama, [{"text": "a"}], dry_run=True)


def test_the_time_of_the_rest_is_told_once_measured(said, llama, rows, monkeypatch):
    monkeypatch.setattr("softprompt.training.loop.WORTH_TELLING", 0)
    lines, _ = said(llama, rows, num_epochs=4)
    assert [line for line in lines if line.endswith(" left for 14 steps, without validation")]


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (600, "10 min"), (7200, "2.0 h")])
def test_a_duration(seconds, text):
    assert duration(seconds) == text
