"""A real server on a free port in this process, prompts made on the spot, and a batcher of a script."""

from __future__ import annotations

import faulthandler
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from softprompt import PeftModel
from softprompt.artifacts import Manifest, save_adapter
from softprompt.backbone import Fingerprint
from softprompt.engine import ResidentPrompts
from softprompt.errors import NotServingError, QueueFullError
from softprompt.generation import (
    Batcher,
    BatcherStats,
    Bounds,
    EchoEvent,
    FinishEvent,
    Scorer,
    Ticket,
    TokenEvent,
)
from softprompt.server.app import build_app, config_of, create_app, listening, server_of
from softprompt.server.folder import PromptFolder
from softprompt.server.registry import Registry
from softprompt.server.settings import ServeSettings

CLASSIFIER = "Text : {{input}} Label :"
PAIRS = "{{first}} then {{second}} :"
BOUNDS = Bounds.__dataclass_fields__.keys()


def write_prompt(
    directory: Any,
    base: Any,
    *,
    length: int = 4,
    seed: int = 0,
    manifest: bool = True,
    **changes: Any,
) -> Any:
    """Save a prompt of random rows at the scale of the base's embeddings; see ``write_rows``."""
    table = base.model.get_input_embeddings().weight.detach().float()
    generator = torch.Generator().manual_seed(seed)
    rows = table[torch.randint(0, len(table), (length,), generator=generator)].clone()
    rows += torch.randn(rows.shape, generator=generator) * table.std()
    return write_rows(directory, base, rows, manifest=manifest, **changes)


def write_rows(directory: Any, base: Any, rows: Any, *, manifest: bool = True, **changes: Any) -> Any:
    """Save rows ``[P, H]`` as a prompt; ``changes`` are fields of its manifest."""
    config = _config(base, "PROMPT_TUNING", len(rows)) | {"token_dim": rows.shape[1]}
    return _written(directory, base, config, {"prompt_embeddings": rows}, manifest, changes)


def write_tasks(directory: Any, base: Any, tasks: Any, *, manifest: bool = True, **changes: Any) -> Any:
    """Save a multitask prompt; ``tasks`` says by name what its record keeps of each task."""
    width = base.model.config.hidden_size
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "prompt_embeddings": (4, width),
        "prefix_task_cols": (len(tasks), 4, 2),
        "prefix_task_rows": (len(tasks), 2, width),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = _config(base, "MULTITASK_PROMPT_TUNING", 4)
    config |= {"num_tasks": len(tasks), "num_ranks": 2}
    own = {"template": "{{input}}", "labels": None, "task": "generation"}
    own |= {"tasks": tuple(tasks), "data": {"tasks": tasks}, **changes}
    return _written(directory, base, config, tensors, manifest, own)


def write_prefix(directory: Any, base: Any, **changes: Any) -> Any:
    """Save a prefix-tuning prompt for a base of Llama's kind."""
    facts = base.model.config
    width = facts.num_key_value_heads * facts.head_dim
    config = _config(base, "PREFIX_TUNING", 3)
    config |= {
        "token_dim": width,
        "num_layers": facts.num_hidden_layers,
        "num_attention_heads": facts.num_key_value_heads,
    }
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(3, facts.num_hidden_layers * 2 * width, generator=generator) / 10
    return _written(directory, base, config, {"prompt_embeddings": values}, True, changes)


def _config(base: Any, kind: str, length: int) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "token_dim": base.model.config.hidden_size,
        "base_model_name_or_path": base.name,
        "inference_mode": True,
    }


def _written(directory: Any, base: Any, config: Any, tensors: Any, manifest: bool, changes: Any) -> Any:
    values = {
        "template": CLASSIFIER,
        "task": "classification",
        "labels": ("complaint", "no complaint"),
        "base_model": base.name,
        "base_fingerprint": Fingerprint.of(base.model).to_dict(),
        "max_source_length": 128,
        "max_target_length": 8,
        "dtype": "float32",
        "seq2seq": False,
        "metrics": {"accuracy": 0.9},
        "history": [{"epoch": 1, "loss": 0.5}],
        **changes,
    }
    record = Manifest(**values) if manifest else None
    save_adapter(directory, config, tensors, record, overwrite=True)
    return directory


@dataclass
class Server:
    """A server that runs."""

    url: str
    app: Any
    uvicorn: Any

    @property
    def service(self) -> Any:
        return self.app.state.service

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def openai(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})


