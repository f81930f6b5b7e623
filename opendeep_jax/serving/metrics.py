"""Prometheus metrics: requests and latencies from the server, the rest from the engine's own counts."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from opendeep_jax.serving.service import EngineService

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

GAUGES = {
    "running": "Prompts that hold a slot of the engine.",
    "waiting": "Prompts that wait for a slot.",
    "free_pages": "Pages of the cache that are free.",
    "total_pages": "Pages of the cache.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were read.",
    "generated_tokens": "Tokens that were sampled.",
    "drafted_tokens": "Tokens that were guessed ahead.",
    "accepted_tokens": "Guessed tokens that were right.",
    "steps": "Steps of the engine.",
}


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, service: EngineService):
        self.registry = CollectorRegistry()
        self._service = service
        self.registry.register(self)
        self.requests = Counter(
            "opendeep_requests",
            "Answered HTTP requests, by route and status; 499: the client went before.",
            ["route", "status"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "opendeep_time_to_first_token_seconds",
            "From a prompt's submission to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.token_time = Histogram(
            "opendeep_time_per_output_token_seconds",
            "Mean time between an answer's tokens.",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.answer_time = Histogram(
            "opendeep_answer_seconds",
            "From a prompt's submission to its last token.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def answered(self, submitted: float, first: float, last: float, tokens: int) -> None:
        """Count one complete answer by its times, in seconds on one clock."""
        self.first_token.observe(first - submitted)
        self.answer_time.observe(last - submitted)
        if tokens > 1:
            self.token_time.observe((last - first) / (tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's current counts when prometheus_client asks for them."""
        service = self._service
        yield GaugeMetricFamily("opendeep_ready", "1 while requests are taken.", value=float(service.ready))
        yield GaugeMetricFamily("opendeep_failed", "1 after the engine failed.", value=float(bool(service.failure)))
        stats = service.engine.stats if service.engine else None
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"opendeep_{name}", text, value=getattr(stats, name, 0))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"opendeep_{name}", text, value=getattr(stats, name, 0))
