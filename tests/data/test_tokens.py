from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data import CutSummary, Record, RowTokenizer, SpecialFrame, TokenRow, Verbalizer
from softprompt.errors import BackboneError, ConfigError, DataError, TemplateError

CAUSAL = ["gpt2", "llama", "llama+eos", "bert", "demo", "stories260K"]
SEQ2SEQ = ["t5", "bart", "byt5", "g2p"]
TEMPLATE = "Message: {{input}}\nIs this a complaint? answer:"


def row_of(rows, record):
    return rows.tokenize([record])[0][0]


def rows_of(tokenizer, template=TEMPLATE, *, source=256, target=128, seq2seq=False):
    return RowTokenizer(
        tokenizer,
        Verbalizer(template),
        max_source_length=source,
        max_target_length=target,
        seq2seq=seq2seq,
    )


def words(count):
    return " ".join(["parcel"] * count)


@pytest.mark.parametrize("name", CAUSAL)
class TestCausal:
    def test_one_bos_where_the_tokenizer_adds_one(self, tokenizers, name):
        tokenizer = tokenizers(name)
        row = row_of(rows_of(tokenizer), Record({"input": "the parcel"}, "complaint"))
        expected = {"gpt2": None, "bert": tokenizer.cls_token_id}.get(name, tokenizer.bos_token_id)
        if expected is None:
            assert tokenizer.bos_token_id not in row.source + row.target[:-1]
        else:
            assert row.source[0] == expected
            assert (row.source + row.target).count(expected) == 1

    def test_eos_ends_the_target_and_nothing_else(self, tokenizers, name):
        tokenizer = tokenizers(name)
        row = row_of(rows_of(tokenizer), Record({"input": "the parcel"}, "complaint"))
        if tokenizer.eos_token_id is None:
            assert tokenizer.sep_token_id not in row.source + row.target
        else:
            assert (row.source + row.target).count(tokenizer.eos_token_id) == 1
            assert row.target[-1] == tokenizer.eos_token_id

    @pytest.mark.parametrize("tail", ["answer:", "answer: ", "answer:\n", "answer:\n  "])
    def test_target_ids_continue_the_source_naturally(self, tokenizers, name, tail):
        tokenizer = tokenizers(name)
        rows = rows_of(tokenizer, "{{input}} " + tail)
        target = rows.target("no complaint")
        text = "the parcel " + tail.rstrip(" ") + ("" if "\n" in tail else " ") + "no complaint"
        natural = tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = [i for i in target if i != tokenizer.eos_token_id]
        assert natural[-len(plain) :] == plain
        source, _ = rows.source({"input": "the parcel"})
        start = len(source) - (len(natural) - len(plain))
        assert list(source[start:]) + plain == natural

    def test_decoding_a_target_gives_its_text(self, tokenizers, name):
        rows = rows_of(tokenizers(name))
        assert rows.decode(rows.target("no complaint")) == "no complaint"

    def test_target_does_not_depend_on_the_record(self, tokenizers, name):
        rows = rows_of(tokenizers(name), "{{input}}")
        examples = [Record({"input": text}, "complaint") for text in ("", " ", "a\n", "late (", ":")]
        targets = {row.target for row in rows.tokenize(examples)[0]}
        assert targets == {rows.label("complaint")}

    def test_special_tokens_in_the_data_are_characters(self, tokenizers, name):
        tokenizer = tokenizers(name)
        mark = tokenizer.eos_token or tokenizer.sep_token
        mark_id = tokenizer.convert_tokens_to_ids(mark)
        row = row_of(rows_of(tokenizer), Record({"input": f"a {mark} b"}, f"c {mark} d"))
        expected = 0 if tokenizer.eos_token_id is None else 1
        assert (row.source + row.target).count(mark_id) == expected


