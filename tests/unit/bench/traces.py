"""Small traces and simulations whose numbers can be worked out by hand."""

from pathlib import Path
from typing import Any

from tokenspeed.bench import SimulationConfig, StepTime, Trace, TraceRequest
from tokenspeed.core.config import CacheGroup, SchedulerConfig

__all__ = ["DJANGO", "MOONCAKE", "configured", "sessions", "trace_of"]

_WORKLOADS = Path(__file__).parents[4] / "shared" / "workloads"
DJANGO = _WORKLOADS / "swe_agent_requests_django.jsonl"
MOONCAKE = _WORKLOADS / "mooncake_conversation_head.jsonl"

# 1 ms a step, 10 us a prompt token, 100 us a decode row.
LINEAR = StepTime(step_us=1000, prefill_token_us=10, decode_row_us=100)


def configured(**changes: Any) -> SimulationConfig:
    """One roomy replica, but for the changes; those of the scheduler go by their own names."""
    scheduler: dict[str, Any] = {
        "pages": 4096,
        "page_size": 32,
        "slots_max": 16,
        "step_tokens_max": 4096,
        "context_max": 65536,
    }
    for name in list(changes):
        if name in (*scheduler, "overlap_depth", "tps_floor", "queue_timeout_us"):
            scheduler[name] = changes.pop(name)
    scheduler["groups"] = (CacheGroup(pages=scheduler.pop("pages")),)
    return SimulationConfig(
        **{"step_time": LINEAR, "scheduler": SchedulerConfig(**scheduler), **changes}
    )


def trace_of(*requests: TraceRequest) -> Trace:
    return Trace(name="tiny", requests=tuple(sorted(requests, key=lambda entry: entry.sent_us)))


def sessions(
    count: int,
    turns: int,
    *,
    first_tokens: int = 1100,
    turn_tokens: int = 300,
    output_tokens: int = 40,
    apart_us: int = 50_000,
    between_us: int = 400_000,
) -> Trace:
    """Sessions that begin one after the other and grow by `turn_tokens` a turn."""
    requests = []
    for session in range(count):
        for turn in range(turns):
            tokens = first_tokens + turn * turn_tokens
            requests.append(
                TraceRequest(
                    sent_us=session * apart_us + turn * between_us,
                    input_tokens=tokens,
                    output_tokens=output_tokens,
                    blocks=tuple(1000 * session + block for block in range(tokens // 512)),
                    session=f"s{session}",
                    turn=turn,
                )
            )
    return trace_of(*requests)
