"""The forest's engines: one packed stream of real tokens, logits where a target is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from softprompt.backbone import Base, decoder_embedding, recomputes_layers, skips_layers
from softprompt.engine import (
    Engine,
    EngineRow,
    HeadInput,
    PlainEngine,
    Predictions,
    PromptTable,
    depends_on_neighbours,
    pad_rows,
    remembered,
    scoring_difference,
)
from softprompt.engine.forest.causal_plan import causal_forest, decoder_forest
from softprompt.engine.forest.forest_attention import NAME, LayerMask, planned
from softprompt.engine.forest.layers import Packing, layers_of, packed_layers, relative_bias
from softprompt.engine.forest.plan import Owner, Plan, Span, Visibility, padded
from softprompt.engine.prefixes import gathered_gradient
from softprompt.errors import BackboneError


def require_packable(base: Base) -> None:
    """Refuse a model that cannot take the tokens of several rows as one.

    Raises:
        BackboneError: If it cannot.
    """
    model, facts = base.model, base.facts
    parameters = inspect.signature(model.forward).parameters
    if facts.is_encoder_decoder or "position_ids" not in parameters:
        raise BackboneError(f"{facts.architecture} takes no position_ids")
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        # Llama 4; a probe is too short to see it.
        raise BackboneError(f"{facts.architecture} scales attention by column")
    if "logits_to_keep" not in parameters:
        raise BackboneError(f"{facts.architecture} takes no logits_to_keep")


@final
class ForestEngine(Engine):
    """Scores targets over a forest; exact, with no padding in token-wise layers."""

    name = "forest"

    def __init__(self, base: Base, *, trusted: bool = False) -> None:
        """Prepare for a base; ``trusted`` skips the probe for prompts of keys and values.

        Raises:
            BackboneError: If the model cannot take a packed row.
        """
        super().__init__(base)
        self._trusted = trusted
        self._plain = PlainEngine(base)
        require_packable(base)

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``."""
        if depends_on_neighbours(rows, self._facts) or not self._reads(rows):
            return self._plain.run_alike(rows, head)
        prompts = PromptTable.of([row.prompt for row in rows])
        plan = causal_forest(rows, prompts.ids(self._facts.vocabulary)).plan()
        device = self._base.device
        wanted, predictor = plan.targets.distinct()
        kept = forest_prefixes(plan, rows)
        with (
            self._base.lock,
            gathered_gradient(self._base, kept.values) as values,
            planned(kept.visibility.to(device), values),
            self._base.running(attention=NAME, virtual_tokens=prompts.virtual_tokens),
        ):
            logits = self._base.model(
                input_ids=plan.ids.unsqueeze(0).to(device),
                position_ids=plan.positions.unsqueeze(0).to(device),
                attention_mask=torch.ones(1, len(plan), dtype=torch.long, device=device),
                logits_to_keep=wanted.to(device),
                use_cache=False,
            ).logits
        states = head.states if head is not None else None  # [1, K, H]
        return Predictions.of_stream(logits, states, predictor, plan.targets)

    def reads_keys_and_values(self) -> bool:
        """Tell whether prompts of keys and values run in the forest too; probed once."""
        return self._trusted or not remembered(
            self._base, "keys and values in the forest", self._unread, otherwise="prefixes run on the plain path"
        )

    def _unread(self) -> str:
        """Return how the forest reads keys and values otherwise than the plain path; empty when alike."""
        candidate, plain = ForestEngine(self._base, trusted=True), PlainEngine(self._base, trusted=True)
        return scoring_difference(candidate, plain, self._base, keys_and_values=True)

    def _reads(self, rows: Sequence[EngineRow]) -> bool:
        """Tell whether the forest reads the rows' keys and values as the plain path does."""
        return not any(row.prefix_tokens for row in rows) or self.reads_keys_and_values()


@dataclass(frozen=True, slots=True)
class ForestPrefixes:
    """Who sees whom in a stream whose keys are followed by those of prefixes.

    Attributes:
        visibility: Who sees whom; key N is the first of the first prefix.
        values: The prefixes ``[L, 2, A_kv, P, D]``, in order.
    """

    visibility: Visibility
    values: tuple[Tensor, ...]