@pytest.mark.parametrize("name", SEQ2SEQ)
class TestSeq2Seq:
    def test_source_and_target_are_the_tokenizers_own(self, tokenizers, name):
        tokenizer = tokenizers(name)
        rows = rows_of(tokenizer, "{{input}}", seq2seq=True)
        row = row_of(rows, Record({"input": "the parcel"}, "late"))
        assert list(row.source) == tokenizer("the parcel")["input_ids"]
        assert list(row.target) == tokenizer(text_target="late")["input_ids"]

    def test_one_eos_each(self, tokenizers, name):
        tokenizer = tokenizers(name)
        rows = rows_of(tokenizer, "{{input}}", source=12, target=5, seq2seq=True)
        row = row_of(rows, Record({"input": words(30)}, words(30)))
        for ids, limit in ((row.source, 12), (row.target, 5)):
            assert ids.count(tokenizer.eos_token_id) == 1
            assert ids[-1] == tokenizer.eos_token_id
            assert len(ids) <= limit
        assert len(row.target) == 5

    def test_decoding_a_target_gives_its_text(self, tokenizers, name):
        rows = rows_of(tokenizers(name), "{{input}}", seq2seq=True)
        assert rows.decode(rows.target("late")) == "late"


def test_seq2seq_tokenizer_without_eos_in_its_frame_still_ends_in_one(tokenizers):
    tokenizer = tokenizers("gpt2")
    rows = rows_of(tokenizer, "{{input}}", seq2seq=True)
    assert rows.target("late")[-1] == tokenizer.eos_token_id
    assert rows.target("late").count(tokenizer.eos_token_id) == 1


def test_pad_equal_to_eos_does_not_hide_the_eos(tokenizers):
    tokenizer = tokenizers("llama")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert rows_of(tokenizer).target("complaint")[-1] == tokenizer.eos_token_id


def test_a_bos_in_the_template_is_not_doubled(tokenizers):
    tokenizer = tokenizers("llama")
    source, _ = rows_of(tokenizer, "<s>the {{input}}").source({"input": "parcel"})
    assert source.count(tokenizer.bos_token_id) == 1


def test_special_tokens_of_the_template_are_special_and_characters_in_values(tokenizers):
    tokenizer = tokenizers("llama")
    rows = rows_of(tokenizer, "{{input}}</s>answer:")
    source, _ = rows.source({"input": "parcel"})
    assert source.count(tokenizer.eos_token_id) == 1
    marked, _ = rows.source({"input": "parcel</s>"})
    assert marked.count(tokenizer.eos_token_id) == 1
    # A space before every text, also behind a special token, is how this tokenizer reads.
    assert tokenizer.decode(list(marked)) == "<s> parcel</s></s> answer:"


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_truncation_keeps_the_templates_own_text(tokenizers, name):
    tokenizer = tokenizers(name)
    seq2seq = name in SEQ2SEQ
    template = "about: {{input}} {{note}} answer:"
    whole = rows_of(tokenizer, template, source=2000, seq2seq=seq2seq)
    empty, _ = whole.source({"input": "", "note": "late"})
    limit = len(empty) + 6
    rows = rows_of(tokenizer, template, source=limit, seq2seq=seq2seq)
    ids, was_cut = rows.source({"input": words(60), "note": "late"})
    assert was_cut
    assert len(ids) <= limit
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    if name != "g2p":  # its alphabet has no space and no colon
        text = text.replace(" :", ":")  # WordPiece splits punctuation off
        assert text.startswith("about: par")
        assert text.rstrip().endswith("late answer:")
    frame = SpecialFrame.of(tokenizer)
    assert ids[: len(frame.prefix)] == frame.prefix
    if seq2seq and frame.suffix:
        assert ids[-len(frame.suffix) :] == frame.suffix


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    value=st.text(alphabet="abc \n.é<s>/", max_size=120),
    other=st.text(alphabet="parcel ", max_size=60),
    room=st.integers(0, 40),
    name=st.sampled_from(["gpt2", "llama", "bert"]),
)
def test_a_cut_source_fits_and_uncut_ones_are_exact(tokenizers, value, other, room, name):
    tokenizer = tokenizers(name)
    template = "about {{input}} and {{other}} answer:"
    own, _ = rows_of(tokenizer, template).source({"input": "", "other": ""})
    rows = rows_of(tokenizer, template, source=len(own) + room)
    fields = {"input": value, "other": other}
    full, _ = rows_of(tokenizer, template, source=10_000).source(fields)
    ids, was_cut = rows.source(fields)
    assert was_cut == (len(full) > len(own) + room)
    assert len(ids) <= len(own) + room
    if not was_cut:
        assert ids == full