def app_over(base: Any, root: Any, batcher: Any = None, **changes: Any) -> Any:
    """Return the application over a base that is in memory, as ``serve`` makes it."""
    bounds = Bounds(**{name: changes.pop(name) for name in BOUNDS & changes.keys()})
    settings = ServeSettings(base_model=base.name, prompts=str(root), bounds=bounds, **changes)
    registry = Registry(
        PromptFolder.of(root),
        base,
        max_resident=bounds.max_prompts_resident,
        max_bytes=settings.max_prompt_bytes,
        ignore_fingerprint=settings.ignore_fingerprint,
        base_names=settings.served_model_name,
    )
    batcher = batcher or Batcher(base, bounds)
    scorer = Scorer(base, bounds, getattr(batcher, "residents", ResidentPrompts(0, 0)))
    scorer.start()
    return create_app(settings, registry, batcher, scorer)


@contextmanager
def running(app: Any, *, grace: int = 10) -> Any:
    """Serve an application with uvicorn, in a thread, on a free port."""
    sock = listening("127.0.0.1", 0)
    config = config_of(app, app.state.service.settings)
    config.timeout_graceful_shutdown = grace
    server = server_of(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Server(f"http://127.0.0.1:{sock.getsockname()[1]}", app, server)
    finally:
        server.should_exit = True
        thread.join(60)  # a busy machine takes its time: 30 s were too few in one run of many
        sock.close()
        if thread.is_alive():
            faulthandler.dump_traceback()  # what it waits for
        assert not thread.is_alive()


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class ScriptedBatcher:
    """A batcher that does what a test says: tickets wait until it gives their tokens.

    ``auto`` answers at once with the ids of "hello".
    """

    engine = "scripted"
    reason = "a test"

    def __init__(self, *, auto: bool = False, full: bool = False, words: Any = (5, 6, 7)) -> None:
        self.bounds = Bounds().settled("cpu")
        self.healthy = True
        self.failure: Exception | None = None
        self.auto = auto
        self.full = full
        self.words = words
        self.tickets: list[Ticket] = []
        self.cancelled = 0
        self.closing = False

    @property
    def stats(self) -> BatcherStats:
        return BatcherStats(waiting=sum(not each.is_done for each in self.tickets))

    def submit(self, request: Any) -> Ticket:
        if self.full:
            raise QueueFullError("the queue is full; try again in 3 s", 2.3)
        if self.closing:
            raise NotServingError("serving is stopping")
        ticket = Ticket(request, self._cancel)
        self.tickets.append(ticket)
        if self.auto:
            self.answer(ticket)
        return ticket

    def answer(self, ticket: Ticket) -> None:
        """Give a ticket all its tokens and its end."""
        request = ticket.request
        if request.echo:
            nothing: Any = tuple(() for _ in request.ids)
            ticket.push(EchoEvent(request.ids, (None, *[-1.0] * (len(request.ids) - 1)), nothing))
        for index in range(request.n):
            for token in self.words:
                ticket.push(self.token(token, index))
        self.finish(ticket)

    def token(self, token: int, index: int = 0) -> TokenEvent:
        return TokenEvent(index, token, f" {token}", -0.5, ((token, -0.5),))

    def finish(self, ticket: Ticket, reason: Any = "stop") -> None:
        request = ticket.request
        text = "".join(f" {token}" for token in self.words)
        tokens = 0 if request.prompt is None else request.prompt.tokens
        ends = [FinishEvent(i, reason, text, tuple(self.words), tokens, len(request.ids)) for i in range(request.n)]
        ticket.push(*ends, last=True)

    def drain(self, timeout: float | None = None) -> bool:
        self.closing = True
        return True

    def stop(self) -> None:
        self.closing = True

    def _cancel(self) -> None:
        self.cancelled += 1


def greedy_over_http(url: str, texts: Any, names: Any, count: int = 6) -> list[str]:
    """Ask a server for each text behind each named prompt, all at once; answers in that order."""
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=url, timeout=120) as client:

        def ask(pair: Any) -> str:
            name, text = pair
            body = {"model": name, "prompt": text, "max_tokens": count, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"]).strip()

        return list(pool.map(ask, [(name, text) for name in names for text in texts]))


def greedy_alone(base: Any, folders: Any, texts: Any, count: int = 6) -> list[str]:
    """Return what PEFT's interface generates for each text alone behind each saved prompt."""
    found = []
    for folder in folders:
        model = PeftModel.from_pretrained(base.model, folder, ignore_fingerprint=True).eval()
        for text in texts:
            ids = base.tokenizer(text, return_tensors="pt").input_ids
            answer = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
            found.append(base.tokenizer.decode(answer, skip_special_tokens=True).strip())
    return found


@contextmanager
def command_serving(base_model: Any, prompts: Any, **changes: Any) -> Any:
    """Serve what ``softprompt serve --base-model ... --prompts ...`` serves, in this process."""
    settings = ServeSettings(base_model=str(base_model), prompts=str(prompts), port=0, **changes)
    with running(build_app(settings, PromptFolder.of(prompts))) as server:
        yield server
