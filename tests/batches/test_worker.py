"""A worker of a batch, and the files of its output, without Ray."""

import json

import pytest

from softprompt import load
from softprompt.batches import BatchTask, BatchWorker, Parts, prompts_in
from softprompt.cli.main import run
from softprompt.errors import OutputExistsError, UsageError


def test_each_record_is_answered_by_the_prompt_its_column_names(prompts, texts):
    asked = BatchTask("generate", prompts_in(str(prompts), "which"), "which", {"max_new_tokens": 5})
    rows = [{"input": text, "which": ("writer", "complaints")[i % 2]} for i, text in enumerate(texts[:6])]
    found = BatchWorker(asked).answer(list(map(json.dumps, rows)), 11)
    assert [each["record"] for each in found] == list(range(11, 17))
    assert [each["prompt"] for each in found] == [row["which"] for row in rows]
    for name in ("writer", "complaints"):
        tuned = load(prompts / name)
        own = [row["input"] for row in rows if row["which"] == name]
        expected = [each.text for each in tuned.generate(own, max_new_tokens=5)]
        assert [each["text"] for each in found if each["prompt"] == name] == expected
    assert all(each["error"] is None for each in found)


def test_a_bad_record_has_an_error_and_the_others_their_answers(prompts, texts):
    long = " ".join(texts) * 8
    lines = [json.dumps({"text": texts[0]}), "{not json", json.dumps({"text": texts[1]}), "[1]", '{"other": 3}']
    lines += [json.dumps({"text": long}), json.dumps({"text": texts[2]})]
    asked = BatchTask("generate", {"writer": str(prompts / "writer")}, options={"max_new_tokens": 240})
    found = BatchWorker(asked).answer(lines, 1)
    errors = {each["record"]: each["error"] for each in found if each["error"]}
    assert errors.keys() == {2, 4, 5} | ({6} if found[5]["error"] else set())
    assert errors[2].startswith("record 2: not valid JSON") and "record 4: expected a record" in errors[4]
    assert "expects the fields input, got other" in errors[5]
    expected = load(prompts / "writer").generate([texts[0], texts[1], texts[2]], max_new_tokens=240)
    assert [found[i]["text"] for i in (0, 2, 6)] == [each.text for each in expected]


def test_what_names_no_prompt_is_an_error_of_its_record(prompts, texts):
    asked = BatchTask("generate", prompts_in(str(prompts), "which"), "which", {"max_new_tokens": 2})
    rows = [{"input": texts[0], "which": name} for name in (["writer"], None, 3, "writter", "writer")]
    errors = [each["error"] for each in BatchWorker(asked).answer(list(map(json.dumps, rows)), 1)]
    assert "got list" in errors[0] and "got NoneType" in errors[1] and "got int" in errors[2]
    assert "did you mean 'writer'" in errors[3] and errors[4] is None


def test_only_the_record_that_the_model_refuses_has_an_error(prompts, texts):
    worker = BatchWorker(BatchTask("classify", {"complaints": str(prompts / "complaints")}))
    rows = [{"input": text} for text in texts[:5]]
    rows[3] = {"input": "x"}
    plain = worker._serving.classify

    def classify(inputs, names, **options):
        if any(each.get("input") == "x" for each in inputs):
            raise UsageError("refused")
        return plain(inputs, names, **options)

    worker._serving.classify = classify
    found = worker.answer(list(map(json.dumps, rows)), 1)
    assert [each["error"] for each in found] == [None, None, None, "refused", None]
    own = load(prompts / "complaints").classify([text for i, text in enumerate(texts[:5]) if i != 3])
    assert [each["label"] for each in found if not each["error"]] == [each.label for each in own]


def test_parts_are_read_as_they_were_written_in_both_formats(tmp_path):
    rows = [
        {"record": 1, "label": "a", "probabilities": {"a": 0.75, "b": 0.25}, "error": None},
        {"record": 2, "error": "too long: é\u2028\x85"},  # which end lines, but none of JSON
    ]
    for form in ("jsonl", "parquet"):
        parts = Parts.planned(tmp_path / form, form, {"n": (1, 2)}, resume=False)
        parts.begin({"n": (1, 2)})
        parts.write(1, rows[1:])
        parts.write(0, rows[:1])
        found = [{name: value for name, value in row.items() if value is not None} for row in parts.rows()]
        assert found == [{name: value for name, value in row.items() if value is not None} for row in rows]
        assert (parts.has(1), parts.has(2)) == (True, False)


def test_a_batch_is_resumed_as_it_was_begun_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="nothing to resume"):
        Parts.planned(out, "jsonl", {"part_size": 4}, resume=True)
    planned = Parts.planned(out, "jsonl", {"part_size": 4}, resume=False)
    assert not out.exists()
    planned.begin({"part_size": 4})
    with pytest.raises(OutputExistsError, match="holds a batch; continue it with --resume"):
        Parts.planned(out, "jsonl", {"part_size": 4}, resume=False)
    with pytest.raises(UsageError, match="has part_size 4, not 5"):
        Parts.planned(out, "jsonl", {"part_size": 5}, resume=True)
    Parts.planned(out, "jsonl", {"part_size": 4}, resume=True)


def test_an_output_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="holds files of something else; name another output"):
        Parts.planned(tmp_path, "jsonl", {}, resume=False)
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match=r"notes\.txt is a file"):
            Parts.planned(tmp_path / "notes.txt", "jsonl", {}, resume=resume)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "P", "--text", "x", "--part-size", "3"], "--part-size would be ignored without --ray"),
        (["classify", "P", "--ray"], "--ray needs --data"),
        (["classify", "P", "Q", "--ray", "--data", "d", "--output", "o"], "--ray takes one prompt"),
        (["classify", "P", "--ray", "--data", "d", "--output", "o", "--combine", "vote"], "--combine would be"),
        (["evaluate", "P", "--ray", "--data", "d", "--output", "o", "--limit", "3"], "--limit would be ignored"),
        (["generate", "P", "--ray", "--data", "d", "--output", "o", "--batch-size", "3"], "--batch-size would be"),
    ],
)
def test_what_a_batch_cannot_have_is_refused_in_one_line(words, said, capsys):
    assert run(words) == 2
    assert said in capsys.readouterr().err
