"""Training beside other cartridges: what stands before the prompt, when, and that only the prompt learns."""

from __future__ import annotations

import pytest
import torch

from distillation.conftest import TEXT
from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.artifacts import load_adapter
from softprompt.backbone import load_base
from softprompt.distillation import DistillSettings, Teacher, distill
from softprompt.engine import EngineRow, build_engine
from softprompt.errors import ConfigError, FingerprintError
from softprompt.prompts import Prompt
from softprompt.training import TopDivergence, TopTargets

QUICK = {"num_virtual_tokens": 4, "max_source_length": 48, "max_target_length": 6, "silence_progress_bars": True}
KV = {**QUICK, "kind": "kv", "num_epochs": 1, "report": False}


def drawn(shape, tokens, seed):
    size = (shape.layers, 2, shape.heads, tokens, shape.width)
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * 0.5


def test_a_distractor_stands_before_the_prompt_in_about_half_of_the_batches():
    base = load_base("demo")
    engine, shape = build_engine(base), base.key_value_shape
    own, other = drawn(shape, 3, 1).requires_grad_(), drawn(shape, 2, 2).requires_grad_()
    prompt, target = Prompt(prefix=own), (7, 8)
    rows = [EngineRow((5, n), target, prompt) for n in range(20, 44)]
    taught = {(row.source, row.target): TopTargets.of(torch.zeros(2, 50), 3) for row in rows}

    def loss(which, distractors):
        return TopDivergence(engine, taught, {}, distractors)([which], [0]).loss

    beside = [EngineRow(row.source, target, Prompt(prefix=torch.cat([other, own], dim=3))) for row in rows]
    losses = [loss(row, (other.detach(),)) for row in rows]
    alone = [loss(row, ()).item() for row in rows]
    both = [loss(row, ()).item() for row in beside]
    kinds = ["alone" if each.item() == one else "both" for each, one in zip(losses, alone, strict=True)]
    wanted = [one if kind == "alone" else two for kind, one, two in zip(kinds, alone, both, strict=True)]
    assert [each.item() for each in losses] == pytest.approx(wanted, rel=1e-5)
    assert 4 < kinds.count("both") < 20
    losses[kinds.index("both")].backward()
    assert own.grad is not None and other.grad is None


@pytest.fixture(scope="module")
def other(chat_base, tmp_path_factory):
    """A cartridge of another text."""
    folder = tmp_path_factory.mktemp("other") / "cartridge"
    distill(
        chat_base,
        documents=[TEXT],
        questions=[{"input": "is it late"}, {"input": "good or bad"}],
        output=folder,
        **KV,
    )
    return folder


def test_a_cartridge_is_trained_beside_another(chat_base, asked, other):
    before = load_adapter(other).values.clone()
    options = {**KV, "num_epochs": 2, "batch_size": 2}
    alone = distill(chat_base, documents=[TEXT[::-1]], questions=asked, **options)
    beside = distill(chat_base, documents=[TEXT[::-1]], questions=asked, distractors=[other], **options)
    assert not torch.equal(alone.module.weight, beside.module.weight)
    assert torch.equal(load_adapter(other).values, before)
    assert beside.whole.settings["distillation"]["distractors"] == [str(other)]


def test_what_cannot_stand_beside_it_is_refused_before_a_question_is_answered(
    chat_base, asked, other, tmp_path, monkeypatch
):
    with pytest.raises(ConfigError, match="distractors would be ignored"):
        DistillSettings.from_dict({"distractors": ["x"]})
    tokens = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_base(chat_base).model, tokens).save_pretrained(tmp_path / "tokens")
    wider = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_base("demo").model, wider).save_pretrained(tmp_path / "wider")
    (tmp_path / "wider" / "softprompt.json").unlink(missing_ok=True)  # another library's says nothing of its base
    monkeypatch.setattr(Teacher, "answered", lambda *_: pytest.fail("the teacher answered"))
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"tokens is PROMPT_TUNING; give prompts that distill made with kind kv"):
        distill(chat_base, documents=[TEXT], questions=asked, distractors=(tmp_path / "tokens",), output=out, **KV)
    with pytest.raises(ConfigError, match=r"expected .* \[\d, 2, \d, P, \d+\], .*wider is PREFIX_TUNING \[\d, 2, "):
        distill(chat_base, documents=[TEXT], questions=asked, distractors=(tmp_path / "wider",), output=out, **KV)
    with pytest.raises(FingerprintError):
        distill("demo", documents=[TEXT], questions=asked, distractors=other, output=out, **KV)
    assert not out.exists()
