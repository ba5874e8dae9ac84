"""What prompts that nobody calls cost: a folder of many against a folder of one."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from serving_work import VIRTUAL, asks, prompt_tables, resident_bytes

CALLS = 40


def registered(count: int) -> dict[str, Any]:
    """Return what one prompt's answers cost beside ``count - 1`` others, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), count)
        with context.Pool(1) as pool:
            found: dict[str, Any] = pool.apply(_measure, (folder, count))
    return found


def _write(root: Path, count: int) -> None:
    from softprompt import PromptTuningConfig, get_peft_model
    from softprompt.backbone import load_base

    model = load_base("demo").model
    tables = prompt_tables(model, 2)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    prompted: Any = get_peft_model(model, config)
    prompted.prompt_encoder["default"].embedding.weight.data.copy_(tables[0])
    prompted.save_pretrained(str(root / "first"))
    files = [path for path in (root / "first").iterdir() if path.is_file()]
    for i in range(1, count):
        other = root / f"prompt-{i:04}"
        other.mkdir()
        for path in files:
            (other / path.name).write_bytes(path.read_bytes())


def _measure(folder: str, count: int) -> dict[str, Any]:
    from softprompt.backbone import load_base
    from softprompt.generation import Batcher, GenerationOptions, Request, TokenEvent
    from softprompt.server.folder import PromptFolder
    from softprompt.server.registry import Registry

    torch.set_num_threads(1)
    base = load_base("demo")
    batcher = Batcher(base)
    options = GenerationOptions(max_new_tokens=1)
    todo = asks(base.model, CALLS)
    for ask in todo[:3]:  # what is only paid once
        batcher.submit(Request(ask.ids, options=options)).result(60)
    Registry(PromptFolder.of(folder), base, max_resident=64, max_bytes=2**26).get("first")
    before = resident_bytes()
    registry = Registry(PromptFolder.of(folder), base, max_resident=64, max_bytes=2**26)
    start = time.perf_counter()
    for name in registry.names():
        registry.outline(name)
    listing = time.perf_counter() - start
    took = []
    for ask in todo:
        start = time.perf_counter()
        prompt = registry.get("first").prompt
        for event in batcher.submit(Request(ask.ids, prompt, options=options)):
            if isinstance(event, TokenEvent):
                took.append(time.perf_counter() - start)
    registry.poll()
    batcher.stop()
    return {
        "prompts": count,
        "memory_mib": (resident_bytes() - before) / 2**20,
        "listing_ms": 1000 * listing,
        "first_ms": 1000 * statistics.median(took[1:]),
        "cold_ms": 1000 * took[0],
    }
