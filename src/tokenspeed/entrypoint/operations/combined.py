"""Several engines of one model as one: what they can hold, and what they counted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from tokenspeed.engine.facts import EngineInfo, EngineStats

__all__ = ["combined_info", "combined_stats"]

_ADDED = ("pages", "slots_max", "step_tokens_max", "weights_size_bytes", "kv_size_bytes")


def combined_info(infos: "Sequence[EngineInfo]") -> "EngineInfo | None":
    """What engines that differ in nothing but their memory told of themselves; None of none."""
    if len(infos) < 2:
        return infos[0] if infos else None
    alone = [info.tps_alone for info in infos if info.tps_alone is not None]
    return msgspec.structs.replace(
        infos[0],
        **{name: sum(getattr(info, name) for info in infos) for name in _ADDED},
        tps_alone=min(alone, default=None),
    )


def combined_stats(stats: "Sequence[EngineStats]") -> "EngineStats | None":
    """The sums of all counters, and the time since the last engine started; None of none."""
    if len(stats) < 2:
        return stats[0] if stats else None
    summed: EngineStats = _sum(stats)
    return msgspec.structs.replace(summed, uptime_s=min(one.uptime_s for one in stats))


def _sum(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, msgspec.Struct):
        return type(first)(
            **{
                name: _sum([getattr(value, name) for value in values])
                for name in first.__struct_fields__
            }
        )
    if isinstance(first, list):
        return [_sum(column) for column in zip(*values, strict=True)]
    return sum(values)
