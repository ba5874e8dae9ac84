"""Norms against the vocabulary's, neighbours by distance, and what the parts of each kind of prompt are."""

from __future__ import annotations

import pytest
import torch

from oracles.families import tiny
from oracles.stored import drawn, folder
from oracles.tokenizers import byte_bpe
from softprompt.artifacts import StoredPrompt, load_adapter
from softprompt.backbone import Base
from softprompt.inspection import alike, numbers_of, parts_of, similarity_of
from softprompt.prompts import COLS_KEY, PROMPT_KEY, ROWS_KEY


@pytest.fixture(scope="module", params=["llama", "gemma"])
def base(request):
    """A base whose table is read as it is, and one that scales what it reads."""
    tokenizer = byte_bpe()
    return Base(tiny(request.param, vocab_size=len(tokenizer) + 8), tokenizer)


@torch.no_grad()
def test_norms_and_neighbours_are_those_of_embeddings_as_the_model_reads_them(base):
    known = len(base.tokenizer)
    seen = base.embedding(torch.arange(known)).float()
    values = torch.stack([seen[5] * 1.01, seen.mean(0) * 0.5, seen[9] * 30])
    part = numbers_of(values, base, 3)
    norms = seen.norm(dim=1)
    assert part.shell.shares == pytest.approx([float((norms < n).float().mean()) for n in values.norm(dim=1)])
    assert part.shell.quantiles[0] == pytest.approx(float(norms.min()), rel=1e-5)
    assert part.shell.quantiles[3] == pytest.approx(float(norms.median()), rel=0.02)
    assert part.shell.quantiles[-1] == pytest.approx(float(norms.max()), rel=1e-5)
    distances = (values[:, None] - seen[None]).norm(dim=-1)
    for row, near in zip(distances, part.nearest_euclid, strict=True):
        assert [each.distance for each in near] == pytest.approx(row.sort().values[:3].tolist(), rel=1e-4)
        assert near[0].token_id == int(row.argmin())
    assert part.nearest[0][0].token_id == 5
    assert part.nearest[2][0].token_id == 9
    assert part.geometry.rms_ratio == pytest.approx(
        float(values.norm() / (3 * seen.shape[1]) ** 0.5) / part.geometry.base_rms
    )


def test_cosines_of_each_pair_and_of_evenly_spaced_tokens_of_many():
    values = drawn(1, 3)
    part = numbers_of(values, None, 3)
    expected = torch.nn.functional.cosine_similarity(values[:, None], values[None], dim=-1)
    torch.testing.assert_close(torch.tensor(part.cosines), expected, atol=1e-4, rtol=0)
    assert (part.shell, part.nearest, part.every) == (None, None, 1)
    many = numbers_of(drawn(1, 300), None, 3)
    assert (many.tokens, many.every, len(many.cosines)) == (300, 3, 100)
    assert many.cosines[0][1] == pytest.approx(
        float(torch.cosine_similarity(*drawn(1, 300)[[0, 3]], dim=0)), abs=1e-4
    )


def test_similarity_of_matched_tokens_and_of_other_lengths(tmp_path):
    one, two = drawn(1, 3), drawn(2, 3)
    found = similarity_of(one, two, "one", "two")
    assert found.matched == pytest.approx(float(torch.cosine_similarity(one, two, dim=1).mean()))
    assert found.mean == pytest.approx(float(torch.cosine_similarity(one.mean(0), two.mean(0), dim=0)))
    assert similarity_of(one, drawn(2, 5), "one", "two").matched is None
    stored = load_adapter(folder(tmp_path / "plain", two))
    assert [(each.first, each.mean) for each in alike({"input": two, "decoder": one}, stored, "other")] == [
        ("input", pytest.approx(1))
    ]


def test_the_parts_of_each_kind_of_prompt(tmp_path):
    plain = load_adapter(folder(tmp_path / "plain", drawn(1)))
    assert {name: values.tolist() for name, values in parts_of(plain).items()} == {"input": drawn(1).tolist()}
    both = {"task_type": "SEQ_2_SEQ_LM", "output_model_types": ["ENCODER", "DECODER"], "num_virtual_tokens": 3}
    both["num_transformer_submodules"] = 2
    stored = load_adapter(folder(tmp_path / "both", drawn(1, 6), options=both, seq2seq=True))
    assert {name: len(values) for name, values in parts_of(stored).items()} == {"input": 3, "decoder": 3}
    config = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    assert list(parts_of(StoredPrompt(config, {PROMPT_KEY: drawn(1)}, None, "x"))) == ["keys and values"]


def test_each_task_of_a_multitask_prompt_is_a_part():
    config = {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "num_transformer_submodules": 1,
        "num_tasks": 2,
    }
    cols, rows = drawn(2, 2 * 3, 1).view(2, 3, 1), drawn(3, 2).view(2, 1, 8)
    stored = StoredPrompt(config, {PROMPT_KEY: drawn(1), COLS_KEY: cols, ROWS_KEY: rows}, None, "x")
    parts = parts_of(stored)
    assert list(parts) == ["0", "1"]
    torch.testing.assert_close(parts["1"], drawn(1) * (cols[1] @ rows[1]))


def test_trained_heads_are_no_virtual_tokens(tmp_path):
    stored = load_adapter(folder(tmp_path / "plain", drawn(1)))
    stored.tensors["base_model.score.weight"] = drawn(4)
    assert [tuple(values.shape) for values in parts_of(stored).values()] == [(3, 8)]
