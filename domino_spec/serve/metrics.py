"""What /metrics tells Prometheus: requests, the queue, tokens, and how drafting does."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from domino_spec.serve.runner import Job, Progress, Runner

PREFIX = "domino_spec"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}_requests", "HTTP requests that have ended.", ["route", "outcome"], registry=self.registry
        )
        self._generated = Counter(f"{PREFIX}_generated_tokens", "Tokens of answers.", registry=self.registry)
        self._prompt = Counter(f"{PREFIX}_prompt_tokens", "Tokens of prompts taken up.", registry=self.registry)
        self._cached = Counter(
            f"{PREFIX}_cached_prompt_tokens", "Tokens of prompts that need not be read.", registry=self.registry
        )
        self._queue = self._histogram("queue_seconds", "Seconds a request waited for a slot.", SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "Seconds to a request's first tokens.", SECONDS)
        self._between = self._histogram(
            "inter_token_seconds",
            "Seconds per token after the first ones: tokens of one verify pass share the time since the last.",
            TOKEN_SECONDS,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, runner: Runner, method: str, drafting_off: str | None) -> None:
        """Report what a runner and its engine count themselves, with what they draft or why they do not."""
        self.registry.register(_EngineCollector(runner, method, drafting_off))

    def grew(self, job: Job, before: Progress, now: Progress) -> None:
        """A job has progressed."""
        fresh = now.tokens - before.tokens
        if fresh <= 0:
            return
        self._generated.inc(fresh)
        seconds = now.at - before.at
        if before.tokens:
            for _ in range(fresh):
                self._between.observe(seconds / fresh)
            return
        self._prompt.inc(len(job.request.prompt_ids))
        self._cached.inc(job.generation.cached_tokens)
        self._first.observe(now.at - job.submitted)
        self._queue.observe((job.taken_up or now.at) - job.submitted)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


def outcome(status: int) -> str:
    """A word for an HTTP status."""
    if status < 400:
        return "ok"
    names = {429: "queue_full", 499: "disconnected", 503: "unavailable", 504: "timeout"}
    return names.get(status, "refused" if status < 500 else "failed")


class _EngineCollector:
    """Reads the counts when Prometheus asks for them."""

    def __init__(self, runner: Runner, method: str, drafting_off: str | None) -> None:
        self._runner, self._method, self._drafting_off = runner, method, drafting_off

    def collect(self) -> Iterator[Metric]:
        """One family per count."""
        stats = self._runner.engine.stats
        drafting = self._drafting_off is None
        yield _gauge("drafting", "1 where the server drafts when it pays, 0 where drafting is off.", float(drafting))
        info = GaugeMetricFamily(
            f"{PREFIX}_method_info", "How the server drafts, or why it does not.", labels=("method", "drafting_off")
        )
        info.add_metric((self._method, self._drafting_off or ""), 1.0)
        yield info
        yield _gauge("running_requests", "Requests that have a slot.", self._runner.num_running)
        yield _gauge("waiting_requests", "Requests that wait for a slot.", self._runner.num_waiting)
        yield _gauge("slots", "Requests that are decoded together at most.", self._runner.engine.slots)
        yield _counter("cycles", "Cycles of the decoding loop.", stats.cycles)
        yield _counter("drafted_cycles", "Cycles in which something was drafted.", stats.drafted_cycles)
        share = stats.drafted_cycles / stats.cycles if stats.cycles else 0.0
        yield _gauge("drafted_share", "Share of cycles in which something was drafted.", share)
        yield _counter("verify_passes", "Verify passes of single requests.", stats.verify_passes)
        yield _counter("drafts", "Drafts proposed.", stats.drafts)
        accepted = stats.committed_tokens - stats.verify_passes
        yield _counter("accepted_drafts", "Drafts accepted, before stop or length cut them.", accepted)
        tau = stats.committed_tokens / stats.verify_passes if stats.verify_passes else 0.0
        yield _gauge("acceptance_length", "tau: mean of accepted drafts + 1 over all verify passes.", tau)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
