"""Turns the columns of a simulation into the numbers people ask for."""

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from tokenspeed.bench.baselines import Baselines
from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.results import Results
from tokenspeed.core.step import FinishReason, Int64Array

__all__ = ["Floor", "Quantiles", "Report", "TurnLatency", "counted_quantile", "summarise"]

# Turns whose first-token times are told apart: the first one computes its prompt, later ones have
# more and more of it in cache.
_TURNS = ((0, 0), (1, 4), (5, 19), (20, 49), (50, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Values that so many percent of all stay under."""

    p1: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLatency:
    """Seconds from sending to the first token, of requests at such a place in their session."""

    turns: str
    requests: int
    ttft_s: Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """How often users got less than the floor.

    Attributes:
        tps: the floor.
        bound_ms: the time between two tokens at the floor.
        users_below: requests whose own TPS was less, and `users_below_part` of all.
        intervals_above: times between two tokens that were longer, and `intervals_above_part` of
            all.
    """

    tps: float
    bound_ms: float
    users_below: int
    users_below_part: float
    intervals_above: int
    intervals_above_part: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a simulation found; everything in virtual time.

    Attributes:
        trace: its name.
        config: all that the numbers depend on beside the trace.
        devices: of all replicas.
        requests: sent; each is `finished`, `refused` (it waited too long) or `rejected` (it can
            never fit).
        prompt_tokens, cached_tokens: of requests that were served; `hit_rate` is their ratio.
        lru_hit_rate, optimum_hit_rate: what plain LRU and Belady's optimum would have had; None
            where not asked for.
        output_tokens: given.
        duration_s: from the first request sent to the last one ended.
        output_tpm, total_tpm: tokens a minute, of answers, and with prompts; `output_tpm_device`
            for each device.
        busy_part: time in which a step ran, of all replicas' time.
        mean_batch: tokens given for each step.
        tps: a request's tokens a second from its first token to its last, of requests with two or
            more. Its low quantiles are the slow users.
        ttft: by turn.
        interval_ms: between two tokens of a request.
        floor: None without one.
    """

    trace: str
    config: SimulationConfig
    devices: int
    requests: int
    finished: int
    refused: int
    rejected: int
    prompt_tokens: int
    cached_tokens: int
    hit_rate: float
    lru_hit_rate: float | None
    optimum_hit_rate: float | None
    output_tokens: int
    duration_s: float
    output_tpm: float
    output_tpm_device: float
    total_tpm: float
    busy_part: float
    mean_batch: float
    steps: int
    retractions: int
    evictions: int
    tps: Quantiles
    ttft: tuple[TurnLatency, ...]
    interval_ms: Quantiles
    floor: Floor | None

    def to_json(self) -> bytes:
        """The report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def summarise(
    results: Results,
    config: SimulationConfig,
    *,
    trace_name: str,
    devices_per_replica: int,
    baselines: Baselines | None,
) -> Report:
    """Sum up a simulation."""
    refused = results.reasons == FinishReason.REFUSED
    rejected = results.reasons == FinishReason.REJECTED
    served = ~refused & ~rejected
    prompt_tokens = int(results.input_tokens[served].sum())
    cached_tokens = int(results.cached[served].sum())
    output_tokens = int(results.emitted.sum())
    duration_s = float(results.ended_us.max() - results.arrived_us.min()) / 1e6
    minutes = max(duration_s, 1e-6) / 60
    devices = devices_per_replica * config.replicas
    steps = int(results.steps.sum())
    tps = _tps(results)

    def rate(tokens: int) -> float:
        return tokens / max(prompt_tokens, 1)

    return Report(
        trace=trace_name,
        config=config,
        devices=devices,
        requests=len(served),
        finished=int(served.sum()),
        refused=int(refused.sum()),
        rejected=int(rejected.sum()),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        hit_rate=rate(cached_tokens),
        lru_hit_rate=None if baselines is None else rate(baselines.lru_tokens),
        optimum_hit_rate=None if baselines is None else rate(baselines.optimum_tokens),
        output_tokens=output_tokens,
        duration_s=duration_s,
        output_tpm=output_tokens / minutes,
        output_tpm_device=output_tokens / minutes / devices,
        total_tpm=(prompt_tokens + output_tokens) / minutes,
        busy_part=float(results.busy_us.sum()) / 1e6 / max(duration_s * config.replicas, 1e-6),
        mean_batch=output_tokens / max(steps, 1),
        steps=steps,
        retractions=int(results.retractions.sum()),
        evictions=int(results.evictions.sum()),
        tps=_quantiles(tps),
        ttft=_ttft_by_turn(results),
        interval_ms=_counted_quantiles(results.interval_us, results.interval_counts, 1e-3),
        floor=None if config.floor_tps is None else _floor(results, tps, config.floor_tps),
    )


def counted_quantile(values: Int64Array, counts: Int64Array, part: float) -> float:
    """The least of the ascending `values` that `part` of all do not exceed; 0 of none."""
    if not len(values):
        return 0.0
    ranks = np.cumsum(counts)
    place = int(np.searchsorted(ranks, part * ranks[-1]))
    return float(values[min(place, len(values) - 1)])


def _tps(results: Results) -> npt.NDArray[np.float64]:
    """Tokens a second of every request with two tokens or more."""
    several = results.emitted >= 2
    spans_us = (results.last_us - results.first_us)[several]
    tps: npt.NDArray[np.float64] = (results.emitted[several] - 1) * 1e6 / np.maximum(spans_us, 1)
    return tps


def _ttft_by_turn(results: Results) -> tuple[TurnLatency, ...]:
    begun = results.emitted > 0
    found = []
    for first, last in _TURNS:
        chosen = begun & (results.turn >= first)
        if last is not None:
            chosen &= results.turn <= last
        if chosen.any():
            ttft_s = (results.first_us - results.arrived_us)[chosen] / 1e6
            turns = (
                f"{first}+" if last is None else str(first) if last == first else f"{first}-{last}"
            )
            found.append(
                TurnLatency(turns=turns, requests=int(chosen.sum()), ttft_s=_quantiles(ttft_s))
            )
    return tuple(found)


def _floor(results: Results, tps: npt.NDArray[np.float64], floor_tps: float) -> Floor:
    bound_us = 1e6 / floor_tps
    below = int((tps < floor_tps).sum())
    above = int(results.interval_counts[results.interval_us > bound_us].sum())
    return Floor(
        tps=floor_tps,
        bound_ms=bound_us / 1000,
        users_below=below,
        users_below_part=below / max(len(tps), 1),
        intervals_above=above,
        intervals_above_part=above / max(int(results.interval_counts.sum()), 1),
    )


def _quantiles(values: npt.NDArray[np.float64]) -> Quantiles:
    if not len(values):
        return Quantiles(p1=0.0, p10=0.0, p50=0.0, p90=0.0, p99=0.0, max=0.0)
    p1, p10, p50, p90, p99 = np.percentile(values, [1, 10, 50, 90, 99]).tolist()
    return Quantiles(p1=p1, p10=p10, p50=p50, p90=p90, p99=p99, max=float(values.max()))


def _counted_quantiles(values: Int64Array, counts: Int64Array, unit: float) -> Quantiles:
    p1, p10, p50, p90, p99, most = (
        counted_quantile(values, counts, part) * unit for part in (0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
    )
    return Quantiles(p1=p1, p10=p10, p50=p50, p90=p90, p99=p99, max=most)
