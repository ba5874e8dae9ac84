from __future__ import annotations

import datetime
import hashlib
import json
import types
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data import Record, Verbalizer, data_fingerprint, read_records, read_source
from softprompt.errors import ConfigError, DataError, TemplateError


def refused(match, source, **options):
    with pytest.raises(DataError, match=match) as caught:
        read_records(source, **options)
    assert "\n" not in str(caught.value)


class TestPairs:
    def test_input_and_output(self):
        rows = [{"input": "late", "output": "complaint", "id": 7}]
        assert read_records(rows) == [Record({"input": "late", "id": "7"}, "complaint")]

    def test_text_and_labels_with_the_alias_input(self):
        rows = [{"text": "late", "labels": ["complaint", "delivery"]}]
        expected = Record({"text": "late", "input": "late"}, "complaint,delivery")
        assert read_records(rows) == [expected]

    def test_named_columns_may_have_spaces(self):
        rows = [{"Tweet text": "late", "Label": "complaint", "ID": 0}]
        examples = read_records(rows, input_field="Tweet text", output_field="Label")
        assert examples == [Record({"Tweet text": "late", "ID": "0", "input": "late"}, "complaint")]

    def test_input_and_output_win_when_nothing_is_named(self):
        rows = [{"text": "a", "labels": "b", "input": "c", "output": "d"}]
        assert read_records(rows) == [Record({"text": "a", "labels": "b", "input": "c"}, "d")]

    def test_one_name_is_enough_when_the_other_is_clear(self):
        rows = [{"text": "late", "category": 3}]
        assert read_records(rows, output_field="category")[0].target == "3"
        rows = [{"sentence": "late", "labels": "no"}]
        assert read_records(rows, input_field="sentence")[0].fields["input"] == "late"

    @pytest.mark.parametrize(
        ("row", "names"),
        [
            ({"input": "a", "labels": "b"}, "input, labels"),
            ({"input": "a", "label": "b"}, "input, label"),
            ({"input": "x", "text": "a", "label": "b"}, "input, text, label"),
            ({"text": "a", "output": "b"}, "text, output"),
            ({"input": "x", "text": "a", "labels": "b"}, "input, text, labels"),
            ({}, "no fields"),
        ],
    )
    def test_an_open_choice_is_refused_with_the_columns(self, row, names):
        refused(f"record 1: .*got {names}.*input_field and output_field", [row])

    def test_two_candidates_are_refused(self):
        row = {"input": "x", "text": "a", "labels": "b", "output": "c", "sentence": "s", "y": "z"}
        refused("both input and text could be the input", [row], output_field="y")
        del row["input"]
        refused("both output and labels could be the target", [row], input_field="sentence")

    def test_an_alias_over_another_column_is_refused(self):
        row = {"instruction": "a", "input": "b", "output": "c"}
        refused("clashes with the column 'input'", [row], input_field="instruction")

    def test_input_as_target_is_refused(self):
        row = {"input": "a", "output": "c"}
        refused("cannot be input and target", [row], input_field="input", output_field="input")

    @pytest.mark.parametrize("option", ["input_field", "output_field"])
    def test_a_missing_named_field_names_the_nearest(self, option):
        rows = [{"text": "a", "category": "b"}]
        wrong = {"input_field": "txt", "output_field": "categry"}[option]
        right = {"input_field": "text", "output_field": "category"} | {option: wrong}
        hint = {"input_field": "text", "output_field": "category"}[option]
        refused(f"record 1: .*{wrong!r} .*got text, category .did you mean {hint!r}", rows, **right)

    def test_a_misspelt_pair_names_the_nearest(self):
        refused("did you mean 'lable'", [{"text": "a", "lable": "b"}])
        refused("did you mean 'txt'", [{"txt": "a", "lbl": "b"}])
        refused("got input, target; name them", [{"input": "a", "target": "b"}])  # 'target' is no misspelt 'text'

    def test_text_and_label_are_a_pair(self):
        row = {"text": "late", "label": 1}
        assert read_records([row]) == [Record({"text": "late", "input": "late"}, "1")]
        assert read_records([row], require_target=False)[0].target == "1"
        assert read_records([{"sentence": "late", "label": 1}], input_field="sentence")[0].target == "1"
        assert read_records([{"Tweet text": "late", "label": 1}]) == [Record({"Tweet text": "late"}, "1")]
        refused("got text, label, labels.*input_field and output_field", [row | {"labels": [1]}])
        refused("both labels and label could be the target", [row | {"labels": [1]}], input_field="text")


class TestValues:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (3, "3"),
            (2.5, "2.5"),
            (True, "true"),
            ("", ""),
            (np.int64(3), "3"),
            (np.float32(0.5), "0.5"),
        ],
    )
    def test_scalars_become_text(self, value, text):
        assert read_records([{"input": value, "output": "x"}])[0].fields["input"] == text

    def test_integer_targets_become_text(self):
        assert read_records([{"input": "a", "output": 0}])[0].target == "0"

    @pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a", np.array([1, 2])])
    def test_other_values_are_refused(self, value):
        kind = type(value).__name__
        refused(f"record 1: .*field 'input'.*{kind}", [{"input": value, "output": "x"}])

    def test_only_a_labels_column_may_hold_a_list(self):
        refused("record 1: .*'output'.*list", [{"input": "a", "output": ["x"]}])
        refused("record 1: .*'labels'.*dict", [{"text": "a", "labels": [{}]}])

    @pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
    def test_a_target_without_text_is_refused_when_needed(self, value):
        rows = [{"input": "a", "output": "x"}, {"input": "a", "output": value}]
        refused("record 2: expected a value in the field 'output', got", rows)
        assert read_records(rows, require_target=False)[1].target is None

    def test_an_empty_list_of_labels_is_no_target(self):
        refused("record 1: .*'labels'", [{"text": "a", "labels": []}])

    def test_a_null_input_is_refused(self):
        refused("record 1: .*'input', got None", [{"input": None, "output": "x"}])

    def test_a_null_elsewhere_leaves_the_field_out(self):
        rows = [{"input": "a", "note": None, "output": "x"}]
        assert read_records(rows)[0].fields == {"input": "a"}

    def test_a_later_record_without_the_field_is_refused(self):
        rows = [{"input": "a", "output": "x"}, {"inputs": "a", "output": "x"}]
        refused("record 2: expected the field 'input', got inputs, output .did you mean", rows)


