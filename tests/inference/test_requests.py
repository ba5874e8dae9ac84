from __future__ import annotations

import pytest

from softprompt.data import Verbalizer
from softprompt.errors import DataError, TemplateError
from softprompt.inference import fields_of
from softprompt.inference.inputs import listed


def test_a_bare_text_is_the_only_field_whatever_its_name():
    assert fields_of("hi", ("tweet",)) == {"tweet": "hi"}


def test_a_bare_text_for_several_fields_names_them():
    with pytest.raises(TemplateError, match="fields premise, claim"):
        fields_of("hi", ("premise", "claim"))


def test_a_mapping_gives_the_fields_and_may_hold_more():
    assert fields_of({"a": "x", "b": 3, "z": []}, ("b", "a")) == {"b": "3", "a": "x"}


def test_a_field_that_only_decides_over_a_section_is_read():
    template = Verbalizer("{{#vip}}Dear {{/vip}}{{input}} :")
    for given, shown in (({"input": "x", "vip": "yes"}, "Dear x :"), ({"input": "x"}, "x :"), ("x", "x :")):
        assert template.render(fields_of(given, template.fields, template.optional)) == shown


def test_text_stands_in_for_input_as_in_data_files():
    assert fields_of({"text": "x"}, ("input",)) == {"input": "x"}
    assert fields_of({"text": "x", "input": "y"}, ("input",)) == {"input": "y"}


def test_missing_fields_are_named():
    with pytest.raises(TemplateError, match=r"expects the fields a, b, got a; add b$"):
        fields_of({"a": "x"}, ("a", "b"))


@pytest.mark.parametrize("value", [None, ["x"], b"x"])
def test_a_value_that_is_no_text_is_refused(value):
    with pytest.raises(DataError, match="field 'a' expects"):
        fields_of({"a": value}, ("a",))


def test_something_else_is_refused():
    with pytest.raises(DataError, match="got int"):
        fields_of(3, ("a",))


def test_one_request_or_several():
    assert listed("ab") == ["ab"]
    assert listed({"a": "b"}) == [{"a": "b"}]
    assert listed(x for x in ("a", "b")) == ["a", "b"]