def test_the_longest_value_is_cut_first(tokenizers):
    tokenizer = tokenizers("gpt2")
    template = "{{first}} | {{second}} answer:"
    rows = rows_of(tokenizer, template, source=20)
    text = rows.decode(rows.source({"first": words(40), "second": "late reply"})[0])
    assert text.endswith("| late reply answer:")
    assert text.startswith("parcel parcel")


def test_a_template_that_does_not_fit_is_refused_with_the_numbers(tokenizers):
    own = len(rows_of(tokenizers("gpt2")).source({"input": ""})[0])
    assert rows_of(tokenizers("gpt2"), source=own).source({"input": words(9)})[1]
    with pytest.raises(TemplateError, match=rf"takes {own} tokens, max_source_length is {own - 1}"):
        rows_of(tokenizers("gpt2"), source=own - 1)


def test_targets_keep_their_eos_when_cut(tokenizers):
    tokenizer = tokenizers("llama")
    rows = rows_of(tokenizer, target=4)
    row = row_of(rows, Record({"input": "late"}, words(20)))
    assert row.target_cut
    assert len(row.target) == 4
    assert row.target[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="max_target_length is 4; raise it or shorten the label"):
        rows.label(words(20))


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused(tokenizers):
    rows = rows_of(tokenizers("bert"))
    assert rows.labels(["late", "reply"]) == {t: rows.label(t) for t in ("late", "reply")}
    with pytest.raises(DataError, match="labels 'late' and 'LATE' are the same tokens"):
        rows.labels(["late", "reply", "LATE"])


def test_summary_counts_cut_rows_and_dropped_tokens(tokenizers):
    tokenizer = tokenizers("gpt2")
    examples = [
        Record({"input": words(50)}, "late"),
        Record({"input": "late"}, words(9)),
        Record({"input": "late"}, "late"),
    ]
    rows, summary = rows_of(tokenizer, source=30, target=5).tokenize(examples)
    whole, nothing = rows_of(tokenizer).tokenize(examples)
    dropped = sum(len(w.source) + len(w.target) for w in whole) - sum(len(r.source) + len(r.target) for r in rows)
    assert summary == CutSummary(records=3, sources_cut=1, targets_cut=1, tokens_dropped=dropped)
    assert [(r.source_cut, r.target_cut) for r in rows] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert str(summary) == (f"3 records, cut to the length limits: 1 sources, 1 targets ({dropped} tokens dropped)")
    assert str(nothing) == "3 records, none cut"


def test_a_row_without_target_has_none(tokenizers):
    row = row_of(rows_of(tokenizers("gpt2")), Record({"input": "late"}, None))
    assert row == TokenRow(row.source, (), source_cut=False, target_cut=False)


def test_one_row_and_many_rows_agree(tokenizers):
    rows = rows_of(tokenizers("llama"), source=24)
    examples = [Record({"input": words(count)}, "complaint") for count in (0, 1, 3, 30)]
    assert rows.tokenize(examples)[0] == [row_of(rows, example) for example in examples]
    assert rows.tokenize([]) == ([], CutSummary(0, 0, 0, 0))


@pytest.mark.parametrize("option", ["source", "target"])
def test_limits_without_room_are_refused(tokenizers, option):
    with pytest.raises(ConfigError, match=f"max_{option}_length above 1.*got 1"):
        rows_of(tokenizers("llama"), **{option: 1})


def test_a_missing_field_is_refused(tokenizers):
    with pytest.raises(TemplateError, match="unknown field 'input'; known: inputs"):
        rows_of(tokenizers("gpt2")).source({"inputs": "late"})


def test_a_tokenizer_that_reads_a_text_otherwise_between_special_tokens_is_refused():
    def tokenizer(*, text, add_special_tokens, **_):
        return {"input_ids": [[7, 5, 6] if add_special_tokens else [5, 7, 6] for _ in text]}

    with pytest.raises(BackboneError, match=r"into \[7, 5, 6\] with special tokens and \[5, 7, 6\] without"):
        SpecialFrame.of(tokenizer)