class TestWithoutTarget:
    def test_a_target_is_optional(self):
        assert read_records([{"input": "a"}], require_target=False) == [Record({"input": "a"}, None)]

    def test_a_target_that_is_there_is_no_field(self):
        rows = [{"text": "a", "labels": "x"}]
        assert read_records(rows, require_target=False) == [Record({"text": "a", "input": "a"}, "x")]

    def test_a_named_target_may_be_absent(self):
        rows = [{"input": "a"}]
        examples = read_records(rows, output_field="Label", require_target=False)
        assert examples == [Record({"input": "a"}, None)]

    def test_an_open_target_is_not_asked_for(self):
        rows = [{"input": "a", "labels": "b"}]
        assert read_records(rows, require_target=False) == [Record({"input": "a"}, "b")]
        rows = [{"sentence": "a", "output": "b", "labels": "c"}]
        assert read_records(rows, input_field="sentence", require_target=False)[0].target is None

    def test_an_input_may_be_the_templates_business(self):
        rows = [{"Tweet text": "a", "Label": "x"}]
        assert read_records(rows, output_field="Label") == [Record({"Tweet text": "a"}, "x")]
        assert read_records([{"txt": "a"}], require_target=False) == [Record({"txt": "a"}, None)]


class TestMemory:
    def test_iterators_and_tuples(self):
        rows = ({"input": str(n), "output": "x"} for n in range(3))
        assert [e.fields["input"] for e in read_records(rows)] == ["0", "1", "2"]

    def test_no_rows(self):
        refused("expected at least one record, got none", [])

    def test_a_row_that_is_no_record(self):
        refused("record 2: .*the text 'late'", [{"input": "a", "output": "x"}, "late"])
        refused("record 1: .*type int", [1])

    def test_column_names_that_are_no_text(self):
        refused("record 1: .*column names as text, got 0", [{0: "a", 1: "b"}])

    def test_one_record_instead_of_rows(self):
        refused("got one dict; put it into a list", {"input": "a", "output": "x"})

    def test_something_else(self):
        refused("a list of records or a Dataset, got int", 3)

    def test_any_mapping_is_a_record(self):
        row = types.MappingProxyType({"input": "a", "output": "x"})
        assert read_records([row])[0].target == "x"


class TestFingerprint:
    def of(self, source):
        return data_fingerprint(source, list(read_source(source)))

    def test_of_a_file(self, tmp_path):
        path = tmp_path / "train.jsonl"
        path.write_text('{"input": "a", "output": "x"}\n\n{"input": "b", "output": "y"}\n')
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert self.of(path) == {"path": "train.jsonl", "sha256": digest, "rows": 2}

    def test_of_rows_depends_on_their_content_and_order(self):
        rows = [{"input": "a", "output": 1}, {"input": "b", "output": None}]
        first = self.of(rows)
        assert first["path"] == "rows in memory"
        assert first["rows"] == 2
        assert first == self.of([dict(reversed(row.items())) for row in rows])
        assert first != self.of(rows[::-1])
        assert json.dumps(first)


class TestLabelNames:
    names: ClassVar = {"0": "negative", "1": "positive"}

    def test_ids_become_names_and_names_stay(self):
        rows = [{"input": "a", "output": 0}, {"input": "b", "output": "1"}, {"input": "c", "output": "positive"}]
        found = read_records(rows, label_names=self.names)
        assert [each.target for each in found] == ["negative", "positive", "positive"]

    def test_each_of_several_labels(self):
        rows = [{"text": "a", "labels": [0, 1]}]
        assert read_records(rows, label_names=self.names)[0].target == "negative,positive"

    def test_a_target_without_a_name_is_refused_with_its_place(self):
        refused(
            "record 2: the target '2' has no name in label_names, which has 0, 1", self.rows, label_names=self.names
        )

    def test_a_chat_has_no_label_to_name(self):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with pytest.raises(ConfigError, match="label_names would be ignored: the answers are turns of chats"):
            read_records([{"messages": turns}], label_names=self.names)

    rows: ClassVar = [{"input": "a", "output": 0}, {"input": "b", "output": 2}]


class TestColumnsThatAreNoText:
    rows: ClassVar = [{"input": "a", "output": "x", "meta": {"source": [1]}, "day": datetime.date(2024, 5, 1)}]

    def test_block_nothing_and_are_no_fields(self):
        assert read_records(self.rows) == [Record({"input": "a"}, "x")]

    def test_are_named_where_a_template_uses_them(self):
        with pytest.raises(
            TemplateError, match=r"record 1: .*'meta', which holds no text but .* dict; known: input"
        ):
            Verbalizer("{{input}} {{meta}}").check(read_records(self.rows))


@given(st.lists(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | st.lists(st.text()))))
def test_rows_are_read_or_refused_in_one_line(rows):
    try:
        assert len(read_records(rows)) == len(rows)
    except DataError as error:
        assert str(error)