def forest_prefixes(plan: Plan, rows: Sequence[EngineRow]) -> ForestPrefixes:
    """Put the keys and values of the rows' prompts behind those of a stream, at positions 0 to P - 1."""
    prompts = dict.fromkeys(row.prompt for row in rows)
    values = {p: p.prefix for p in prompts if p is not None and p.prefix is not None}
    if not values:
        return ForestPrefixes(plan.visibility(), ())
    keys: dict[Owner, Tensor] = {}
    positions, first = [plan.positions], len(plan)
    for prompt in values:
        count = prompt.prefix_tokens
        keys[prompt] = torch.arange(first, first + count)
        positions.append(torch.tensor(prompt.prefix_places[:-1]))
        first += count
    kinds = [[_behind(span, keys.get(span.owner)) for span in kind] for kind in plan.kinds]
    seen = padded(kinds, plan.positions, torch.cat(positions))
    return ForestPrefixes(seen, tuple(values.values()))


def _behind(span: Span, keys: Tensor | None) -> Span:
    """Return a span whose queries see further keys before their own."""
    if keys is None:
        return span
    sees = torch.ones(len(span.queries), len(keys), dtype=torch.bool)
    return replace(span, keys=torch.cat([keys, span.keys]), sees=torch.cat([sees, span.sees], dim=1))


@final
class PackedSeq2SeqEngine(Engine):
    """Scores targets of a seq2seq model without padding in its layers."""

    name = "forest"

    def __init__(self, base: Base) -> None:
        """Prepare for a base.

        Raises:
            BackboneError: If its stacks cannot be packed.
        """
        super().__init__(base)
        self._model = model = base.model
        if not self._facts.is_encoder_decoder:
            raise BackboneError(f"{self._facts.architecture} has no encoder")
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise BackboneError(f"{self._facts.architecture} does not say how it shifts labels")
        self._plain = PlainEngine(base)
        self._encoder = model.get_encoder()
        self._decoder = cast(Any, model).get_decoder()

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``."""
        if recomputes_layers(self._model) or skips_layers(self._model) or any(row.prefix_tokens for row in rows):
            # Backward would run the layers again without the hooks that pack them; or the first
            # layer, which does the packing, may be left out. Keys and values stand in padded rows.
            return self._plain.run_alike(rows, head)
        prompts = PromptTable.of([row.prompt for row in rows])
        virtual = prompts.ids(self._facts.vocabulary)
        encoder = encoder_plan(rows, virtual, sees_input=prompts.sees_input)
        with self._base.lock:
            with self._base.running(attention=NAME, virtual_tokens=prompts.virtual_tokens):
                states = self._encode(encoder.plan)
            return self._decode(rows, encoder, states, head)

    def _encode(self, plan: Plan) -> Tensor:
        """Return packed encoder states ``[1, N, H]``."""
        bias, packing = self._prepared(self._encoder, plan)
        ids = packing.grid(plan.ids, self._filler).to(self._base.device)
        mask = LayerMask.of(plan.visibility().to(ids.device), bias)
        with packed_layers(layers_of(self._encoder), packing.to(ids.device), mask):
            states: Tensor = self._encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return states

    def _decode(
        self, rows: Sequence[EngineRow], encoder: EncoderPlan, states: Tensor, head: HeadInput | None
    ) -> Predictions:
        device = self._base.device
        prompts = PromptTable.of([row.prompt for row in rows], "decoder")
        # A decoder may have a vocabulary of its own.
        virtual = prompts.ids(int(decoder_embedding(self._model).weight.shape[0]))
        plan = decoder_forest(rows, virtual, encoder.owners, self._starts(rows)).plan()
        bias, packing = self._prepared(self._decoder, plan)
        wanted, predictor = plan.targets.distinct()
        hooks = packed_layers(
            layers_of(self._decoder),
            packing.to(device),
            LayerMask.of(plan.visibility().to(device), bias),
            cross=LayerMask.of(plan.visibility_over(encoder.plan, encoder.owned).to(device)),
            keep=wanted.to(device),
        )
        running = self._base.running(attention=NAME, virtual_tokens=prompts.virtual_tokens, decoder=True)
        with running, hooks:
            logits = self._model(
                encoder_outputs=(states,),
                attention_mask=torch.ones(1, states.shape[1], dtype=torch.long, device=device),
                decoder_input_ids=packing.grid(plan.ids, self._filler).to(device),
                use_cache=False,
            ).logits
        hidden = head.states if head is not None else None
        return Predictions.of_stream(logits, hidden, predictor, plan.targets)

    def _prepared(self, stack: nn.Module, plan: Plan) -> tuple[Tensor | None, Packing]:
        """Return a stack's relative position bias, and how its tokens are laid out for its embeddings."""
        bias = relative_bias(stack, int(plan.positions.max()) + 1)
        # With a bias positions are in attention alone; else the stack counts columns.
        packing = Packing.by_column(plan.positions) if bias is None else Packing.in_line(len(plan))
        return bias, packing

    @property
    def _filler(self) -> int:
        """An id where no token stands; not padding, which some models do not count."""
        return 0 if self._facts.pad_id else 1

    def _starts(self, rows: Sequence[EngineRow]) -> list[int]:
        """Return the token before each answer; mBART's is the answer's last."""
        labels, _ = pad_rows([row.target for row in rows], left=False, pad_id=self._facts.pad_id)
        shifted = cast(Any, self._model).prepare_decoder_input_ids_from_labels(labels=labels)
        starts: list[int] = shifted[:, 0].tolist()
        return starts


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """An encoder's pass, and what its sequences mean to a decoder.

    Attributes:
        plan: The pass.
        owners: The input that each row of the batch has; rows with one input and prompt share it.
        owned: Tokens of the stream whose states each input owns, in the order of its sequence.
    """

    plan: Plan
    owners: tuple[int, ...]
    owned: Mapping[Owner, Tensor]


