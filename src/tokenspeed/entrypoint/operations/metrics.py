"""What Prometheus reads at `/metrics`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tokenspeed.engine.ledger import INTERVAL_BOUNDS_US
from tokenspeed.entrypoint.operations.records import EndedRequest
from tokenspeed.entrypoint.operations.timeline import PHASES, sample_phases_us

if TYPE_CHECKING:
    from tokenspeed.engine.facts import EngineInfo, EngineStats
    from tokenspeed.entrypoint.history import HistoryStats

__all__ = ["Metrics"]

_TTFT_BOUNDS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_WAIT_BOUNDS_S = (0.001, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_RATE_BOUNDS_PER_S = (1, 2, 5, 10, 20, 30, 40, 50, 70, 100, 140, 200, 300, 500, 1000)


class Metrics:
    """Counts requests as they end, and shows the engine's own counters beside them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self._registry.register(self._engine)
        self._requests = Counter(
            "tokenspeed_requests",
            "Requests that ended, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "tokenspeed_time_to_first_token_seconds",
            "From a request's arrival to its first token, at the servicer.",
            buckets=_TTFT_BOUNDS_S,
            registry=self._registry,
        )
        self._rate = Histogram(
            "tokenspeed_user_tokens_per_second",
            "Tokens a second that the user of a request saw after the first.",
            buckets=_RATE_BOUNDS_PER_S,
            registry=self._registry,
        )
        self._wait = Histogram(
            "tokenspeed_queue_wait_seconds",
            "Time that a request waited for a slot.",
            buckets=_WAIT_BOUNDS_S,
            registry=self._registry,
        )
        self._phases = Counter(
            "tokenspeed_request_phase_seconds",
            "Where the time of requests that ended went.",
            ["phase"],
            registry=self._registry,
        )
        for phase in PHASES:
            self._phases.labels(phase)

    def count(self, request: EndedRequest) -> None:
        """Count a request that ended."""
        self._requests.labels(request.outcome).inc()
        if request.first_token_s is not None:
            self._first_token.observe(request.first_token_s)
        if request.sent_unix_s is not None:
            self._phases.labels("gateway").inc(request.arrived_unix_s - request.sent_unix_s)
        for sample in request.samples:
            for phase, spent_us in sample_phases_us(request, sample).items():
                self._phases.labels(phase).inc(spent_us / 1e6)
            if sample.times is not None:
                self._wait.observe(sample.times.queue_us / 1e6)
        if request.tokens_per_s is not None:
            self._rate.observe(request.tokens_per_s)

    def text(
        self,
        *,
        info: "EngineInfo | None",
        stats: "EngineStats | None",
        history: "HistoryStats | None",
        healthy: bool,
        draining: bool,
    ) -> bytes:
        """Everything, in Prometheus' text format."""
        self._engine.take(
            info=info, stats=stats, history=history, healthy=healthy, draining=draining
        )
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Shows counters that somebody else counts."""

    def __init__(self) -> None:
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._history: HistoryStats | None = None
        self._healthy = self._draining = False

    def take(
        self,
        *,
        info: "EngineInfo | None",
        stats: "EngineStats | None",
        history: "HistoryStats | None",
        healthy: bool,
        draining: bool,
    ) -> None:
        """Show these from now on."""
        self._info, self._stats, self._history = info, stats, history
        self._healthy, self._draining = healthy, draining

    def collect(self) -> Iterator[Metric]:
        """All families; those of the engine only while there is one."""
        yield _gauge("tokenspeed_healthy", "Whether the engine gets on.", self._healthy)
        yield _gauge("tokenspeed_draining", "Whether new requests are refused.", self._draining)
        if self._info is not None and self._stats is not None:
            yield from _load(self._stats, self._info)
            yield from _cache(self._stats, self._info)
            yield from _time(self._stats)
        if self._history is not None:
            yield _counter(
                "tokenspeed_history_replaced_tokens",
                "Prompt tokens in whose place others were served, of the same text.",
                self._history.replaced_tokens,
            )


def _load(stats: "EngineStats", info: "EngineInfo") -> Iterator[Metric]:
    requests = GaugeMetricFamily(
        "tokenspeed_requests_now", "Requests in the engine, by state.", labels=["state"]
    )
    requests.add_metric(["running"], stats.running)
    requests.add_metric(["waiting"], stats.waiting)
    requests.add_metric(["parked"], stats.parked)
    yield requests
    yield _gauge(
        "tokenspeed_queue_uncached_tokens",
        "Tokens of waiting requests that the cache does not hold.",
        stats.waiting_uncached_tokens,
    )
    yield _gauge("tokenspeed_slots", "Requests that can run at once.", info.slots_max)
    yield _counter("tokenspeed_refusals", "Requests refused for waiting too long.", stats.refusals)
    preemptions = CounterMetricFamily(
        "tokenspeed_preemptions",
        "Requests that gave way: their pages (retraction), or only their slot (parking).",
        labels=["kind"],
    )
    preemptions.add_metric(["retraction"], stats.retractions)
    preemptions.add_metric(["parking"], stats.parkings)
    yield preemptions
    yield _counter("tokenspeed_output_tokens", "Tokens generated.", stats.output_tokens)
    yield _counter("tokenspeed_draft_tokens", "Guesses that steps verified.", stats.drafted_tokens)
    yield _counter(
        "tokenspeed_accepted_tokens",
        "Guesses that were right, and so became output.",
        stats.accepted_tokens,
    )
    if info.tps_floor is not None:
        yield _gauge("tokenspeed_floor_tokens_per_second", "The floor asked for.", info.tps_floor)


def _cache(stats: "EngineStats", info: "EngineInfo") -> Iterator[Metric]:
    yield _counter(
        "tokenspeed_prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens
    )
    yield _counter(
        "tokenspeed_cached_tokens", "Prompt tokens that came from cache.", stats.cached_tokens
    )
    missed = CounterMetricFamily(
        "tokenspeed_missed_tokens",
        "Prompt tokens that were computed, by cause; other_salt is a part of unseen.",
        labels=["cause"],
    )
    missed.add_metric(["evicted"], stats.missed_evicted_tokens)
    missed.add_metric(["unseen"], stats.missed_unseen_tokens)
    missed.add_metric(["other_salt"], stats.missed_other_salt_tokens)
    missed.add_metric(["tail"], stats.missed_tail_tokens)
    yield missed
    pages = GaugeMetricFamily(
        "tokenspeed_pages", "KV pages by tier and state.", labels=["tier", "state"]
    )
    pages.add_metric(["device", "free"], stats.pages_free)
    pages.add_metric(["device", "cached"], stats.pages_cached)
    pages.add_metric(["device", "active"], stats.pages_active)
    pages.add_metric(["host", "free"], stats.host_pages_total - stats.host_pages_cached)
    pages.add_metric(["host", "cached"], stats.host_pages_cached)
    yield pages
    yield _gauge("tokenspeed_page_tokens", "Token positions of a page.", info.page_size)
    yield _counter(
        "tokenspeed_evictions", "Cached pages that made room for others.", stats.evictions
    )
    page_bytes = info.kv_size_bytes / info.pages
    moved = CounterMetricFamily(
        "tokenspeed_tier_pages", "KV pages copied between device and host.", labels=["direction"]
    )
    moved_bytes = CounterMetricFamily(
        "tokenspeed_tier_bytes", "The same in bytes.", labels=["direction"]
    )
    for direction, count in (("store", stats.stores), ("load", stats.loads)):
        moved.add_metric([direction], count)
        moved_bytes.add_metric([direction], count * page_bytes)
    yield moved
    yield moved_bytes


def _time(stats: "EngineStats") -> Iterator[Metric]:
    timing = stats.timing
    yield _gauge("tokenspeed_engine_uptime_seconds", "Since the engine began.", stats.uptime_s)
    parts = CounterMetricFamily(
        "tokenspeed_step_seconds",
        "Where the time of steps went; messages is what passes between two of them.",
        labels=["part"],
    )
    for part in ("plan", "launch", "forward", "commit", "outputs", "messages"):
        parts.add_metric([part], getattr(timing, f"{part}_us") / 1e6)
    yield parts
    steps = CounterMetricFamily("tokenspeed_steps", "Steps, by what they ran.", labels=["kind"])
    seconds = CounterMetricFamily(
        "tokenspeed_steps_seconds", "Time of steps, by what they ran.", labels=["kind"]
    )
    for kind in ("decode", "prefill", "mixed"):
        steps.add_metric([kind], getattr(timing, f"{kind}_steps"))
        seconds.add_metric([kind], getattr(timing, f"{kind}_us") / 1e6)
    yield steps
    yield seconds
    buckets = []
    total = 0
    bounds = [f"{bound_us / 1e6:g}" for bound_us in INTERVAL_BOUNDS_US]
    for bound, count in zip((*bounds, "+Inf"), timing.intervals, strict=True):
        total += count
        buckets.append((bound, float(total)))
    yield HistogramMetricFamily(
        "tokenspeed_inter_token_seconds",
        "Time between two tokens of a request, in the engine.",
        buckets=buckets,
        sum_value=timing.intervals_us / 1e6,
    )
    yield _counter(
        "tokenspeed_floor_violations",
        "Intervals between tokens that were longer than the floor allows for what ended them.",
        timing.floor_violations,
    )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=float(value))
