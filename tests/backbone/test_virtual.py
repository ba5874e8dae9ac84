"""The hook that turns ids from V on into prompt rows, and nothing else."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from oracles.families import causal
from softprompt.backbone import VirtualVocabulary

V, H = 6, 4


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(V, H)


def test_idle_it_changes_nothing(table):
    ids = torch.tensor([[0, 5, 2]])
    before = table(ids)
    VirtualVocabulary([table])
    assert torch.equal(table(ids), before)
    with pytest.raises(IndexError):
        table(torch.tensor([V]))


def test_lent_rows_have_the_ids_behind_the_table(table):
    vocabulary, rows = VirtualVocabulary([table]), torch.randn(3, H)
    with vocabulary.inject(rows):
        out = table(torch.tensor([[V + 2, 1, V], [0, V + 1, 5]]))
    weight = table.weight
    expected = torch.stack([rows[2], weight[1], rows[0], weight[0], rows[1], weight[5]]).reshape(2, 3, H)
    assert torch.equal(out, expected)


def test_rows_get_gradients_only_from_their_ids(table):
    vocabulary, rows = VirtualVocabulary([table]), torch.randn(3, H, requires_grad=True)
    table.requires_grad_(False)
    with vocabulary.inject(rows):
        table(torch.tensor([0, V, V, 3])).sum().backward()
    assert rows.grad.tolist() == [[2.0] * H, [0.0] * H, [0.0] * H]
    assert table.weight.grad is None


def test_text_in_front_of_lent_rows_is_bit_identical(table):
    vocabulary, ids = VirtualVocabulary([table]), torch.tensor([[0, 5, 2]])
    before = table(ids)
    with vocabulary.inject(torch.randn(1, H)):
        assert torch.equal(table(ids), before)


def test_lending_nests(table):
    vocabulary = VirtualVocabulary([table])
    outer, inner = torch.zeros(1, H), torch.ones(1, H)
    ids = torch.tensor([V])
    with vocabulary.inject(outer):
        with vocabulary.inject(inner):
            assert torch.equal(table(ids), inner)
        assert torch.equal(table(ids), outer)
        with vocabulary.inject(None), pytest.raises(IndexError):
            table(ids)
        assert torch.equal(table(ids), outer)


def test_an_exception_inside_gives_the_rows_back(table):
    vocabulary = VirtualVocabulary([table])
    with pytest.raises(KeyError), vocabulary.inject(torch.zeros(1, H)):
        raise KeyError
    assert vocabulary.virtual_tokens is None
    with pytest.raises(IndexError):
        table(torch.tensor([V]))


def test_after_a_failed_lookup_the_next_one_is_right(table):
    vocabulary, rows = VirtualVocabulary([table]), torch.zeros(1, H)
    with pytest.raises(IndexError), vocabulary.inject(rows):
        table(torch.tensor([V, -100]))
    with vocabulary.inject(rows):
        assert torch.equal(table(torch.tensor([V])), rows)
    assert torch.equal(table(torch.tensor([1])), table.weight[1:2])


def test_removed_it_is_gone(table):
    vocabulary = VirtualVocabulary([table])
    vocabulary.remove()
    assert not table._forward_hooks
    assert not table._forward_pre_hooks
    with vocabulary.inject(torch.zeros(1, H)), pytest.raises(IndexError):
        table(torch.tensor([V]))


def test_a_model_is_bit_identical_while_idle_and_after(table):
    model, ids = causal("gemma"), torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    vocabulary = VirtualVocabulary([model.get_input_embeddings()])
    assert torch.equal(model(ids).logits, before)
    vocabulary.remove()
    assert torch.equal(model(ids).logits, before)


def test_a_scale_inside_the_embedding_is_bypassed():
    model = causal("gemma")
    table = model.get_input_embeddings()
    vocabulary, rows = VirtualVocabulary([table]), torch.ones(1, 32)
    with vocabulary.inject(rows):
        out = table(torch.tensor([64, 5]))
    assert torch.equal(out[0], rows[0])
    assert not torch.equal(out[1], table.weight[5])


def test_rows_take_the_dtype_of_the_table():
    table = nn.Embedding(V, H, dtype=torch.bfloat16)
    with VirtualVocabulary([table]).inject(torch.full((1, H), 0.1)):
        out = table(torch.tensor([V, 0]))
    assert out.dtype is torch.bfloat16
    assert out[0, 0] == torch.tensor(0.1, dtype=torch.bfloat16)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_are_independent(how, table):
    owner = nn.Module()
    owner.table = table
    owner.vocabulary = VirtualVocabulary([table])
    if how == "copy":
        other = copy.deepcopy(owner)
    else:
        buffer = io.BytesIO()
        torch.save(owner, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    rows = torch.ones(1, H)
    with other.vocabulary.inject(rows):
        assert torch.equal(other.table(torch.tensor([V])), rows)
        with pytest.raises(IndexError):
            owner.table(torch.tensor([V]))
    other.vocabulary.remove()
    assert not other.table._forward_hooks
    assert owner.table._forward_hooks
