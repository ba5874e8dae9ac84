"""Counters for Prometheus, in the shapes of vLLM's under our own prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from softprompt.server.backend import Backend

OTHER = "other"
"""The label of all prompts past the cap."""

_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
)
_BETWEEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
)
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240)


@final
class Meter:
    """The numbers of one server."""

    def __init__(self, batcher: Backend, resident: Callable[[], int], most_prompts: int) -> None:
        self.registry = CollectorRegistry()
        self._most = most_prompts
        self._named: set[str] = set()
        self._gauge(
            "num_requests_running", "Answers being generated.", lambda: batcher.stats.running
        )
        self._gauge("num_requests_waiting", "Requests that wait.", lambda: batcher.stats.waiting)
        room = batcher.bounds.max_cached_tokens
        self._gauge(
            "kv_cache_usage_perc",
            "Share of the cache of running answers in use; 1 is all.",
            lambda: batcher.stats.cached_tokens / room,
        )
        self._gauge(
            "prompt_cache_tokens",
            "Virtual tokens whose keys and values are kept.",
            lambda: batcher.stats.resident_tokens,
        )
        self._count(
            "prompt_cache_hits",
            "Requests so far that found their prompt's keys and values.",
            lambda: batcher.stats.prompt_hits,
        )
        self._count(
            "prompt_cache_misses",
            "Requests so far that had to compute them.",
            lambda: batcher.stats.prompt_misses,
        )
        self._gauge(
            "prompt_cache_prompts",
            "Prompts whose keys and values are kept.",
            lambda: batcher.stats.resident_prompts,
        )
        self._count(
            "engine_steps",
            "Passes of the model so far, for generation.",
            lambda: batcher.stats.steps,
        )
        self._gauge("prompts_resident", "Prompts in memory.", resident)
        self.input = self._counter("prompt_tokens", "Text tokens of inputs.")
        self.virtual = self._counter("virtual_tokens", "Virtual tokens in front of inputs.")
        self.generated = self._counter("generation_tokens", "Tokens of answers.")
        self.success = self._counter(
            "request_success", "Answers by how they ended.", "finished_reason"
        )
        self.refused = Counter(
            "softprompt_requests_refused",
            "Requests answered with an error.",
            ["code"],
            registry=self.registry,
        )
        self.first = self._histogram(
            "time_to_first_token_seconds", "Until an answer begins.", _FIRST
        )
        self.between = self._histogram("inter_token_latency_seconds", "Between tokens.", _BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "Until an answer ends.", _WHOLE)

    def label(self, name: str) -> str:
        """Return what a prompt is called in metrics: its name, while few enough have one."""
        if name in self._named or len(self._named) < self._most:
            self._named.add(name)
            return name
        return OTHER

    def page(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        gauge = Gauge(f"softprompt_{name}", text, registry=self.registry)
        gauge.set_function(value)

    def _count(self, name: str, text: str, value: Callable[[], float]) -> None:
        self.registry.register(_Count(f"softprompt_{name}", text, value))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"softprompt_{name}", text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"softprompt_{name}", text, ["model_name"], registry=self.registry, buckets=buckets
        )


@final
class _Count(Collector):
    """A counter that is counted elsewhere; prometheus_client's own only count what they are told."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterable[Metric]:
        """Return the count of now."""
        return [CounterMetricFamily(self._name, self._text, value=self._value())]

    def describe(self) -> Iterable[Metric]:
        """Return its name alone, so that registering it asks for no value."""
        return [CounterMetricFamily(self._name, self._text)]
