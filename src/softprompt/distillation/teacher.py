"""The teacher: the frozen base that sees the text, each passage once in a pass of the forest."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, final

import torch

from softprompt.artifacts import Manifest, Origin, manifest_of
from softprompt.backbone import split_of
from softprompt.data import RowTokenizer, TokenRow, encode
from softprompt.distillation import BETWEEN, DistillSettings, Passage, Question, SourceText
from softprompt.engine import Engine, EngineRow, build_engine
from softprompt.errors import ConfigError
from softprompt.generation import Decoder, GenerationOptions, Request
from softprompt.inference import TunedPrompt, inputs_of, row_tokenizer, written
from softprompt.training import TopTargets

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.prompts import Prompt
    from softprompt.world import World

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Teacher:
    """A base, and the passages it has read.

    Attributes:
        base: The frozen base.
        manifest: How its inputs and answers are rendered, and their limits.
        chat: Whether the text stands in the system turn of the base's chat template.
        passages: What it reads.
        batch_size: Rows in a pass, at most.
        engine_name: The engine of its passes.
    """

    base: Base
    manifest: Manifest
    chat: bool
    passages: tuple[Passage, ...]
    batch_size: int
    engine_name: str = "auto"

    @classmethod
    def of(cls, base: Base, text: SourceText, settings: DistillSettings) -> Teacher:
        """Let a base read texts.

        Raises:
            ConfigError: The base has no chat template, or is no causal model.
            ContextOverflowError: A text does not fit beside a question and its answer.
        """
        if base.is_encoder_decoder:
            raise ConfigError(f"distill needs a causal language model, {base.name} has an encoder and a decoder")
        has_template = bool(base.tokenizer.chat_template)
        chat = settings.chat if settings.chat is not None else has_template and text.kind != "examples"
        labels = text.labels(settings.task)
        manifest = replace(
            manifest_of(Origin.of_base(base), None),
            template=settings.verbalizer,
            task="generation" if labels is None else "classification",
            labels=labels,
            max_source_length=settings.max_source_length,
            max_target_length=settings.max_target_length,
            chat=chat and text.kind != "examples" and settings.verbalizer == "{{input}}",
        )
        limit = base.facts.context_length
        behind = 0 if chat else len(encode(base.tokenizer, [BETWEEN], special=False)[0])
        room = None if limit is None else limit - settings.max_source_length - settings.max_target_length - behind
        plain = row_tokenizer(base.tokenizer, replace(manifest, chat=False))
        passages = text.passages(plain, room, settings.chunk_tokens)
        found = cls(base, manifest, chat, passages, settings.batch_size, settings.engine)
        logger.info("the teacher reads %s tokens (%s), passages: %d", f"{found.tokens:,}", text.kind, len(passages))
        return found

    @cached_property
    def tuned(self) -> tuple[TunedPrompt, ...]:
        """The base with each of the passages as a prompt that nobody trained."""
        return tuple(self.with_ids(each.ids) for each in self.passages)

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The passages as prompts, each one object for all its rows."""
        return tuple(each.prompt() for each in self.tuned)

    @property
    def rows(self) -> RowTokenizer:
        """Renders questions behind a passage."""
        return self.tuned[0].rows

    @property
    def tokens(self) -> int:
        """Tokens of the text, all passages together."""
        return sum(len(each.ids) for each in self.passages)

    @property
    def digest(self) -> str:
        """What the passages are known by."""
        return hashlib.sha256(json.dumps([each.ids for each in self.passages]).encode()).hexdigest()

    def with_ids(self, ids: Sequence[int]) -> TunedPrompt:
        """Return the base with other tokens in the place of a passage, such as its beginning."""
        behind = () if self.chat else encode(self.base.tokenizer, [BETWEEN], special=False)[0]
        return written(self.base, self.manifest, (*ids, *behind), chat=self.chat)

    @property
    def _processes(self) -> World:
        return split_of(self.base.model)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder.of_batches(self.base, self.batch_size)

    def generate(self, asked: Sequence[tuple[Question, GenerationOptions]]) -> list[str]:
        """Return what the base says to each question behind its passage."""
        inputs = inputs_of(self.rows, [question.request for question, _ in asked])
        both = zip(inputs, asked, strict=True)
        return self.texts([Request.of(each, self.prompts[q.passage], options=how) for each, (q, how) in both])

    @property
    def greedy(self) -> GenerationOptions:
        """How it writes an answer, whose end is a token too."""
        return GenerationOptions(max_new_tokens=max(1, self.manifest.max_target_length - 1))

    def texts(self, requests: Sequence[Request]) -> list[str]:
        """Return the base's answers to requests, whatever their prompts are."""
        return self._processes.split(requests, lambda own: [end.text for (end,) in self._decoder.run(own)])

    def answered(self, questions: Sequence[Question], *, scored: bool = True) -> list[Question]:
        """Return questions with an answer where they have none: the likeliest label, or a greedy text.

        Args:
            questions: The questions.
            scored: Whether all get the scores of the labels where there are some, or only those without an answer.
        """
        labels = self.manifest.labels is not None
        left = [i for i, each in enumerate(questions) if each.answer is None or (scored and labels)]
        found = list(questions)
        if not labels:
            for i, text in zip(left, self.generate([(questions[i], self.greedy) for i in left]), strict=True):
                found[i] = replace(questions[i], answer=text)
            return found
        for passage, tuned in enumerate(self.tuned):
            own = [i for i in left if questions[i].passage == passage]
            asked = [questions[i].request for i in own]
            scored_by = partial(tuned.classify, batch_size=2 * self.batch_size)
            for i, each in zip(own, self._processes.split(asked, scored_by), strict=True):
                found[i] = replace(
                    questions[i],
                    answer=each.label if questions[i].answer is None else questions[i].answer,
                    scores=each.scores,
                )
        return found

    def targets(
        self, questions: Sequence[Question], rows: Sequence[TokenRow], k: int, check_stop: Callable[[], None]
    ) -> list[TopTargets]:
        """Return what the teacher predicts for the target tokens of each row, its ``k`` likeliest tokens.

        Args:
            questions: The questions of the rows, which name their passages.
            rows: The rows as ``rows`` renders them.
            k: Tokens kept.
            check_stop: Called between passes.
        """
        pairs = zip(questions, rows, strict=True)
        given = [EngineRow(row.source, row.target, self.prompts[each.passage], row.at) for each, row in pairs]
        engine = build_engine(self.base, self.engine_name)
        read = partial(targets_of, engine, k=k, batch_size=2 * self.batch_size, check_stop=check_stop)
        return self._processes.split(given, read)


def targets_of(
    engine: Engine, rows: Sequence[EngineRow], *, k: int, batch_size: int, check_stop: Callable[[], None]
) -> list[TopTargets]:
    """Return what an engine's base predicts for the target tokens of each row, its ``k`` likeliest tokens.

    Args:
        engine: Runs the rows.
        rows: Each with its prompt or without one.
        k: Tokens kept.
        batch_size: Rows in a pass, at most.
        check_stop: Called between passes.
    """
    found: list[TopTargets] = []
    for start in range(0, len(rows), batch_size):
        check_stop()
        part = rows[start : start + batch_size]
        with torch.no_grad():
            predicted = engine.predict(part)
            every = TopTargets.of(predicted.logits[predicted.predictor], k)
        ends = torch.tensor([len(row.target) for row in part]).cumsum(0).tolist()
        found += [every.part(end - len(row.target), end) for end, row in zip(ends, part, strict=True)]
    return found
