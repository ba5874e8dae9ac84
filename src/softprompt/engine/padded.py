"""Passes over padded batches: the plain path, the oracle of all others, and prompts computed once and expanded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self, cast, final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from softprompt.backbone import Base, VirtualVocabulary, decoder_embedding, recomputes_layers, with_cache
from softprompt.engine.layout import Layout, pad_rows
from softprompt.engine.predictions import Engine, HeadInput, Predictions, see_input
from softprompt.engine.prefixes import prefix_path, prefixed
from softprompt.engine.probe import remembered, scoring_difference
from softprompt.engine.rows import (
    IGNORED,
    EngineRow,
    Prefixes,
    PromptTable,
    check_rows,
    depends_on_neighbours,
)
from softprompt.errors import BackboneError, ConfigError
from softprompt.prompts import Prompt


@final
class PlainEngine(Engine):
    """Scores targets with one padded forward pass a batch."""

    name = "plain"

    def __init__(self, base: Base, *, trusted: bool = False) -> None:
        """Prepare for a base; ``trusted`` skips the probe for models that padding disturbs."""
        super().__init__(base)
        self._trusted = trusted
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``."""
        prefixes = Prefixes.of([row.prompt for row in rows])
        if len(rows) > 1 and (
            depends_on_neighbours(rows, self._facts)
            or self.why_alone(see_input(rows))
            # Padding before a row would count between its prefix and its text.
            or (prefixes is not None and prefix_path(self._base).counts_columns)
        ):
            alone = [self.run_alike([row], head) for row in rows]
            return Predictions.joined(alone, [[i] for i in range(len(rows))])
        run = self._encoder_decoder if self._facts.is_encoder_decoder else self._causal
        return run(rows, prefixes, head)

    def why_alone(self, sees_input: bool = True) -> str:
        """Return why rows are run one at a time, empty when they are batched; remembered per model.

        Args:
            sees_input: Whether an encoder's prompts attend to the input.
        """
        if self._trusted:
            return ""
        return remembered(
            self._base,
            f"padded rows, prompts that {'' if sees_input else 'do not '}see the input",
            lambda: self._disturbed(sees_input),
        )

    def _disturbed(self, sees_input: bool) -> str:
        """Return how padding changes a row, empty where it does not."""
        batched = PlainEngine(self._base, trusted=True)
        try:
            return scoring_difference(batched, batched, self._base, sees_input=sees_input)
        except Exception:  # a model that raises does so for its caller too, one row at a time or not
            return ""

    def _causal(self, rows: Sequence[EngineRow], prefixes: Prefixes | None, head: HeadInput | None) -> Predictions:
        ids, mask = self._padded([row.source + row.target for row in rows], left=True)
        prompts = PromptTable.of([row.prompt for row in rows], at=[row.at for row in rows])
        layout = Layout.of(mask, prompts)
        inputs: dict[str, Any] = {
            "input_ids": layout.ids(ids, self._facts.vocabulary, self._facts.pad_id),
            "attention_mask": layout.mask,
            "use_cache": False,
        }
        if self._facts.accepts_position_ids and not self._facts.positions_from_ids:
            inputs["position_ids"] = layout.positions()
        longest = max(len(row.target) for row in rows)
        if self._keeps_logits:
            inputs["logits_to_keep"] = longest + 1
        ends = slice(-(longest + 1), -1)
        with self._behind(prefixes), prompts.injected(self._base), _head_in_one_piece(self._base):
            logits = self._base.model(**inputs).logits[:, ends]  # [B, longest, V]
        hidden = head.states[:, ends] if head is not None and head.states is not None else None
        return Predictions.of_columns(logits, hidden, self._labels(rows, longest, left=True))

    def _encoder_decoder(
        self, rows: Sequence[EngineRow], prefixes: Prefixes | None, head: HeadInput | None
    ) -> Predictions:
        ids, mask = self._padded([row.source for row in rows], left=False)
        prompts = PromptTable.of([row.prompt for row in rows], at=[row.at for row in rows])
        layout = Layout.of(mask, prompts, compact=True)
        seen = layout.mask if prompts.sees_input else layout.isolated(self._base.model.dtype)
        with prompts.injected(self._base):
            states = self._base.model.get_encoder()(
                input_ids=layout.ids(ids, self._facts.vocabulary, self._facts.pad_id), attention_mask=seen
            )
        inputs = {"encoder_outputs": states, "attention_mask": layout.mask, "use_cache": False}
        labels = self._labels(rows, max(len(row.target) for row in rows), left=False)
        before = PromptTable.of([row.prompt for row in rows], "decoder")
        if before.width:
            # Padding is behind: a decoder looks back, so it needs no mask.
            layout = Layout.of((labels != IGNORED).long(), before, compact=True)
            first = int(decoder_embedding(self._base.model).weight.shape[0])
            inputs["decoder_input_ids"] = layout.ids(self._shifted(labels), first, self._facts.pad_id)
            labels = layout.spread(labels, IGNORED)
        else:
            inputs["labels"] = labels
        with self._behind(prefixes), before.injected(self._base, decoder=True):
            logits = self._base.model(**inputs).logits
        return Predictions.of_columns(logits, head.states if head else None, labels)

    def _behind(self, prefixes: Prefixes | None) -> AbstractContextManager[None]:
        return nullcontext() if prefixes is None else prefixed(self._base, prefixes)

    def _shifted(self, labels: Tensor) -> Tensor:
        """Return the decoder's own ids for labels ``[B, T]``.

        Raises:
            ConfigError: If the model does not say how it makes them.
        """
        shift = getattr(self._base.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ConfigError(
                f"{self._facts.architecture} does not say how its decoder starts, so no prompt can "
                "stand there; use output_model_types ['ENCODER']"
            )
        return cast(Tensor, shift(labels=labels))

    def _padded(self, sequences: Sequence[tuple[int, ...]], *, left: bool) -> tuple[Tensor, Tensor]:
        ids, mask = pad_rows(sequences, left=left, pad_id=self._facts.pad_id)
        return ids.to(self._base.device), mask.to(self._base.device)

    def _labels(self, rows: Sequence[EngineRow], width: int, *, left: bool) -> Tensor:
        """Return target ids ``[B, width]``, -100 where a row has none."""
        labels = torch.full((len(rows), width), IGNORED)
        for i, row in enumerate(rows):
            where = slice(width - len(row.target), width) if left else slice(0, len(row.target))
            labels[i, where] = torch.tensor(row.labels, dtype=torch.long)
        return labels.to(self._base.device)


@final
class ExpandEngine(Engine):
    """Scores targets behind a prompt that is run once."""

    name = "expand"

    def __init__(self, base: Base) -> None:
        """Prepare for a base.

        Raises:
            BackboneError: If the model has no cache of keys and values to expand.
        """
        super().__init__(base)
        self._plain = PlainEngine(base)
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters
        if self._facts.is_encoder_decoder or not self._facts.takes_cache:
            raise BackboneError(f"{self._facts.architecture} has no decoder cache to expand")

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``."""
        used = [p for p in dict.fromkeys(row.prompt for row in rows) if p is not None and p.tokens]
        given = [prompt.prefix is not None for prompt in used]
        if (
            not used
            or recomputes_layers(self._base.model)
            or depends_on_neighbours(rows, self._facts)
            or any(row.at and row.input_tokens for row in rows)
            or any(given) != all(given)
            or not all(row.source for row in rows)
        ):
            # Checkpointing drops the cache; an empty source is predicted from the prompt's own pass;
            # the keys of a prompt behind other tokens are different in every row.
            return self._plain.run_alike(rows, head)
        if all(given):
            return self._text_pass(rows, used, *self._given(used), head)
        table = PromptTable.of(used)
        with table.injected(self._base):
            cache, mask = self._prompt_pass(table)
            return self._text_pass(rows, used, cache, mask, head)

    def _given(self, used: Sequence[Prompt]) -> tuple[Cache, Tensor]:
        """Return prompts that are keys and values as ``_prompt_pass`` returns those of virtual tokens."""
        prefixes = Prefixes.of(used)
        assert prefixes is not None, "none of the prompts is keys and values"
        prefixes = prefixes.shifted()
        cache = DynamicCache()
        prefixes.fill(cache, torch.empty(0, dtype=self._base.model.dtype, device=self._base.device))
        return cache, prefixes.columns().long().to(self._base.device)

    def _prompt_pass(self, prompts: PromptTable) -> tuple[Cache, Tensor]:
        """Return the keys and values of the prompts, ``[K, A_kv, P, D]`` a layer, and their mask ``[K, P]``."""
        # Virtual token at each column [K, P], negative where padded.
        token = torch.arange(prompts.width) - (prompts.width - prompts.lengths).unsqueeze(1)
        virtual = token + prompts.starts.unsqueeze(1) + self._facts.vocabulary
        ids = torch.where(token >= 0, virtual, self._facts.pad_id).to(self._base.device)
        mask = (token >= 0).long().to(self._base.device)
        cache = DynamicCache()
        output = self._base.model(input_ids=ids, **self._behind_cache(cache, mask, ids.shape[1]))
        if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise BackboneError(
                f"{self._facts.architecture} keeps more than keys and values, which cannot be expanded"
            )
        if self._base.shard:
            # FSDP2 gathers a layer in backward when the gradient of its output comes, and of the last layer of
            # this pass only the keys and values are read (pytorch #173709).
            last = cast(DynamicLayer, cache.layers[-1])
            last.keys = cast(Tensor, last.keys) + 0 * output.logits.sum()
        return cache, mask

    def _text_pass(
        self, rows: Sequence[EngineRow], used: Sequence[Prompt], cache: Cache, mask: Tensor, head: HeadInput | None
    ) -> Predictions:
        ids, text_mask = pad_rows([row.source + row.target for row in rows], left=False, pad_id=self._facts.pad_id)
        device = self._base.device
        ids, text_mask = ids.to(device), text_mask.to(device)
        number: dict[Prompt | None, int] = {prompt: i for i, prompt in enumerate(used)}
        owner = torch.tensor([number.get(row.prompt, 0) for row in rows], device=device)
        prompted = torch.tensor([row.prompt in number for row in rows], device=device).unsqueeze(1)
        whole = torch.cat([mask[owner] * prompted, text_mask], dim=1)  # [B, P + T]
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            where = slice(len(row.source) - 1, len(row.source) + len(row.target) - 1)
            labels[i, where] = torch.tensor(row.labels)
        columns = (labels != IGNORED).any(0).nonzero()[:, 0]
        extra: dict[str, Any] = {"logits_to_keep": columns} if self._keeps_logits else {}
        inputs = self._behind_cache(_expanded(cache, owner), whole, ids.shape[1])
        logits = self._base.model(input_ids=ids, **inputs, **extra).logits
        hidden = head.states if head is not None else None
        if not self._keeps_logits:
            logits, hidden = logits[:, columns], None if hidden is None else hidden[:, columns]
        return Predictions.of_columns(logits, hidden, labels[:, columns])

    def _behind_cache(self, cache: Cache, mask: Tensor, columns: int) -> dict[str, Any]:
        """Return cache, mask and positions of the last ``columns`` of a batch."""
        inputs = with_cache(self._base.model, {"attention_mask": mask, "use_cache": True}, cache)
        if self._facts.accepts_position_ids:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -columns:]
        return inputs


@contextmanager
def _head_in_one_piece(base: Base) -> Iterator[None]:
    """Let the LM head read its input in one piece inside the context, which is in one that holds the base's lock.

    transformers hands it the last columns of a batch as a slice, by whose rows torch multiplies a frozen head one
    after the other: up to 17 times as long (80 rows of three columns, a vocabulary of 49,152).
    """
    head = cast(Any, base.model).get_output_embeddings()

    def joined(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in inputs)

    with nullcontext() if head is None else head.register_forward_pre_hook(joined):
        yield


def _expanded(cache: Cache, owner: Tensor) -> Cache:
    """Return the cache of each row's prompt, ``[B, A_kv, P, D]`` a layer."""
    expanded = DynamicCache()
    for index, layer in enumerate(cast(Sequence[Any], cache.layers)):
        keys, values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
        expanded.update(keys, values, index)
    return expanded


@torch.no_grad()
def text_states(base: Base, rows: Sequence[EngineRow]) -> list[Tensor]:
    """Return the last hidden states of each row's source ``[T, H]``, without those of its virtual tokens.

    They are what transformers' ``AutoModel`` gives as ``last_hidden_state``, of a seq2seq model its encoder.

    Raises:
        ConfigError: A prompt is keys and values, or stands in the decoder, and the model is a seq2seq one.
        SoftPromptError: A row does not fit the model.
    """
    check_rows(base, rows)
    facts, seq2seq = base.facts, base.is_encoder_decoder
    prefixes = Prefixes.of([row.prompt for row in rows])
    if seq2seq and any(row.prompt is not None and row.prompt.input is None for row in rows):
        raise ConfigError(
            f"{facts.architecture} embeds with its encoder, and this prompt has no virtual tokens there"
        )
    if len(rows) > 1 and (
        depends_on_neighbours(rows, facts)
        or PlainEngine(base).why_alone(see_input(rows))
        or (prefixes is not None and prefix_path(base).counts_columns)
    ):
        return [states for row in rows for states in text_states(base, [row])]
    ids, mask = (
        each.to(base.device)
        for each in pad_rows([row.source for row in rows], left=not seq2seq, pad_id=facts.pad_id)
    )
    prompts = PromptTable.of([row.prompt for row in rows], at=[row.at for row in rows])
    layout = Layout.of(mask, prompts, compact=seq2seq)
    isolated = seq2seq and not prompts.sees_input
    inputs: dict[str, Any] = {
        "input_ids": layout.ids(ids, facts.vocabulary, facts.pad_id),
        "attention_mask": layout.isolated(base.dtype) if isolated else layout.mask,
    }
    if not seq2seq and facts.accepts_position_ids and not facts.positions_from_ids:
        inputs["position_ids"] = layout.positions()
    with nullcontext() if prefixes is None else prefixed(base, prefixes), prompts.injected(base):
        states = _of_encoder(base, inputs) if seq2seq else _of_body(base, inputs)
    own = (layout.text >= 0) & layout.mask.bool()
    return [states[i, own[i]].float().cpu() for i in range(len(rows))]


def _of_encoder(base: Base, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = cast(Any, base.model.get_encoder())(**inputs).last_hidden_state
    return found


def _of_body(base: Base, inputs: dict[str, Any]) -> Tensor:
    """Return what the model below the head gives; the whole model is called, as prefixes hook on that."""
    seen: list[Tensor] = []
    least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.model.forward).parameters else {}
    keep = base.model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with keep, _head_in_one_piece(base):
        base.model(**inputs, use_cache=False, **least)
    return seen[0]


@dataclass(frozen=True, slots=True)
class BatchPrompts:
    """The prompts of a batch by where they stand; all virtual tokens are in one table, with ids from V on.

    Attributes:
        input: Virtual tokens in the (encoder's) input, None when no row has any.
        decoder: Virtual tokens before the decoder's input, None when no row has any.
        prefixes: Keys and values before the tokens, None when no row has any.
    """

    input: PromptTable | None
    decoder: PromptTable | None
    prefixes: Prefixes | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt | None], *, at: Sequence[int] | None = None) -> Self:
        """Gather the prompts of a batch, each object once however many rows share it.

        Args:
            prompts: The prompt of each row, None for none, ``[B]``.
            at: Real tokens of each row before its virtual ones; None puts all in front.

        Raises:
            ConfigError: If they differ in whether they see the input.
        """
        first = second = None
        if any(each is not None and each.input is not None for each in prompts):
            first = PromptTable.of(prompts, "input", at=at)
        if any(each is not None and each.decoder is not None for each in prompts):
            second = PromptTable.of(prompts, "decoder")
        if first is not None and second is not None:
            table = torch.cat([first.table, second.table])
            second = replace(second, table=table, starts=second.starts + len(first.table))
            first = replace(first, table=table)
        return cls(first, second, Prefixes.of(prompts))

    @property
    def table(self) -> Tensor | None:
        """All virtual tokens, ``[N, H]``; None when there are none."""
        either = self.input or self.decoder
        return None if either is None else either.table

    @contextmanager
    def injected(self, base: Base, vocabulary: VirtualVocabulary | None = None) -> Iterator[None]:
        """Inject a batch's prompts into the base model for one call, inside the context, which holds its lock.

        Without any prompt the base runs bit for bit as without this library.

        Args:
            base: The base.
            vocabulary: Hooks that are on the base's embeddings already; None makes and removes some.

        Raises:
            BackboneError: If the base does not support prefixes, and there are some.
        """
        prefixes = self.prefixes
        behind = nullcontext() if prefixes is None else prefixed(base, prefixes)
        bare = self.table is None and prefixes is None
        with behind, base.running(virtual_tokens=self.table, vocabulary=vocabulary, bare=bare):
            yield