def encoder_plan(rows: Sequence[EngineRow], virtual: Sequence[tuple[int, ...]], *, sees_input: bool) -> EncoderPlan:
    """Plan the encoder's pass for a batch.

    Args:
        rows: The rows; prompts that do not see the input stand in front of it.
        virtual: The virtual ids of each row's prompt.
        sees_input: Whether the prompts see the input.
    """
    inputs = [row.source_with(ids) for row, ids in zip(rows, virtual, strict=True)]
    prompt_of = dict(zip(inputs, virtual, strict=True))
    number = {ids: i for i, ids in enumerate(prompt_of)}
    owners = tuple(number[ids] for ids in inputs)
    if sees_input:
        own = _indices(list(prompt_of))
        plan = _encoder_pass([(0, ids) for ids in prompt_of], own, own)
        return EncoderPlan(plan, owners, dict(enumerate(own)))
    shared = [ids for ids in dict.fromkeys(virtual) if ids]
    sequences = [
        *((0, ids) for ids in shared),
        *((len(prompt), ids[len(prompt) :]) for ids, prompt in prompt_of.items()),
    ]
    own = _indices([ids for _, ids in sequences])
    states = dict(zip(shared, own, strict=False))
    seen = [
        torch.cat([states[prompt], index]) if prompt else index
        for prompt, index in zip(prompt_of.values(), own[len(shared) :], strict=True)
    ]
    plan = _encoder_pass(sequences, own, [*own[: len(shared)], *seen])
    return EncoderPlan(plan, owners, dict(enumerate(seen)))


def _encoder_pass(
    sequences: Sequence[tuple[int, tuple[int, ...]]], own: Sequence[Tensor], seen: Sequence[Tensor]
) -> Plan:
    """Return the pass of sequences with first positions, each seeing all of the given tokens."""
    spans = [Span.seeing_all(queries, keys) for queries, keys in zip(own, seen, strict=True)]
    ids = torch.tensor([token for _, ids in sequences for token in ids], dtype=torch.long)
    positions = torch.cat([torch.arange(start, start + len(ids)) for start, ids in sequences])
    return Plan(ids, positions, (tuple(spans),))


def _indices(sequences: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the stream indices of each sequence."""
    at, found = 0, []
    for ids in sequences:
        found.append(torch.arange(at, at + len(ids)))
        at += len(ids)
    return found
