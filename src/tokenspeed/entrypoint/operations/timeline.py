"""A request as an operator reads it: every millisecond of it has a name."""

import time
from typing import TYPE_CHECKING, Any

from tokenspeed.entrypoint.operations.records import EndedRequest, RequestRecord, SampleRecord

if TYPE_CHECKING:
    from tokenspeed.engine.facts import LiveRequest, RequestTimes

__all__ = ["ENGINE_PHASES", "PHASES", "ended_view", "live_view", "sample_phases_us"]

ENGINE_PHASES = ("constraint", "queue", "restore", "prefill", "stall", "decode")
# In the order in which a request meets them. "engine" stands for the engine's own six where an
# engine died without telling them apart.
PHASES = ("gateway", "servicer", *ENGINE_PHASES, "engine", "delivery")


def sample_phases_us(request: EndedRequest, sample: SampleRecord) -> dict[str, int]:
    """Microseconds of each phase of a sample, without the gateway's; they add up to `total_us`:
    from the request's arrival to the sample's end here, or the call's if there is one sample."""
    end_s = request.ended_s if len(request.samples) == 1 else sample.ended_s
    total_us = max(0, round((end_s - request.arrived_s) * 1e6))
    if sample.times is None:
        return {"servicer": 0, "engine": total_us, "delivery": 0}
    assert sample.times.ended_at_us is not None
    spent = _engine_phases(sample.times)
    sent_us = sample.times.ended_at_us - sum(spent.values())
    before_us = min(max(0, sent_us - round(request.arrived_s * 1e6)), total_us)
    after_us = total_us - before_us - sum(spent.values())
    # An end that was decided here is ahead of the engine's.
    for name in reversed(ENGINE_PHASES):
        cut_us = min(spent[name], max(0, -after_us))
        spent[name] -= cut_us
        after_us += cut_us
    return {"servicer": before_us, **spent, "delivery": after_us}


def ended_view(request: EndedRequest) -> dict[str, Any]:
    """What `/requests` tells of a request that ended."""
    gateway_us = _gateway_us(request)
    samples = []
    for sample in request.samples:
        phases = {"gateway": gateway_us, **sample_phases_us(request, sample)}
        samples.append(
            {
                "tokens": sample.tokens,
                "drafted_tokens": sample.drafted_tokens,
                "accepted_tokens": sample.accepted_tokens,
                "outcome": sample.outcome,
                "phases_ms": _milliseconds(phases),
                "total_ms": _ms(sum(us for us in phases.values() if us is not None)),
            }
        )
    cache = request.cache
    return {
        **_identity(request),
        "state": "ended",
        "outcome": request.outcome,
        "error": request.error,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "cache": None
        if cache is None
        else {
            "cached_tokens": cache.cached_tokens,
            "evicted_tokens": cache.evicted_tokens,
            "unseen_tokens": cache.unseen_tokens,
            "tail_tokens": cache.tail_tokens,
            "divergence": cache.divergence,
        },
        "ttft_ms": _seconds_to_ms(request.first_token_s),
        "tokens_per_s": _rounded(request.tokens_per_s),
        "total_ms": _ms(round((request.ended_s - request.arrived_s) * 1e6) + (gateway_us or 0)),
        "samples": samples,
    }


def live_view(request: RequestRecord, known: "dict[int, LiveRequest]") -> dict[str, Any]:
    """What `/requests` tells of a request that runs.

    Args:
        request: the request.
        known: what the engine tells, by its own number.
    """
    now_s = time.monotonic()
    total_us = max(0, round((now_s - request.arrived_s) * 1e6))
    gateway_us = _gateway_us(request)
    samples = []
    for stream in request.streams:
        told = known.get(stream.request)
        times = stream.times if told is None else told.times
        drafts = stream if told is None else told
        phases: dict[str, int | None] = {"gateway": gateway_us}
        if times is None:
            phases |= {"servicer": total_us}
        else:
            spent = _engine_phases(times)
            phases |= {"servicer": max(0, total_us - sum(spent.values())), **spent}
        samples.append(
            {
                "tokens": stream.tokens,
                "drafted_tokens": drafts.drafted_tokens,
                "accepted_tokens": drafts.accepted_tokens,
                "outcome": None
                if stream.finish_reason is None
                else stream.finish_reason.name.lower(),
                "phases_ms": _milliseconds(phases),
                "total_ms": _ms(sum(us for us in phases.values() if us is not None)),
                "tokens_per_s": None
                if told is None or told.interval_us is None
                else _rounded(1e6 / told.interval_us),
                "floor_tokens_per_s": None
                if told is None or told.floor_interval_us is None
                else _rounded(1e6 / told.floor_interval_us),
            }
        )
    firsts = [s.first_token_s for s in request.streams if s.first_token_s is not None]
    return {
        **_identity(request),
        "state": "running" if request.streams else "arriving",
        "outcome": None,
        "error": None,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": sum(stream.tokens for stream in request.streams),
        "ttft_ms": _seconds_to_ms(min(firsts) - request.arrived_s) if firsts else None,
        "total_ms": _ms(total_us + (gateway_us or 0)),
        "samples": samples,
    }


def _identity(request: RequestRecord | EndedRequest) -> dict[str, Any]:
    return {
        "id": request.id,
        "tenant": request.tenant,
        "session": request.session,
        "arrived_unix_s": round(request.arrived_unix_s, 3),
    }


def _gateway_us(request: RequestRecord | EndedRequest) -> int | None:
    if request.sent_unix_s is None:
        return None
    return round((request.arrived_unix_s - request.sent_unix_s) * 1e6)


def _engine_phases(times: "RequestTimes") -> dict[str, int]:
    return {name: getattr(times, f"{name}_us") for name in ENGINE_PHASES}


def _milliseconds(phases: dict[str, int | None]) -> dict[str, float | None]:
    return {name: None if us is None else _ms(us) for name, us in phases.items()}


def _ms(us: int) -> float:
    return us / 1000


def _seconds_to_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)
