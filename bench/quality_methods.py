"""Methods of `quality.py`: each runs one cell and returns what the tuned model did on the test rows.

PEFT's recipes (its starts; AdamW with torch's weight decay, linear decay without warm-up, no clipping) run in this
package's engine, which computes the same losses several times faster; the method ``peft-real`` runs a cell through
the installed peft on the same batches and says how far its losses are away.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from torch import Tensor, nn

import softprompt
from quality_pairs import Pair
from real_data import Split
from softprompt.backbone import Base
from softprompt.errors import ContextOverflowError
from softprompt.training import TuneSettings
from softprompt.training.examples import read_data
from softprompt.training.objectives import LabelChoice
from softprompt.training.preparation import prepare
from softprompt.training.session import stages_of
from softprompt.training.stage import Stage

NOTEBOOK = {"warmup_ratio": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.01, "choice_weight": 0.0}
"""How PEFT's example notebooks for prompt tuning train: torch's AdamW, linear decay, no warm-up, no clipping."""

STARTS = {"N(0,1)": "STANDARD_NORMAL", "WORDS": "TEXT"}
"""What is called otherwise in `tune`: PEFT's RANDOM, and a text of the template's words and the labels."""

CHOICE = "choice_weight=1"
"""That LoRA and full fine-tuning learn the choice among the labels too, which is our default."""

MIXED = 128
"""Embeddings of the vocabulary that `superpos` mixes."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        pair: What is tuned on what.
        method: One of zero-shot, few-shot, peft, peft-real, ours, superpos, prefix, cartridge, lora, full.
        init: What the prompt starts from.
        rate: Peak rate: in units of the embeddings' rms for ours and SuperPos, absolute for all others.
        seed: Of the start and of the order of the rows.
        more: Other settings of `tune`, as a text of ``name=value``.
    """

    pair: Pair
    method: str
    init: str = ""
    rate: float | None = None
    seed: int = 73
    more: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a result is found again by."""
        return self.pair.base, self.pair.data, self.method, self.init, self.rate, self.seed, self.more


@dataclass(frozen=True)
class Found:
    """What a cell came to: the score, the mean loss of a test row, and which rows were right (1) or not (0)."""

    score: float
    loss: float
    hits: str = ""
    train_loss: float | None = None
    rate: float | None = None
    note: str = ""


def run(cell: Cell, base: Base, split: Split) -> Found:
    """Run a cell of a causal or seq2seq base."""
    if cell.method == "zero-shot":
        return _measured(cell, _bare(cell, base, split), split)
    if cell.method == "few-shot":
        return _shown(cell, base, split, cell.pair.shots)
    if cell.method in ("lora", "full"):
        return _weights(cell, base, split)
    if cell.method == "peft-real":
        return _real_peft(cell, base, split)
    options = _settings(cell, base, split)
    try:
        prompt = softprompt.tune(base, split.train, seed=cell.seed, **options)
    except ContextOverflowError:
        if "demonstrations" not in options:
            raise
        fewer = replace(cell, more=f"demonstrations={options['demonstrations'] // 2}")
        return run(fewer, base, split)
    found = _measured(cell, prompt, split)
    note = cell.more if "demonstrations" in options else found.note
    return replace(found, train_loss=prompt.metrics["loss"], rate=prompt.metrics["learning_rate"], note=note)


def _settings(cell: Cell, base: Base, split: Split) -> dict[str, Any]:
    """Return the settings of `tune` that a cell means."""
    tuning: dict[str, Any] = {"num_virtual_tokens": cell.pair.tokens}
    options = cell.pair.options() | dict(_value(each) for each in cell.more.split())
    if cell.method in ("prefix", "cartridge"):
        options["method"] = cell.method
        if cell.method == "cartridge":
            tuning["num_frozen_tokens"] = options.pop("num_frozen_tokens", min(1, cell.pair.tokens - 1))
        if cell.init == "TEXT":
            tuning[f"{cell.method}_{'tuning_' * (cell.method == 'prefix')}init_text"] = cell.pair.text
        return options | {"tuning_config": tuning, "learning_rate": cell.rate}
    tuning["prompt_tuning_init_method"] = STARTS.get(cell.init, cell.init)
    if tuning["prompt_tuning_init_method"] == "TEXT":
        tuning["prompt_tuning_init_text"] = cell.pair.text if cell.init == "TEXT" else words(cell.pair, split)
    scale = 1.0
    if cell.method in ("peft", "peft-real"):
        options |= NOTEBOOK
    else:
        scale = base.facts.embedding_rms
    if cell.method == "superpos":
        tuning |= {"parameterization": "superpos", "parameterization_rank": MIXED}
    rate = None if cell.rate is None else cell.rate * scale
    return options | {"tuning_config": tuning, "learning_rate": rate}


