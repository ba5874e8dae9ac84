from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import softprompt
from softprompt.data import PLACEHOLDER, Record, Verbalizer
from softprompt.errors import TemplateError

NAMES = st.text(alphabet="abAB_09", min_size=1, max_size=6)


def test_renders_fields_between_literals():
    verbalizer = Verbalizer("{{title}}: {{input}} Label:")
    assert verbalizer.fields == ("title", "input")
    assert verbalizer.literals == (": ", " Label:")
    assert verbalizer.tail == " Label:"
    assert verbalizer.render({"title": "t", "input": "i", "other": "o"}) == "t: i Label:"


def test_a_value_with_a_placeholder_is_inserted_verbatim():
    assert Verbalizer("{{a}} {{b}}").render({"a": "{{b}}", "b": "{{a}}"}) == "{{b}} {{a}}"


def test_a_repeated_field_is_rendered_each_time():
    verbalizer = Verbalizer("{{a}}{{a}}")
    assert verbalizer.fields == ("a",)
    assert verbalizer.render({"a": "x"}) == "xx"
    assert verbalizer.tail == ""


def test_braces_that_are_no_placeholder_are_literal():
    literal = '{{ b }} {{"c": 1}} {{-d}} {{e}\n}}'
    assert Verbalizer("{ {{a}} " + literal).render({"a": "x"}) == "{ x " + literal
    assert Verbalizer("{{{a}}}").render({"a": "x"}) == "{x}"


@pytest.mark.parametrize("name", ["Tweet text", "review-text", "Age (years)", "Größe", "text.en", "price/€", "a"])
def test_a_name_may_be_that_of_a_column(name):
    verbalizer = Verbalizer(f"{{{{{name}}}}} Label:")
    assert verbalizer.fields == (name,)
    assert verbalizer.render({name: "x"}) == "x Label:"


def test_the_page_finds_the_same_fields():
    page = Path(softprompt.__file__).parent / "server" / "page" / "models.js"
    ours = PLACEHOLDER.pattern.replace("{{", r"\{\{").replace("}}", r"\}\}").replace(r"\"", '"')
    ours = ours.replace(r"\w", r"[\p{L}\p{N}_]")
    text = page.read_text()
    (name,) = re.findall(r"^const NAME = String\.raw`(.*)`;$", text, re.MULTILINE)
    (field,) = re.findall(r'^const FIELD = new RegExp\(String\.raw`(.*)`, "gu"\);$', text, re.MULTILINE)
    assert field.replace("${NAME}", name) == ours


@pytest.mark.parametrize("template", ["", "Text:", "{{}}", "{{-}}", "{{ }}"])
def test_no_placeholder_is_refused(template):
    with pytest.raises(TemplateError, match=r"at least one placeholder such as {{input}}"):
        Verbalizer(template)


@pytest.mark.parametrize("template", ["{{ input }}", "{input}", "{{input }}", "{{input}"])
def test_a_near_miss_is_named(template):
    with pytest.raises(TemplateError, match=r"write {{input}}, two braces and no spaces"):
        Verbalizer(template)


@given(st.lists(st.tuples(st.booleans(), NAMES), min_size=1), st.data())
def test_rendering_agrees_with_joining_the_pieces(pieces, data):
    pieces.append((True, "input"))
    values = {name: data.draw(st.text(max_size=8)) for is_field, name in pieces if is_field}
    template = "".join(f"{{{{{name}}}}}" if is_field else name for is_field, name in pieces)
    expected = "".join(values[name] if is_field else name for is_field, name in pieces)
    verbalizer = Verbalizer(template)
    assert verbalizer.render(values) == expected
    rebuilt = [f"{{{{{s.text}}}}}" if s.is_field else s.text for s in verbalizer.segments]
    assert "".join(rebuilt) == template


class TestCheck:
    examples = (Record({"input": "a", "title": "b"}, "x"), Record({"input": "c"}, "y"))

    def test_fits(self):
        Verbalizer("{{input}}").check(self.examples, "output")
        Verbalizer("{{anything}}").check([])

    def test_unknown_field(self):
        with pytest.raises(TemplateError, match=r"record 1: .*'inptu'; known: input, title .did you mean 'input'"):
            Verbalizer("{{inptu}}").check(self.examples, "output")

    def test_no_input_says_how_to_name_it(self):
        with pytest.raises(
            TemplateError, match=r"'input'; known: Tweet text; name the column of the input with inp"
        ):
            Verbalizer("{{input}}").check([Record({"Tweet text": "a"}, "x")])

    def test_a_field_that_one_row_lacks(self):
        with pytest.raises(TemplateError, match=r"record 2: .*'title'; known: input"):
            Verbalizer("{{input}} {{title}}").check(self.examples, "output")

    @pytest.mark.parametrize(("name", "given"), [("Label", "Label"), ("output", None), ("labels", None)])
    def test_target_field(self, name, given):
        with pytest.raises(TemplateError, match=f"names the target field '{name}'.*input, title"):
            Verbalizer(f"{{{{input}}}} {{{{{name}}}}}").check(self.examples, given)

    def test_an_ordinary_column_called_labels(self):
        examples = [Record({"input": "a", "labels": "b"}, "x")]
        Verbalizer("{{input}} {{labels}}").check(examples)


def test_a_field_that_only_decides_over_a_section_is_one_of_its_fields():
    verbalizer = Verbalizer("{{#vip}}Dear {{/vip}}{{input}} :")
    assert verbalizer.fields == ("input", "vip")
    assert verbalizer.optional == {"vip"}
    records = [Record(fields={"input": "x"}, target="y")]
    verbalizer.check(records)
    with pytest.raises(TemplateError, match="show the answer"):
        Verbalizer("{{#output}}Right {{/output}}{{input}} :").check(records, "output")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{{input}}{{#vip}} Dear{{/vip}}",
            "cannot end in a section, got '{{input}}{{#vip}} Dear{{/vip}}'; put text",
        ),
        (
            "{{^a}}x{{/a}}" * 101 + "{{input}}",
            "expected at most 100 sections in the verbalizer '{{\\^a}}x.{1,60}\\.\\.\\.'",
        ),
    ],
)
def test_a_section_that_cannot_be_is_refused(template, told):
    with pytest.raises(TemplateError, match=told):
        Verbalizer(template)
