"""Prometheus metrics, with vLLM's names and labels under the prefix ``softprompt_``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from softprompt.generation import AnswerSource

OTHER = "other"
"""The label that prompts share beyond the first ``max_metric_prompts``."""


_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240)


_LIMITS = {
    "max_step_tokens": "Most tokens of a forward pass.",
    "max_mixed_step_tokens": "Most tokens of a forward pass while answers run.",
}
"""Name and help of bounds, by the fields of ``Bounds``."""
_GAUGES = {
    "running": ("num_requests_running", "Answers being generated."),
    "waiting": ("num_requests_waiting", "Requests in the queue."),
    "resident_tokens": ("prompt_cache_tokens", "Virtual tokens in the LRU cache of prompt keys and values."),
    "resident_prompts": ("prompt_cache_prompts", "Prompts in that cache."),
}
_COUNTS = {
    "prompt_hits": ("prompt_cache_hits", "Requests whose prompt was in that cache."),
    "prompt_misses": ("prompt_cache_misses", "Requests whose prompt was not in that cache."),
    "steps": ("engine_steps", "Forward passes for generation."),
}
"""Name and help of what ``BatcherStats`` counts, by its fields."""


@final
class Metrics:
    """The metrics of one server.

    Args:
        batcher: Its statistics become gauges and counters.
        resident: Returns the number of prompts in memory.
        most_prompts: Prompts with a label of their own.
    """

    def __init__(self, batcher: AnswerSource, resident: Callable[[], int], most_prompts: int) -> None:
        self.registry = CollectorRegistry()
        self._most = most_prompts
        self._named: set[str] = set()
        self._watch(batcher)
        self._gauge("prompts_resident", "Prompts in memory.", resident)
        self.input = self._counter("prompt_tokens", "Text tokens of inputs.")
        self.virtual = self._counter("virtual_tokens", "Virtual tokens in front of inputs.")
        self.generated = self._counter("generation_tokens", "Tokens of answers.")
        self.success = self._counter("request_success", "Answers by their finish reason.", "finished_reason")
        self.refused = Counter(
            "softprompt_requests_refused", "Requests answered with an error.", ["code"], registry=self.registry
        )
        self.first = self._histogram("time_to_first_token_seconds", "Time to first token.", _FIRST)
        self.between = self._histogram("inter_token_latency_seconds", "Time between tokens.", _BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "End-to-end request latency.", _WHOLE)

    def label(self, name: str) -> str:
        """Return a prompt's ``model_name`` label: its name for the first ones, then ``OTHER``."""
        if name in self._named or len(self._named) < self._most:
            self._named.add(name)
            return name
        return OTHER

    def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _watch(self, batcher: AnswerSource) -> None:
        """Register the batcher's statistics, read at each scrape."""
        room = batcher.bounds.max_cached_tokens
        self._gauge(
            "kv_cache_usage_perc",
            "KV-cache usage of running answers; 1 is full.",
            lambda: batcher.stats.cached_tokens / room,
        )
        for name, text in _LIMITS.items():
            if batcher.engine != "vllm":  # servers behind this one have limits of their own
                self._gauge(name, text, partial(getattr, batcher.bounds, name))
        for field, (name, text) in _GAUGES.items():
            self._gauge(name, text, partial(_statistic, batcher, field))
        for field, (name, text) in _COUNTS.items():
            value = partial(_statistic, batcher, field)
            self.registry.register(_Count(f"softprompt_{name}", text, partial(_alone, value)))
        text, labels = "Failures of the vLLM servers behind this one.", ("upstream", "error")
        errors = _Count("softprompt_upstream_errors", text, lambda: batcher.stats.upstream_errors, labels)
        self.registry.register(errors)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        gauge = Gauge(f"softprompt_{name}", text, registry=self.registry)
        gauge.set_function(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"softprompt_{name}", text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"softprompt_{name}", text, ["model_name"], registry=self.registry, buckets=buckets)


def _statistic(batcher: AnswerSource, field: str) -> float:
    return float(getattr(batcher.stats, field))


def _alone(value: Callable[[], float]) -> Mapping[Any, float]:
    return {(): value()}


@final
class _Count(Collector):
    """A counter whose value is read from elsewhere; prometheus_client's own cannot be set."""

    def __init__(
        self, name: str, text: str, values: Callable[[], Mapping[Any, float]], labels: tuple[str, ...] = ()
    ) -> None:
        self._name, self._text, self._values, self._labels = name, text, values, labels

    def collect(self) -> Iterable[Metric]:
        """Return the current counts, by the values of the labels."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, count in self._values().items():
            family.add_metric(values, count)
        return [family]

    def describe(self) -> Iterable[Metric]:
        """Return the name alone, so that registering does not read the value."""
        return [CounterMetricFamily(self._name, self._text)]
