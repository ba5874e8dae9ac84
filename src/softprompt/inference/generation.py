"""Answers as text: rows of any length, batched, and each equal to the same row alone.

Rows are padded (on the left, for an encoder on the right) and handed to the model's own
``generate``. Only the special tokens are taken from the base's generation settings; search
settings come from ``GenerationOptions`` alone, so that a base with a taste of its own (beams,
n-gram bans) does not change what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from softprompt.errors import ConfigError
from softprompt.inference.options import GenerationOptions
from softprompt.inference.sampling import row_processors, row_seeds
from softprompt.inference.stopping import (
    Decode,
    Ending,
    FinishReason,
    StopAtSequences,
    StopSequences,
    find_ending,
)

__all__ = ["Generation", "GenerationOptions", "Generator"]


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer, without special tokens and without the stop sequence that ended it.
        input_token_count: Text tokens of the input; virtual tokens are not counted.
        generated_tokens: New tokens, the end token or stop sequence included.
        finish_reason: "eos_token", "stop_sequence", "max_tokens" or "time_limit".
        seed: The seed that repeats this answer; None when nothing was drawn.
        input_cut: Whether the input was longer than the prompt's limit and lost its end.
    """

    text: str
    input_token_count: int
    generated_tokens: int
    finish_reason: FinishReason
    seed: int | None = None
    input_cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Generator:
    """A model that answers rows of token ids.

    Attributes:
        generate: The ``generate`` of a PeftModel or of a transformers model.
        decode: Token ids to text, special tokens left out.
        eos_ids: Tokens that end an answer.
        pad_id: What fills short rows; masked, so any id of the vocabulary serves.
        seq2seq: Whether rows go to an encoder and answers start from the decoder's own token.
        device: Where the model's input must be.
        adapter: The prompt of a PeftModel to use for every row; None is the active one.
        task: The task of a multitask prompt to use for every row.
        offset: Gives the tokens of a row before its prompt; None where prompts stand in front.
    """

    generate: Callable[..., Any]
    decode: Decode
    eos_ids: frozenset[int]
    pad_id: int
    seq2seq: bool
    device: torch.device
    adapter: str | None = None
    task: int | None = None
    offset: Callable[[Sequence[int]], int] | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        decode: Decode,
        *,
        adapter: str | None = None,
        task: int | None = None,
        offset: Callable[[Sequence[int]], int] | None = None,
    ) -> Generator:
        """Read what generation needs from a PeftModel or a transformers model."""
        # A tokenizer may have more ids than the model has embeddings.
        known = range(model.get_input_embeddings().weight.shape[0])
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(
            generate=model.generate,
            decode=decode,
            eos_ids=end_ids(model, tokenizer),
            pad_id=next(each for each in candidates if each in known),
            seq2seq=bool(model.config.is_encoder_decoder),
            device=model.device,
            adapter=adapter,
            task=task,
            offset=offset,
        )

    def answers(
        self,
        sources: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int = 16,
        cut: Sequence[bool] | None = None,
    ) -> list[Generation]:
        """Return one answer for each row of token ids, in order.

        Args:
            sources: Text tokens of each row, of any lengths.
            options: How to generate.
            batch_size: Rows in one call of the model.
            cut: Whether each row lost its end, to be reported with its answer.

        Raises:
            ConfigError: The input is to be preserved, but the model is an encoder-decoder.
            ContextOverflowError: Prompt, input and answer together exceed the context.
        """
        if options.preserve_input_text and self.seq2seq:
            raise ConfigError(
                "preserve_input_text needs a decoder model: the input of an encoder-decoder is "
                "no part of its output; leave the option out"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size expects at least 1 row, got {batch_size}")
        seeds = row_seeds(options, len(sources))
        # Rows of like length share a batch, which keeps the padding small.
        order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
        found: dict[int, Generation] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [tuple(sources[index]) for index in chosen]
            batch_seeds = [seeds[index] for index in chosen]
            found.update(zip(chosen, self._batch(batch, batch_seeds, options), strict=True))
        flags = cut or [False] * len(sources)
        return [replace(found[i], input_cut=flags[i]) for i in range(len(sources))]

    def _batch(
        self,
        sources: Sequence[tuple[int, ...]],
        seeds: Sequence[int | None],
        options: GenerationOptions,
    ) -> list[Generation]:
        ids, mask = self.padded(sources)
        stops = StopSequences(options.stop_sequences, options.min_new_tokens, self.decode)
        texts = [() if self.seq2seq else source for source in sources]
        with torch.no_grad():
            sequences = self.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=row_processors(options, texts, seeds, self.eos_ids),
                stopping_criteria=StoppingCriteriaList(
                    [StopAtSequences(stops)] if stops.texts else []
                ),
                **self.settings(options),
                **self._chosen(sources),
            )
        first_new = 1 if self.seq2seq else ids.shape[1]
        endings = [
            find_ending(row, self.eos_ids, stops, options)
            for row in sequences[:, first_new:].tolist()
        ]
        return [
            Generation(
                text=self._text(source, ending, options.preserve_input_text),
                input_token_count=len(source),
                generated_tokens=len(ending.tokens),
                finish_reason=ending.reason,
                seed=seed,
            )
            for source, ending, seed in zip(sources, endings, seeds, strict=True)
        ]

    def padded(self, sources: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Return rows of ids ``[B, T]`` filled up to the longest, and their mask."""
        width = max(len(source) for source in sources)
        ids = torch.full((len(sources), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, source in enumerate(sources):
            # A decoder goes on after its last column; an encoder counts columns as positions.
            start = 0 if self.seq2seq else width - len(source)
            ids[index, start : start + len(source)] = torch.tensor(source, dtype=torch.long)
            mask[index, start : start + len(source)] = 1
        return ids.to(self.device), mask.to(self.device)

    def _chosen(self, sources: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if self.adapter is not None:
            chosen["adapter_names"] = [self.adapter] * len(sources)
        if self.task is not None:
            chosen["task_ids"] = [self.task] * len(sources)
        if self.offset is not None:
            chosen["prompt_at"] = [self.offset(source) for source in sources]
        return chosen

    def settings(self, options: GenerationOptions) -> dict[str, Any]:
        """Return the arguments of ``generate`` by which nothing but the options decides."""
        settings: dict[str, Any] = {
            "max_new_tokens": options.max_new_tokens,
            "min_new_tokens": options.min_new_tokens or None,
            "max_time": options.max_time,
            "num_beams": options.num_beams,
            "pad_token_id": self.pad_id,
            # Draws and penalties are the row processors' work.
            "do_sample": False,
            "repetition_penalty": 1.0,
            "exponential_decay_length_penalty": None,
            "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0,
            "length_penalty": 1.0,
            "early_stopping": False,
            "min_length": None,
            "forced_eos_token_id": None,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
        }
        if self.eos_ids:
            settings["eos_token_id"] = sorted(self.eos_ids)
        return settings

    def _text(self, source: Sequence[int], ending: Ending, with_input: bool) -> str:
        answer = self.decode(ending.tokens)
        kept = answer if ending.text_end is None else answer[: ending.text_end]
        if not with_input:
            return kept
        # Decoding both together keeps the space between input and answer.
        return self.decode([*source, *ending.tokens]).removesuffix(answer) + kept


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer.

    They are the tokenizer's end token, which prompts are trained to give, and the ones in the base's
    own generation settings.
    """
    config = getattr(model.generation_config, "eos_token_id", None)
    listed = config if isinstance(config, list) else [config]
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)
