"""A soft prompt with its frozen base model, template and label set: generate, classify, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, final, overload

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softprompt.artifacts import Manifest, Publishing, manifest_of_task, push, save_adapter
from softprompt.backbone import Base, head_tensors, replaced_modules
from softprompt.display import curve_html, one_line, page, table, training_figure
from softprompt.engine import Engine, build_engine, placement_of
from softprompt.errors import ConfigError
from softprompt.generation import (
    Decoder,
    Generation,
    GenerationOptions,
    Input,
    Labelling,
    LabelScores,
    Request,
    label_ids_of,
    label_set,
    options_from,
    rows_of_whole_inputs,
    score_rows,
    streamed,
)
from softprompt.inference.inputs import (
    Fields,
    Inputs,
    Messages,
    Task,
    TaskNames,
    inputs_of,
    is_single,
    listed,
    row_tokenizer,
    task_number,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from softprompt.data import RowTokenizer
    from softprompt.prompts import Prompt, PromptLearningConfig, PromptModule

_Answer = TypeVar("_Answer")


@final
class TunedPrompt:
    """What ``tune`` returns and ``load`` reads: call it with a text to get the answer.

    Attributes:
        base: The base model, which is not changed.
        module: The prompt's parameters.
        config: Its configuration, under PEFT's names.
        whole: Template, label set, limits and provenance of the prompt with all its tasks.
        manifest: The same for the task it is used for.
        task: The task of a multitask prompt it is used for; None before one is chosen.
        heads: Modules trained with the prompt, by the path of the module of the base they replace.
    """

    def __init__(
        self,
        base: Base,
        module: PromptModule,
        config: PromptLearningConfig,
        manifest: Manifest,
        *,
        task: int | None = None,
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.base = base
        self.module = module
        self.config = config
        self.whole = manifest
        self.task = task
        self.manifest = manifest_of_task(manifest, task or 0)
        self.heads = dict(heads or {})
        self._shared = _Shared()
        self._tasks: dict[int, TunedPrompt] = {}  # which know nothing of it: a cycle would keep what is unloaded

    @cached_property
    def rows(self) -> RowTokenizer:
        """Turns fields into token ids the way the prompt was trained."""
        return row_tokenizer(self.base.tokenizer, self.manifest, placement_of(self.config))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self.base.tokenizer

    def of_task(self, task: Task | None) -> TunedPrompt:
        """Return this prompt as used for one task, with that task's template and label set.

        Args:
            task: Name or number; None will do for a prompt with one task.

        Raises:
            ConfigError: There is no such task, or None was given and there are several.
        """
        number = self._number(self.task if task is None else task)
        if number == self.task:
            return self
        if number not in self._tasks:
            own = TunedPrompt(self.base, self.module, self.config, self.whole, task=number, heads=self.heads)
            own._shared = self._shared
            self._tasks[number] = own
        return self._tasks[number]

    def snapshot(self) -> TunedPrompt:
        """Return this prompt as it is now: training it further does not change what is returned."""
        found = TunedPrompt(self.base, self.module, self.config, self.whole, task=self.task, heads=self.heads)
        every = [self.of_task(number) for number in range(self.module.num_tasks)]
        found._shared.prompts = tuple(each.prompt() for each in every)
        return found

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of its tasks; their numbers where it has no names."""
        return self.whole.tasks or tuple(map(str, range(self.module.num_tasks)))

    def rows_of_tasks(self, chosen: TaskNames, rows: int) -> dict[int, list[int]]:
        """Return the inputs of each task, by its number, for one task or one of each input.

        Raises:
            ConfigError: There is no such task, or not one for each input.
        """
        names = [chosen] * rows if isinstance(chosen, str | int) else chosen
        if len(names) != rows:
            raise ConfigError(f"task_name takes one task, or one for each of the {rows:,} rows; got {len(names):,}")
        found: dict[int, list[int]] = {}
        for row, task in enumerate(names):
            found.setdefault(self._number(task), []).append(row)
        return found

    def _number(self, task: Task | None) -> int:
        return task_number(task, self.whole, self.module.num_tasks)

    def _of_tasks(
        self, requests: Inputs, chosen: TaskNames, answer: Callable[[TunedPrompt, list[Fields]], list[_Answer]]
    ) -> list[_Answer]:
        """Return the answers to all requests in their order, those of one task given together."""
        given = listed(requests)
        found: dict[int, _Answer] = {}
        for task, numbers in self.rows_of_tasks(chosen, len(given)).items():
            answers = answer(self.of_task(task), [given[number] for number in numbers])
            found.update(zip(numbers, answers, strict=True))
        return [found[number] for number in range(len(given))]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics recorded when the prompt was made."""
        return self.manifest.metrics

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """One point for each epoch of training."""
        return self.manifest.history

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The label set; None for a prompt that generates free text."""
        return self.manifest.labels

    @cached_property
    def engine(self) -> Engine:
        """The fastest exact engine that scores targets over the base model."""
        return self.engine_of("auto")

    def engine_of(self, kind: str) -> Engine:
        """Return an engine by its name; raise ``ConfigError`` where it does not run the base exactly."""
        return build_engine(self.base, kind)

    def prompt(self) -> Prompt:
        """Return the prompt as it is now: detached, and with memory of its own.

        Raises:
            ConfigError: The prompt has several tasks, and none is chosen.
        """
        number = self._number(self.task)
        if self._shared.prompts is not None:
            return self._shared.prompts[number]
        return self.module.prompt(number).detach().map(Tensor.clone)

    def check_served(self) -> None:
        """Raise ``ConfigError`` for a prompt with trained modules beside its virtual tokens, keys or values."""
        if self.heads:
            names = ", ".join(head_tensors(self.heads))
            raise ConfigError(
                f"the prompt has trained modules ({names}), and only the base's own are served; use generate"
            )

    # A str is iterable too; the first overload is the one meant.
    @overload
    def __call__(self, requests: Fields | Messages, *, task_name: Task | None = None) -> str: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(
        self, requests: Iterable[Fields | Messages], *, task_name: TaskNames | None = None
    ) -> list[str]: ...

    def __call__(self, requests: Inputs, *, task_name: TaskNames | None = None) -> str | list[str]:
        """Return the best label, or the generated text, of one input or of each in a list.

        Args:
            requests: One input or several: texts, or mappings of the template's fields; messages of a chat, or
                several chats, where the prompt was trained on chats.
            task_name: The task of a multitask prompt, by name or number; or one for each input.

        Raises:
            TemplateError: An input does not have the template's fields.
        """
        answers: list[str]
        if task_name is not None:
            answers = self._of_tasks(requests, task_name, lambda own, part: own(part))
        elif self.manifest.task == "classification":
            answers = [each.label for each in self.classify(requests)]
        else:
            limit = self.manifest.max_target_length
            answers = [each.text for each in self.generate(requests, max_new_tokens=limit)]
        return answers[0] if is_single(requests) else answers

    def classify(
        self,
        requests: Inputs,
        labels: Sequence[str] | None = None,
        *,
        task_name: TaskNames | None = None,
        normalize: bool = False,
        batch_size: int = 64,
    ) -> list[LabelScores]:
        """Return how likely each label is as the answer to each input; inputs and tasks as for a call.

        Args:
            requests: One input or several.
            labels: Label set; None takes the one recorded with the prompt.
            task_name: The task of the inputs, or of each.
            normalize: Divide a label's log-probability by its token count.
            batch_size: (input, label) pairs in one pass, at most.

        Raises:
            ConfigError: There is no label set, or two labels have the same tokens.
            TemplateError: An input does not have the template's fields.
            ContextOverflowError: Prompt, input and label exceed the model's context.
        """
        if task_name is not None:
            more: dict[str, Any] = {"normalize": normalize, "batch_size": batch_size}
            return self._of_tasks(requests, task_name, lambda own, part: own.classify(part, labels, **more))
        names = label_set(labels, self.labels)
        if names is None:
            raise ConfigError(
                "this prompt generates free text and has no labels; pass labels=[...] or call generate"
            )
        labelling = Labelling(names, self.label_ids(names), inputs_of(self.rows, requests))
        size = rows_of_whole_inputs(batch_size, len(names))
        with replaced_modules(self.base, self.heads):
            sums = score_rows(self.engine, labelling.rows(self.prompt()), max_rows=size)
        return labelling.answers(sums, normalize=normalize)

    def generate(
        self, requests: Inputs, *, task_name: TaskNames | None = None, batch_size: int = 16, **settings: Any
    ) -> list[Generation]:
        """Return one generated answer for each input.

        Args:
            requests: One input or several, as for a call.
            task_name: The task of a multitask prompt, by name or number; or one for each input.
            batch_size: Answers that are generated at the same time, at most.
            **settings: How to generate: fields of ``GenerationOptions``, such as ``max_new_tokens=20``, or
                these as ``options``.

        Raises:
            ConfigError: An option is unknown, out of range, or would be ignored.
            TemplateError: An input does not have the template's fields.
            ContextOverflowError: Prompt, input and answer exceed the model's context.
        """
        if task_name is not None:
            return self._of_tasks(
                requests, task_name, lambda own, part: own.generate(part, batch_size=batch_size, **settings)
            )
        chosen = options_from(settings, "generate")
        given = inputs_of(self.rows, requests)
        return self._generated(given, self.prompt(), chosen, batch_size)

    def stream(
        self, request: Fields | Messages, *, task_name: Task | None = None, **settings: Any
    ) -> Iterator[str]:
        """Yield the generated answer to one input piece by piece; together they are ``generate``'s text.

        The input, the task of a multitask prompt, and the options are as for ``generate``.

        Raises:
            SoftPromptError: As ``generate``; or for beams, which cannot be streamed.
        """
        tuned = self.of_task(task_name)
        chosen = options_from(settings, "stream")
        (given,) = inputs_of(tuned.rows, [request])
        tuned.check_served()
        return streamed(self.base, Request.of(given, tuned.prompt(), options=chosen))

    def generate_rows(
        self,
        sources: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int = 16,
        without_prompt: bool = False,
    ) -> list[Generation]:
        """Return one generated answer for each row of token ids; see ``generate``."""
        prompt = None if without_prompt else self.prompt()
        given = [
            Input(tuple(ids), 0 if prompt is None else self.rows.offset(ids), self.rows.decode) for ids in sources
        ]
        return self._generated(given, prompt, options, batch_size)

    def _generated(
        self, given: Sequence[Input], prompt: Prompt | None, options: GenerationOptions, batch_size: int
    ) -> list[Generation]:
        requests = [Request.of(each, prompt, options=options) for each in given]
        if batch_size not in self._shared.decoders:
            self._shared.decoders[batch_size] = Decoder.of_batches(self.base, batch_size)
        with replaced_modules(self.base, {} if prompt is None else self.heads):
            ends = self._shared.decoders[batch_size].run(requests)
        return [Generation.of(end, cut=each.cut) for (end,), each in zip(ends, given, strict=True)]

    def sources(self, requests: Inputs) -> tuple[list[tuple[int, ...]], list[bool]]:
        """Return the text tokens of each input, and whether it lost its end; raises as ``classify``."""
        found = inputs_of(self.rows, requests)
        return [each.ids for each in found], [each.cut for each in found]

    def label_ids(self, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the tokens of each label; raise ``ConfigError`` where there is none, or two have the same."""
        return label_ids_of(self.rows, labels)

    def __repr__(self) -> str:
        """Return task, base, size and what was measured in one line."""
        labels = [] if self.labels is None else [f"{len(self.labels)} labels"]
        return one_line("TunedPrompt", self.manifest.task, *labels, **self._facts())

    def _repr_html_(self) -> str:
        """Return what a notebook shows: facts, metrics, the training curve and the labels."""
        facts = {"task": self.manifest.task, **self._facts(), "template": self.manifest.template}
        labels = table(enumerate(self.labels or (), start=1), ("", "label"))
        return page("Soft prompt", table(facts), curve_html(self.history), labels)

    def _facts(self) -> dict[str, Any]:
        """Return base, method, size and scores."""
        size = {"method": str(self.config.peft_type), "virtual_tokens": self.config.num_virtual_tokens}
        return {"base": self.base.name, **size, **self.scores}

    @property
    def scores(self) -> dict[str, float]:
        """The recorded numbers of the validation; the training loss without one."""
        found = self.metrics.get("validation") or {"loss": self.metrics.get("loss")}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    def plot_training(self) -> Figure:
        """Return a figure of loss and validation by epoch; raise ``ConfigError`` without matplotlib, or epochs."""
        return training_figure(self.history)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the prompt as PEFT's folder with ``softprompt.json`` and a model card.

        Raises:
            OutputExistsError: The directory is not empty and ``overwrite`` is off.
        """
        heads = {name: value.cpu().clone() for name, value in head_tensors(self.heads).items()}
        config = replace(self.config, inference_mode=True).to_dict()
        save_adapter(Path(directory), config, self.module.stored() | heads, self.whole, overwrite=overwrite)

    def push_to_hub(self, repo_id: str, **options: Unpack[Publishing]) -> str:
        """Put the prompt with its card into ``org/name`` on the Hub, made if needed; return the commit's address.

        ``options`` are those of a repository, ``private``, ``token``, ``commit_message``, ``revision`` and
        ``create_pr``, and of the card, ``base_model``, ``license`` and ``datasets``; see docs/sharing.md.

        Raises:
            ConfigError: The base is a folder of this machine, and ``base_model`` does not name its Hub id.
            ArtifactError: The Hub refuses or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            self.save(folder)
            return push(folder, repo_id, **options)


@dataclass(slots=True)
class _Shared:
    """What the prompt has for all its tasks: each one's ``Prompt`` in a snapshot, and decoders by batch size."""

    prompts: tuple[Prompt, ...] | None = None
    decoders: dict[int, Decoder] = field(default_factory=dict)
