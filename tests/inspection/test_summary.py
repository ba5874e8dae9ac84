from __future__ import annotations

import json
import math

import pytest
import torch

from softprompt.artifacts import Manifest, StoredPrompt
from softprompt.errors import FingerprintError
from softprompt.inspection import describe
from softprompt.inspection.summary import effective_rank, geometry, mean_pairwise_cosine, rms_of


def stored(prompt, manifest=None, **tensors):
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}
    config |= {"num_virtual_tokens": len(prompt), "base_model_name_or_path": "org/base"}
    return StoredPrompt(config, {"prompt_embeddings": prompt, **tensors}, manifest, "/somewhere")


@pytest.fixture
def manifest():
    return Manifest(
        template="{{input}}",
        task="classification",
        labels=("yes", "no"),
        base_model="demo",
        base_fingerprint={"short": "0123456789ab", "values": [0.5]},
        max_source_length=8,
        max_target_length=4,
        dtype="bfloat16",
        seq2seq=False,
        metrics={"accuracy": 0.9},
        created="2026-11-20T09:00:00+00:00",
    )


def test_geometry_of_known_rows():
    numbers = geometry(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), base_rms=0.5)
    assert numbers.norms == (5.0, 1.0)
    assert (numbers.norm_mean, numbers.norm_min, numbers.norm_max) == (3.0, 1.0, 5.0)
    assert numbers.rms == pytest.approx(math.sqrt(26 / 4))
    assert numbers.rms_ratio == pytest.approx(2 * math.sqrt(26 / 4))
    assert numbers.mean_pairwise_cosine == pytest.approx(0.8)


def test_effective_rank_runs_from_one_to_full():
    row = torch.randn(1, 6)
    assert effective_rank(row.expand(4, 6)) == pytest.approx(1.0, abs=1e-5)
    assert effective_rank(torch.eye(4)) == pytest.approx(4.0)
    assert effective_rank(torch.zeros(3, 4)) == 0.0


def test_mean_pairwise_cosine_against_the_pairs_one_by_one():
    rows = torch.randn(5, 7, dtype=torch.float64)
    pairs = [torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0) for i in range(5) for j in range(i)]
    assert mean_pairwise_cosine(rows) == pytest.approx(float(sum(pairs)) / len(pairs))
    assert mean_pairwise_cosine(rows[:1]) is None
    assert mean_pairwise_cosine(torch.zeros(2, 3)) == 0.0


def test_task_matrices_are_no_heads():
    factors = {"prefix_task_cols": torch.ones(2, 3, 1), "prefix_task_rows": torch.ones(2, 1, 4)}
    summary = describe(stored(torch.ones(3, 4), **factors))
    assert summary.heads == ()
    assert summary.parameters == 3 * 4 + 2 * 3 + 2 * 4


def test_summary_of_a_prompt_with_manifest(manifest, letters):
    head = torch.zeros(2, 4, dtype=torch.float16)
    table = torch.full((6, 4), 0.5, dtype=torch.bfloat16)
    adapter = stored(torch.ones(3, 4), manifest, **{"base_model.score.weight": head})
    summary = describe(adapter, table, letters(6))
    assert (summary.base_model, summary.fingerprint) == ("demo", "0123456789ab")
    assert (summary.task, summary.labels) == ("classification", ("yes", "no"))
    assert (summary.virtual_tokens, summary.rows, summary.width) == (3, 3, 4)
    assert (summary.parameters, summary.bytes) == (3 * 4 + 2 * 4, 3 * 4 * 4 + 2 * 4 * 2)
    assert summary.heads == ("base_model.score.weight",)
    assert summary.geometry.rms_ratio == pytest.approx(2.0)
    assert summary.nearest[0][0].cosine == pytest.approx(1.0)
    assert summary.metrics == {"accuracy": 0.9}
    values = json.loads(json.dumps(summary.to_dict()))
    assert values["geometry"]["norm_mean"] == pytest.approx(2.0)
    assert values["nearest"][0][0]["token"] == summary.nearest[0][0].token


def test_summary_of_a_folder_that_peft_wrote():
    summary = describe(stored(torch.ones(3, 4, dtype=torch.bfloat16)))
    assert summary.base_model == "org/base"
    assert summary.nearest is None
    assert summary.geometry.base_rms is None
    assert summary.template is None
    assert summary.bytes == 3 * 4 * 2
    json.dumps(summary.to_dict())


def test_a_table_of_another_width_is_refused():
    with pytest.raises(FingerprintError, match=r"table 4 wide.*got 5: load the base"):
        describe(stored(torch.ones(3, 4)), torch.ones(6, 5))


def test_keys_and_values_have_no_neighbours_in_the_table(letters):
    adapter = stored(torch.ones(3, 16))
    adapter.config["peft_type"] = "PREFIX_TUNING"
    summary = describe(adapter, torch.ones(6, 4), letters(6))
    assert (summary.nearest, summary.geometry.base_rms) == (None, None)


def test_rms_of_low_precision_is_taken_in_double():
    assert rms_of(torch.full((300, 300), 0.01, dtype=torch.float16)) == pytest.approx(0.01, 1e-3)
