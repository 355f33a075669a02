"""How long launches take on a GPU, and what it can do at most."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

__all__ = ["Ceilings", "time_us"]

_GIB = 1 << 30
_REPEATS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a device was measured to do at most.

    Attributes:
        read_bytes_per_s: of memory, the better of a sum and of a copy that reads half.
        bfloat16_ops_per_s: of a large product.
    """

    read_bytes_per_s: float
    bfloat16_ops_per_s: float

    @staticmethod
    def measure(
        device: torch.device, *, size_bytes: int = 4 * _GIB, side: int = 8192
    ) -> "Ceilings":
        """Measure them.

        Args:
            device: which.
            size_bytes: read at once; several times what caches hold.
            side: of the square matrices multiplied.
        """
        x_N = torch.ones(size_bytes // 4, dtype=torch.float32, device=device)
        y_N = torch.empty_like(x_N)
        summed_us = time_us([x_N.sum], device)
        copied_us = time_us([partial(y_N.copy_, x_N)], device)
        del x_N, y_N
        a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
        b = torch.randn(side, side, dtype=torch.bfloat16, device=device)
        product_us = time_us([partial(torch.mm, a, b)], device)
        return Ceilings(
            read_bytes_per_s=max(size_bytes / summed_us, 2 * size_bytes / copied_us) * 1e6,
            bfloat16_ops_per_s=2 * side**3 / product_us * 1e6,
        )


def time_us(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Microseconds of one call: the median of several runs of all of them.

    On a GPU they are captured and replayed, so that what Python costs is not counted; on a CPU,
    where this serves to try out what is to be measured, they are called.

    Args:
        calls: alike, on operands of their own, so that none finds its own in a cache.
        device: where they run.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        runs = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for call in calls:
                call()
            runs.append((time.perf_counter() - start) * 1e6)
        return statistics.median(runs) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    runs = []
    for _ in range(_REPEATS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        runs.append(before.elapsed_time(after) * 1e3)
    return statistics.median(runs) / len(calls)
