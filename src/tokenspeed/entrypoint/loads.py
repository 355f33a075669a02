"""What the engine's counters look like to the gateway."""

import datetime as dt
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed import __version__
from tokenspeed.core.errors import InvalidParameter

if TYPE_CHECKING:
    from tokenspeed.engine.facts import EngineInfo, EngineStats

__all__ = ["engine_load", "loads_response"]

_SECTIONS = ("core", "memory", "queues", "all")
_GB = 1e9
_INT32_MAX = 2**31 - 1


def loads_response(stats: "EngineStats", info: "EngineInfo", *, include: Iterable[str] = ()) -> Any:
    """The `GetLoadsResponse` of an engine with one rank.

    Raises:
        InvalidParameter: an unknown section.
    """
    sections = set(include)
    unknown = sections.difference(_SECTIONS)
    if unknown:
        raise InvalidParameter(
            f"unknown load sections {', '.join(sorted(unknown))}; there are {', '.join(_SECTIONS)}"
        )
    load = pb.SchedulerLoad(
        dp_rank=0,
        num_running_reqs=stats.running,
        num_waiting_reqs=stats.waiting,
        num_total_reqs=stats.running + stats.waiting,
        num_used_tokens=_used_tokens(stats, info),
        max_total_num_tokens=_capacity_tokens(info),
        max_running_requests=info.slots_max,
        num_waiting_uncached_tokens=stats.waiting_uncached_tokens,
        token_usage=_token_usage(stats),
        active_token_usage=_active_token_usage(stats),
        gen_throughput=stats.output_tokens_per_s,
        cache_hit_rate=_cache_hit_rate(stats),
        utilization=stats.running / info.slots_max,
    )
    if sections & {"memory", "all"}:
        load.memory.weight_gb = info.weights_size_bytes / _GB
        load.memory.kv_cache_gb = info.kv_size_bytes / _GB
        load.memory.token_capacity = _capacity_tokens(info)
    if sections & {"queues", "all"}:
        load.queues.waiting = stats.waiting
    return pb.GetLoadsResponse(
        timestamp=dt.datetime.now(dt.UTC).isoformat(),
        version=__version__,
        dp_rank_count=1,
        loads=[load],
        aggregate=pb.AggregateMetrics(
            total_running_reqs=load.num_running_reqs,
            total_waiting_reqs=load.num_waiting_reqs,
            total_reqs=load.num_total_reqs,
            avg_token_usage=load.token_usage,
            avg_throughput=load.gen_throughput,
            avg_utilization=load.utilization,
        ),
    )


def engine_load(stats: "EngineStats", info: "EngineInfo", *, sample: int, age_ms: int) -> Any:
    """The `EngineLoad` that rides on a batch of cache events.

    Args:
        sample: counts the records of one stream up.
        age_ms: milliseconds since the counters were read.
    """
    return common_pb2.EngineLoad(
        running_requests=stats.running,
        waiting_requests=stats.waiting,
        waiting_uncached_tokens=stats.waiting_uncached_tokens,
        token_usage=_token_usage(stats),
        active_token_usage=_active_token_usage(stats),
        gen_throughput=stats.output_tokens_per_s,
        max_running_requests=info.slots_max,
        age_ms=age_ms,
        sample=sample,
        cache_hit_rate=_cache_hit_rate(stats),
        num_used_tokens=_used_tokens(stats, info),
        max_total_num_tokens=_capacity_tokens(info),
    )


def _used_tokens(stats: "EngineStats", info: "EngineInfo") -> int:
    return min((stats.pages_total - stats.pages_free) * info.page_size, _INT32_MAX)


def _capacity_tokens(info: "EngineInfo") -> int:
    return min(info.pages * info.page_size, _INT32_MAX)


def _token_usage(stats: "EngineStats") -> float:
    return (stats.pages_total - stats.pages_free) / stats.pages_total


def _active_token_usage(stats: "EngineStats") -> float:
    return stats.pages_active / stats.pages_total


def _cache_hit_rate(stats: "EngineStats") -> float:
    return stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