def words(pair: Pair, split: Split) -> str:
    """Return the words of the template and the labels, as a text to start from without one."""
    labels = sorted({row["output"] for row in split.train}) if pair.has_labels else []
    return " ".join([*re.sub(r"{{\w+}}", "", pair.template).split(), ", ".join(labels)]).strip() or "text"


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def _bare(cell: Cell, base: Base, split: Split, shots: int = 0) -> softprompt.Baseline:
    """Return a base without a prompt, with demonstrations or without."""
    pair = cell.pair
    return softprompt.Baseline(
        base_model=base.model,
        tokenizer=base.tokenizer,
        template=pair.template,
        labels=sorted({row["output"] for row in split.train}) if pair.has_labels else None,
        few_shot=shots,
        examples=split.train if shots else None,
        seed=cell.seed,
        max_source_length=pair.lengths[0],
        max_target_length=pair.lengths[1],
    )


def _shown(cell: Cell, base: Base, split: Split, shots: int) -> Found:
    """Measure demonstrations in context, half as many where so many do not fit."""
    try:
        found = _measured(cell, _bare(cell, base, split, shots), split)
    except ContextOverflowError:
        return _shown(cell, base, split, shots // 2)
    return replace(found, note=f"{shots} shots {found.note}".strip())


def _measured(cell: Cell, subject: Any, split: Split) -> Found:
    """Evaluate on the test rows."""
    kind: Literal["classification", "generation"] = "classification" if cell.pair.has_labels else "generation"
    report = softprompt.evaluate(subject, split.test, task=kind, silence_progress_bars=True)
    outcomes = report.outcomes or ()
    if cell.pair.has_labels:
        gold = [max((each.probabilities or {}).get(each.target, 0.0), 1e-12) for each in outcomes]
        loss = -sum(map(math.log, gold)) / len(gold)
        return Found(report.accuracy or 0.0, loss, "".join(str(int(each.right)) for each in outcomes))
    loss = math.log(report.perplexity or math.inf)
    if cell.pair.metric == "gsm8k":
        ends, wanted = ([_number(getattr(each, name)) for each in outcomes] for name in ("answer", "target"))
        hits = "".join(str(int(end is not None and end == want)) for end, want in zip(ends, wanted, strict=True))
        note = f"format {sum(end is not None for end in ends) / len(ends):.3f}"
        return Found(hits.count("1") / len(hits), loss, hits, note=note)
    hits = "".join(str(int(each.right)) for each in outcomes) if cell.pair.metric == "exact_match" else ""
    return Found(getattr(report, cell.pair.metric) or 0.0, loss, hits)


def _number(text: str) -> str | None:
    """Return the number behind GSM8K's ``####``; None where a text does not end in that format."""
    found = re.search(r"#### *(-?[\d,.]*\d)", text)
    return None if found is None else found[1].replace(",", "")


def _stage(cell: Cell, base: Base, split: Split) -> Stage:
    """Return what `tune` would train, with the rows and their order: the same for every method."""
    options = _settings(Cell(cell.pair, "peft", cell.init or "N(0,1)", cell.rate, cell.seed), base, split)
    settings = TuneSettings.from_dict(options | {"seed": cell.seed})
    prepared = prepare(base, read_data(split.train, None, settings), settings)
    return next(stages_of(prepared, {}, lambda: None))


def fitted(
    model: Any, stage: Stage, updates: int, rate: float, *, decay: float, pad: int, choice: bool = False
) -> list[float]:
    """Train whatever requires a gradient, on padded batches, as PEFT's notebooks do; return the losses.

    With ``choice`` the loss has the choice among the labels beside the likelihood, as ours has.
    """
    labels = tuple(sorted({row.target for row in stage.rows})) if choice else ()
    among = LabelChoice.of(cast(Any, None), labels, 1.0)  # no engine: it offers labels here, and scores nothing
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    losses: list[float] = []
    for epoch in range(stage.epochs()):
        for update in stage.sampling.updates(epoch)[: updates - len(losses)]:
            optimizer.param_groups[0]["lr"] = rate * (1 - len(losses) / stage.total_updates())
            rows = [stage.rows[i] for part in update for i in part]
            if among is None:
                loss = model(**_padded(rows, pad, seq2seq=model.config.is_encoder_decoder)).loss
            else:
                loss = _chosen(model, _padded(among.offered(cast(Any, rows)), pad, seq2seq=False), among.count)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def _chosen(model: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    """Return the likelihood of the first of each ``count`` rows' targets, and of its choice among them."""
    labels = batch.pop("labels")[:, 1:]
    found = model(**batch).logits[:, :-1].log_softmax(dim=-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    sums = (found * (labels >= 0)).sum(dim=1).view(-1, count)
    choice = nn.functional.cross_entropy(sums, sums.new_zeros(len(sums), dtype=torch.long), reduction="sum")
    loss: Tensor = (choice - sums[:, 0].sum()) / (labels[::count] >= 0).sum()
    return loss


def _padded(rows: Sequence[Any], pad: int, *, seq2seq: bool) -> dict[str, Tensor]:
    """Return a right-padded batch with labels; seq2seq models get source and target apart."""

    def matrix(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
        longest = max(map(len, lists))
        return torch.tensor([[*each, *[fill] * (longest - len(each))] for each in lists])

    sources = [row.source if seq2seq else row.source + row.target for row in rows]
    labels = [row.target if seq2seq else (-100,) * len(row.source) + row.target for row in rows]
    mask = matrix([[1] * len(each) for each in sources], 0)
    return {"input_ids": matrix(sources, pad), "attention_mask": mask, "labels": matrix(labels, -100)}


def _weights(cell: Cell, base: Base, split: Split) -> Found:
    """Train LoRA's matrices (r = 8, PEFT's default modules) or all weights of a copy."""
    stage = _stage(cell, base, split)
    model: Any = copy.deepcopy(base.model).requires_grad_(cell.method == "full")
    torch.manual_seed(cell.seed)
    if cell.method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=_modules(model)))
    pad = base.tokenizer.pad_token_id or 0
    choice = cell.more == CHOICE
    losses = fitted(model.eval(), stage, cell.pair.updates, cell.rate or 0.0, decay=0.0, pad=pad, choice=choice)
    plain = model.merge_and_unload() if cell.method == "lora" else model
    found = _measured(cell, _bare(cell, Base(plain, base.tokenizer), split), split)
    return replace(found, train_loss=losses[-1], rate=cell.rate)


def _modules(model: nn.Module) -> list[str]:
    """Return the query and value projections, which LoRA adapts."""
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(known & {"q_proj", "v_proj", "query", "value"})


def _real_peft(cell: Cell, base: Base, split: Split) -> Found:
    """Run a recipe through the installed peft and through our engine, and compare the losses of all updates."""
    stage = _stage(cell, base, split)
    start = stage.prompt.materialize().detach().clone()
    task = "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM"
    config = peft.PromptTuningConfig(
        task_type=task, num_virtual_tokens=cell.pair.tokens, num_transformer_submodules=1
    )
    model: Any = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    model.prompt_encoder["default"].embedding.weight.data.copy_(start)
    pad = base.tokenizer.pad_token_id or 0
    theirs = fitted(model, stage, cell.pair.updates, cell.rate or 0.0, decay=NOTEBOOK["weight_decay"], pad=pad)
    with tempfile.TemporaryDirectory() as name:
        prompt: Any = softprompt.tune(
            base, split.train, seed=cell.seed, output=name, overwrite=True, **_settings(cell, base, split)
        )
        lines = (Path(name) / "training_logs.jsonl").read_text("utf-8").splitlines()
    ours = [json.loads(line)["data"]["value"] for line in lines]
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    learnt = model.prompt_encoder["default"].embedding.weight.detach()
    moved = (learnt - prompt.module.materialize().detach()).norm() / (learnt - start).norm()
    found = _measured(cell, prompt, split)
    return Found(
        found.score, found.loss, found.hits, theirs[-1], cell.rate, f"loss {apart:.1e}, prompt {moved:.1e}"
    )
