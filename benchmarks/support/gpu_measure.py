"""What a GPU's kernels take, a line of JSON each: ours, or ours beside a rival's.

    python -m benchmarks.support.gpu_measure kernels
    python -m benchmarks.support.gpu_measure FlashInfer --skip 3

`gpu_check` runs it in a process of its own, so that a kernel which breaks the device's context, or
never ends, takes no more with it than its own figure.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.support.gpu_rivals import RIVALS
from tokenspeed.kernels.triton.measure import Ceilings, time_us
from tokenspeed.kernels.triton.workloads import Workload, workloads

__all__ = ["Figure", "compare", "measure", "of_kind"]

# The cache of an H200 is 50 MB; operands rotate over several times as much.
ROTATED_BYTES = 256 << 20
ROTATIONS_MAX = 8
TOLERANCE = 1e-2
# In turn with a rival's.
_TURNS = 3


@dataclass(kw_only=True)
class Figure:
    """What one workload came to.

    Attributes:
        op, name: the workload's.
        size_bytes, operations: likewise.
        microseconds: of ours; None where it was not measured.
        rival: whose kernel it stands beside; None if nobody's.
        rival_us: of theirs.
        error: relative to the reference, or to the rival's result.
        failure: what went wrong, in words.
    """

    op: str
    name: str
    size_bytes: int = 0
    operations: int = 0
    microseconds: float | None = None
    rival: str | None = None
    rival_us: float | None = None
    error: float | None = None
    failure: str | None = None


def of_kind(kind: str, *, scale: int = 1) -> list[Workload]:
    """The workloads that are measured: all, or those of a rival's ops."""
    found = list(workloads(scale=scale))
    return found if kind == "kernels" else [w for w in found if w.op in RIVALS[kind].ops]


def measure(
    workload: Workload, device: torch.device, *, rotations_max: int = ROTATIONS_MAX
) -> Figure:
    """Compare a workload's first row with the reference, then time it on rotating operands."""
    figure = _begun(workload)
    count = max(1, min(rotations_max, ROTATED_BYTES // max(1, workload.size_bytes)))
    try:
        calls = [workload.make(device, seed) for seed in range(count)]
        wanted = calls[0].wanted
        if wanted is not None:
            exact = wanted()
            _hold(figure, calls[0].run()[: len(exact)], exact)
        figure.microseconds = time_us([call.run for call in calls], device)
    # A kernel may run out of anything, and the others are to be measured all the same.
    except Exception as error:
        figure.failure = _words(error)
    return figure


def compare(
    workload: Workload, rival: str, device: torch.device, *, rotations_max: int = ROTATIONS_MAX
) -> Figure:
    """Hold ours and a rival's results together, then time both in turn; medians of each."""
    figure = _begun(workload)
    figure.rival = rival
    count = max(1, min(rotations_max, ROTATED_BYTES // max(1, workload.size_bytes)))
    try:
        calls = [workload.make(device, seed) for seed in range(count)]
        ours = [call.run for call in calls]
        theirs = [RIVALS[rival].make(call.attended) for call in calls if call.attended]
        _hold(figure, ours[0](), theirs[0]())
        both = [(time_us(ours, device), time_us(theirs, device)) for _ in range(_TURNS)]
        figure.microseconds, figure.rival_us = map(statistics.median, zip(*both, strict=True))
    except Exception as error:
        figure.failure = _words(error)
    return figure


def _begun(workload: Workload) -> Figure:
    return Figure(
        op=workload.op,
        name=workload.name,
        size_bytes=workload.size_bytes,
        operations=workload.operations,
    )


def _hold(figure: Figure, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    ours, theirs = ours.float(), theirs.float().reshape(ours.shape)
    figure.error = float((ours - theirs).norm() / theirs.norm())
    # No comparison with NaN is true.
    if not figure.error <= TOLERANCE:
        figure.failure = f"error {figure.error:.1e}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def lines(kind: str, device: torch.device, *, skip: int, scale: int) -> Iterator[str]:
    """What is printed: the ceilings, or a figure after the other."""
    if kind == "ceilings":
        sizes = {} if device.type == "cuda" else {"size_bytes": 1 << 20, "side": 64}
        yield json.dumps(asdict(Ceilings.measure(device, **sizes)))
        return
    for workload in of_kind(kind, scale=scale)[skip:]:
        found = measure(workload, device) if kind == "kernels" else compare(workload, kind, device)
        yield json.dumps(asdict(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("ceilings", "kernels", *RIVALS))
    parser.add_argument("--skip", type=int, default=0, help="workloads that are done")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    for line in lines(options.kind, device, skip=options.skip, scale=options.scale):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
