"""softprompt as a model of lm-evaluation-harness: a base and a prompt, or the base alone.

The harness has no plug-ins, so this module registers the model and then is the harness's own command::

    python -m softprompt.lm_eval --model softprompt --model_args base=DIR,prompt=DIR --tasks hellaswag

From Python, importing it registers ``softprompt`` for ``lm_eval.simple_evaluate``. A task's text stands behind the
prompt as it is; the prompt's own template is not applied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, final

import click
import torch

from softprompt.backbone import load_base
from softprompt.engine import EngineRow, build_engine
from softprompt.errors import ConfigError, SoftPromptError, visible
from softprompt.generation import Decoder, Generation, GenerationOptions, Request, options_from
from softprompt.inference import load_many
from softprompt.prompts import Prompt

try:
    _api: Any = import_module("lm_eval.api.model")
except ImportError as error:
    needs = "softprompt.lm_eval needs lm-evaluation-harness: pip install lm_eval"
    if __name__ == "__main__":
        click.echo(f"Error: {needs}", err=True)
        sys.exit(2)
    raise ConfigError(needs) from error

_BATCH = 16
_IGNORED = ("do_sample", "max_length", "use_cache")
"""Settings of generation that have been read, or mean nothing here."""


@final
class HarnessModel(_api.TemplateLM):  # type: ignore[misc]
    """What the harness calls ``softprompt``: log-likelihoods and answers of a base behind a prompt.

    Args:
        base: Folder or name of the base model; None takes the prompt's.
        prompt: Folder or name of the prompt; None is the base alone.
        batch_size: Rows of one pass; the harness's ``auto`` is 16.
        device: Such as ``cuda:0``; None is the CPU.
        dtype: Data type of the base; None takes the recorded one.
        max_gen_toks: New tokens of an answer where the task does not say.
        ignore_fingerprint: Put the prompt on a base that it was not made for.
        trust_remote_code: Run the code that a base brings along.

    Raises:
        ConfigError: Neither a base nor a prompt is named.
        SoftPromptError: One of them cannot be loaded.
    """

    def __init__(
        self,
        base: str | None = None,
        prompt: str | None = None,
        *,
        batch_size: int | str = _BATCH,
        device: str | None = None,
        dtype: str | None = None,
        max_gen_toks: int = 256,
        ignore_fingerprint: bool = False,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self._prompt: Prompt | None = None
        self._offset: Callable[[Sequence[int]], int]
        if unknown := sorted(others.keys() - {"max_batch_size"}):
            raise ConfigError(f"model_args has no {unknown[0]}; give base, prompt, dtype or max_gen_toks")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # cuda:0 is what the harness says where nobody did
        how: dict[str, Any] = {"torch_dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        if prompt is not None:
            (tuned,) = load_many([prompt], base, ignore_fingerprint=ignore_fingerprint, **how)
            self._base, self._prompt, self._offset = tuned.base, tuned.prompt(), tuned.rows.offset
        elif base is not None:
            self._base, self._offset = load_base(base, **how), lambda source: 0
        else:
            raise ConfigError("model_args needs base=DIR, prompt=DIR, or both")
        self._base.model.eval()  # type: ignore[no-untyped-call]
        self.tokenizer = self._base.tokenizer
        self.backend = "seq2seq" if self._base.is_encoder_decoder else "causal"
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else _BATCH
        self.max_gen_toks = int(max_gen_toks)
        self._engine = build_engine(self._base)
        self._decoder = Decoder.of_batches(self._base, self.batch_size)

    @property
    def max_length(self) -> int:
        """Tokens of text that fit behind the prompt."""
        virtual = 0 if self._prompt is None else self._prompt.tokens
        return (self._base.facts.context_length or 2048) - virtual

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests are told apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, as the tokenizer frames it; one that begins with BOS gets no other."""
        begins = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begins and string.startswith(begins))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text, by the base's template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the base's template, where one is wanted."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return each target's log-probability behind its source in nats, and whether it is the greedy one."""
        rows = [self._row(source, target) for _, source, target in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        # Rows of one source stay together: it is run once for all its answers.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].source), rows[i].source))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            predicted = self._engine.predict([rows[i] for i in part])
            sums = predicted.log_probs().row_sums(len(part)).tolist()
            best = predicted.logits.argmax(dim=-1)[predicted.predictor]
            missed = set(predicted.row_index[best != predicted.labels].tolist())
            for number, i in enumerate(part):
                found[i] = (sums[number], number not in missed)
        for (key, *_ids), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows of the context, each token once.

        Raises:
            ConfigError: The base is an encoder-decoder.
        """
        if self._base.is_encoder_decoder:
            raise ConfigError("loglikelihood_rolling needs a decoder model; choose a task with targets")
        utils = import_module("lm_eval.utils")
        sums = []
        for (text,) in (each.args for each in requests):
            longest = self.max_length - 1  # the token before the window is read as well
            windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, longest, 1)
            parts = [(None, *utils.make_disjoint_window(each)) for each in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each text, up to the task's stop sequences."""
        asked = []
        for text, given in (each.args for each in requests):
            options = self._options(given)
            ids = self.tok_encode(text)
            ids = ids[-max(1, self.max_length - options.max_new_tokens) :] if self.backend == "causal" else ids
            asked.append(Request(tuple(ids), self._prompt, self._offset(ids), options=options))
        answers = [Generation.of(end, cut=False).text for (end,) in self._decoder.run(asked)]
        for each, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", each.args, answer)
        return answers

    def _options(self, given: Mapping[str, Any]) -> GenerationOptions:
        values = import_module("lm_eval.models.utils").normalize_gen_kwargs(dict(given), self.max_gen_toks)
        sampled = values.get("do_sample", False)
        own = {name: value for name, value in values.items() if name not in _IGNORED and value is not None}
        stops = tuple(each for each in own.pop("until", ()) if each)
        if not sampled:  # the thresholds of a task that is greedy say nothing
            own = {name: own[name] for name in own if name not in ("temperature", "top_p", "top_k", "min_p")}
        new = own.pop("max_gen_toks")
        return options_from({"max_new_tokens": new, "stop_sequences": stops} | own, "generate_until")

    def _row(self, source: Iterable[int], target: Iterable[int]) -> EngineRow:
        ids, answer = tuple(source), tuple(target)
        if self.backend == "causal":
            answer = answer[-(self.max_length - 1) :]
            ids = ids[-max(1, self.max_length - len(answer)) :]
        return EngineRow(ids, answer, self._prompt, self._offset(ids))


def side_by_side(
    prompts: Sequence[str],
    tasks: Sequence[str],
    *,
    base: str | None = None,
    include_path: str | None = None,
    **how: Any,
) -> str:
    """Evaluate a base and prompts on tasks of the harness, and return a table with a column for each.

    Args:
        prompts: Folders of prompts of one base.
        tasks: Names of tasks.
        base: The base; None takes the first prompt's.
        include_path: Folder of tasks of your own (YAML files), the only ones then.
        **how: Arguments of ``lm_eval.simple_evaluate``, such as ``limit``.
    """
    harness, manager = import_module("lm_eval"), import_module("lm_eval.tasks").TaskManager
    known = manager(include_path=include_path, include_defaults=include_path is None)
    named = base or load_many(prompts[:1])[0].base.name
    columns, lines = ["base", *prompts], dict[tuple[str, str], list[str]]()
    for each in columns:
        model = HarnessModel(named, None if each == "base" else each)
        found = harness.simple_evaluate(model=model, tasks=list(tasks), task_manager=known, **how)
        for task, metrics in found["results"].items():
            for name, value in metrics.items():
                if isinstance(value, float) and "_stderr" not in name:
                    error = metrics.get(name.replace(",", "_stderr,"))
                    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                    lines.setdefault((task, name.split(",")[0]), []).append(f"{value:.4f}{spread}")
    rows = [["task", "metric", *columns], *([*key, *values] for key, values in lines.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@click.command("side-by-side")
@click.argument("prompts", nargs=-1, required=True)
@click.option("--tasks", required=True, help="Names of tasks, with commas.")
@click.option("--base", help="Base model; by default the first prompt's.")
@click.option("--include-path", help="Folder of tasks of your own, the only ones then.")
@click.option("--limit", type=int, help="Records of each task.")
def _command(prompts: tuple[str, ...], tasks: str, **how: Any) -> None:
    """Print a base and prompts on tasks, side by side."""
    click.echo(visible(side_by_side(prompts, tasks.split(","), bootstrap_iters=1000, **how)))


if __name__ != "__main__":
    import_module("lm_eval.api.registry").register_model("softprompt")(HarnessModel)
else:  # the module is imported under its own name, which registers it
    entry = import_module("softprompt.lm_eval")
    try:
        if sys.argv[1:2] == ["side-by-side"]:
            entry._command(sys.argv[2:])
        else:
            import_module("lm_eval.__main__").cli_evaluate()
    except SoftPromptError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
