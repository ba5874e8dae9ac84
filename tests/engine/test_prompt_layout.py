"""Where prompts stand in a batch, held to a loop that places one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.engine import Layout, PromptTable
from softprompt.errors import DataError
from softprompt.prompts import Prompt

H, V, PAD = 3, 50, 0


def table_of(values, choice, **options):
    """Gather rows whose prompts are these values by number, -1 for none."""
    prompts = [Prompt(value) for value in values]
    return PromptTable.of([None if c < 0 else prompts[c] for c in choice], **options)


@dataclass
class Batch:
    mask: torch.Tensor
    prompts: PromptTable
    rows: list[list[int]]  # table rows of each batch row's prompt
    leads: list[int]
    at: list[int]
    ends: list[int]  # padding behind


@st.composite
def batches(draw, placed=False):
    """Rows of one batch: padding before, real tokens, padding behind, and a prompt of 0 to 4 rows."""
    total = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    values = [torch.randn(size, H) for size in sizes]
    mask, choice, leads, at, ends = [], [], [], [], []
    for _ in range(draw(st.integers(1, 5))):
        real = draw(st.integers(1, total))
        lead = draw(st.integers(0, total - real))
        mask.append([0] * lead + [1] * real + [0] * (total - lead - real))
        leads.append(lead)
        at.append(draw(st.integers(0, real)) if placed else 0)
        ends.append(total - lead - real)
        choice.append(draw(st.integers(-1, len(sizes) - 1)))
    prompts = table_of(values, choice, at=at)
    used = list(dict.fromkeys(c for c in choice if c >= 0))
    first = {c: sum(sizes[u] for u in used[: used.index(c)]) for c in used}
    rows = [list(range(first[c], first[c] + sizes[c])) if c >= 0 else [] for c in choice]
    return Batch(torch.tensor(mask), prompts, rows, leads, at, ends)


def placed(batch, *, compact):
    """Return, for each row, its columns as ("text", t), ("slot", n) or None, one at a time."""
    total, width = batch.mask.shape[1], max(len(rows) for rows in batch.rows)
    result = []
    for rows, lead, at in zip(batch.rows, batch.leads, batch.at, strict=True):
        columns = [None] * (width + total)
        begin = 0 if compact else width + lead - len(rows)
        text = [("text", t) for t in range(lead, total)]
        virtual = [("slot", row) for row in rows]
        for offset, column in enumerate([*text[:at], *virtual, *text[at:]]):
            columns[begin + offset] = column
        result.append(columns)
    return result


def filled(batch, columns, text, slot, fill):
    """Return the grid of columns with values from ``text(b, t)`` and ``slot(n)``."""
    return [
        [fill if c is None else (text(b, c[1]) if c[0] == "text" else slot(c[1])) for c in row]
        for b, row in enumerate(columns)
    ]


@pytest.mark.parametrize("compact", [False, True])
@given(batch=batches(placed=True))
@settings(max_examples=80)
def test_against_a_loop(batch, compact):
    layout = Layout.of(batch.mask, batch.prompts, compact=compact)
    columns = placed(batch, compact=compact)
    count, total = batch.mask.shape
    ids = torch.arange(count * total).reshape(count, total) % V
    embeds = torch.randn(count, total, H)
    table = batch.prompts.table

    def mask(b, t):
        return batch.mask[b, t].item()

    assert layout.mask.tolist() == filled(batch, columns, mask, lambda n: 1, 0)
    assert layout.mask.dtype is batch.mask.dtype
    expected = filled(batch, columns, lambda b, t: ids[b, t].item(), lambda n: V + n, PAD)
    assert layout.ids(ids, V, PAD).tolist() == expected
    assert layout.spread(ids, -7).tolist() == filled(
        batch, columns, lambda b, t: ids[b, t].item(), lambda n: -7, -7
    )
    rows = layout.embeds(embeds, table)
    for b, row in enumerate(columns):
        for w, column in enumerate(row):
            if column is not None:
                kind, index = column
                assert torch.equal(rows[b, w], embeds[b, index] if kind == "text" else table[index])


@given(batch=batches())
@settings(max_examples=80)
def test_what_callers_rely_on(batch):
    layout = Layout.of(batch.mask, batch.prompts)
    width, total = batch.prompts.width, batch.mask.shape[1]
    assert layout.prompt_width == width
    assert layout.mask.shape == (len(batch.rows), width + total)
    for b, (rows, lead) in enumerate(zip(batch.rows, batch.leads, strict=True)):
        real = int(batch.mask[b].sum())
        assert layout.text[b, width + lead :].tolist() == list(range(lead, total))
        ones = layout.mask[b].nonzero()[:, 0].tolist()
        assert len(ones) == real + len(rows)
        assert ones == list(range(ones[0], ones[0] + len(ones)))
        positions = layout.positions()[b]
        assert positions[layout.mask[b].bool()].tolist() == list(range(len(ones)))
        assert int(positions.min()) >= 0


@given(batch=batches())
@settings(max_examples=40)
def test_the_compact_form_starts_at_the_first_column(batch):
    layout = Layout.of(batch.mask, batch.prompts, compact=True)
    assert layout.is_plain
    for b, rows in enumerate(batch.rows):
        real = int(batch.mask[b].sum()) + len(rows)
        assert layout.mask[b].tolist() == [1] * real + [0] * (layout.mask.shape[1] - real)


@given(batch=batches())
@settings(max_examples=40)
def test_given_positions_move_behind_the_prompt(batch):
    layout = Layout.of(batch.mask, batch.prompts)
    given_positions = torch.arange(batch.mask.shape[1]).unsqueeze(0) * 3
    positions = layout.positions(given_positions)
    for b, rows in enumerate(batch.rows):
        text = layout.text[b] >= 0
        expected = given_positions[0, layout.text[b][text]] + len(rows)
        assert torch.equal(positions[b][text], expected)
        assert positions[b][layout.slot[b] >= 0].tolist() == list(range(len(rows)))


@pytest.mark.parametrize("compact", [False, True])
@given(batch=batches(placed=True))
@settings(max_examples=60)
def test_positions_count_in_the_order_of_the_row(batch, compact):
    layout = Layout.of(batch.mask, batch.prompts, compact=compact)
    given_positions = torch.arange(batch.mask.shape[1]).unsqueeze(0) * 3
    moved = layout.positions(given_positions)
    for b, rows in enumerate(batch.rows):
        real = layout.mask[b].bool()
        assert layout.positions()[b][real].tolist() == list(range(int(real.sum())))
        for column in real.nonzero()[:, 0].tolist():
            text = int(layout.text[b, column])
            behind = text - batch.leads[b] >= batch.at[b]
            if text >= 0:
                assert int(moved[b, column]) == 3 * text + (len(rows) if behind else 0)


@given(batch=batches(placed=True))
@settings(max_examples=40)
def test_text_first_keeps_the_positions_of_the_place(batch):
    layout = Layout.of(batch.mask, batch.prompts, text_first=True)
    inside = Layout.of(batch.mask, batch.prompts)
    for b in range(len(batch.rows)):
        for name in ("text", "slot"):
            ours, theirs = (
                {
                    int(where): int(position)
                    for where, position, real in zip(
                        getattr(each, name)[b], each.positions()[b], each.mask[b], strict=True
                    )
                    if where >= 0 and real
                }
                for each in (layout, inside)
            )
            assert ours == theirs


def test_a_prompt_behind_more_tokens_than_there_are():
    prompts = table_of([torch.randn(2, H)], [0, 0], at=[1, 3])
    with pytest.raises(DataError, match="row 1 has 2 tokens, but its prompt should stand behind 3"):
        Layout.of(torch.tensor([[1, 1, 1], [0, 1, 1]]), prompts)


def test_holes_count_for_nothing_before_a_prompt():
    prompts = table_of([torch.randn(1, H)], [0], at=[2])
    layout = Layout.of(torch.tensor([[0, 1, 0, 1, 1]]), prompts)
    assert layout.text.tolist() == [[-1, 1, 2, 3, -1, 4]]


def test_holes_inside_a_row_stay_masked():
    prompts = table_of([torch.randn(2, H)], [0])
    layout = Layout.of(torch.tensor([[0, 1, 0, 1, 0]]), prompts)
    assert layout.mask.tolist() == [[0, 1, 1, 1, 0, 1, 0]]
    assert layout.positions()[0][layout.mask[0].bool()].tolist() == [0, 1, 2, 3]


def test_a_row_without_real_tokens_holds_its_prompt_alone():
    prompts = table_of([torch.randn(2, H)], [0, -1])
    layout = Layout.of(torch.zeros(2, 3, dtype=torch.long), prompts)
    assert layout.mask.sum(1).tolist() == [2, 0]


def test_padding_before_a_prompt_can_be_limited():
    prompts = table_of([torch.randn(2, H)], [0])
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    assert Layout.of(mask, prompts).slot.tolist() == [[-1, -1, -1, 0, 1, -1, -1]]
    limited = Layout.of(mask, prompts, lead_limit=2)
    assert limited.slot.tolist() == [[-1, -1, 0, 1, -1, -1, -1]]
    assert limited.mask.tolist() == [[0, 0, 1, 1, 0, 1, 1]]


def test_prompts_no_row_uses_stay_out_of_the_table():
    values = [torch.full((size, H), float(size)) for size in (1, 2, 3)]
    prompts = table_of(values, [2, -1, 0, 2])
    assert prompts.table[:, 0].tolist() == [3, 3, 3, 1]
    assert prompts.starts.tolist() == [0, 0, 3, 0]
    assert prompts.lengths.tolist() == [3, 0, 1, 3]
    assert prompts.width == 3


def test_no_prompt_at_all():
    prompts = table_of([torch.randn(2, H)], [-1, -1])
    assert (prompts.width, prompts.table.numel()) == (0, 0)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    layout = Layout.of(mask, prompts)
    assert layout.mask.tolist() == mask.tolist()
    embeds = torch.randn(2, 3, H)
    assert torch.equal(layout.embeds(embeds, prompts.table), embeds)


def test_repeated_rows_keep_their_prompts():
    prompts = table_of([torch.randn(2, H), torch.randn(1, H)], [0, 1], at=[3, 0]).repeated(6)
    assert prompts.at.tolist() == [3, 3, 3, 0, 0, 0]
    assert prompts.lengths.tolist() == [2, 2, 2, 1, 1, 1]
    assert prompts.starts.tolist() == [0, 0, 0, 2, 2, 2]


def test_embeddings_keep_their_dtype_and_the_prompt_its_gradient():
    table = torch.randn(2, H, requires_grad=True)
    prompts = table_of([table], [0, -1])
    layout = Layout.of(torch.ones(2, 3, dtype=torch.long), prompts)
    rows = layout.embeds(torch.randn(2, 3, H, dtype=torch.bfloat16), prompts.table)
    assert rows.dtype is torch.bfloat16
    rows.float().sum().backward()
    assert table.grad.tolist() == [[1.0] * H] * 2
