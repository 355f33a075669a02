"""Checking many kernels, with a line for each."""

from collections.abc import Callable, Sequence

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.verify.runs import Run, verify, worst

__all__ = ["verify_and_tell"]

_FAILURES_SHOWN = 5


def verify_and_tell(
    runs: Sequence[Run],
    runtime: CpuRuntime,
    device: torch.device | None,
    *,
    tell: Callable[[str], None],
) -> int:
    """Check kernels, say of each how it did, and give the number of failed cases.

    Args:
        runs: what is checked.
        runtime, device: see `verify`.
        tell: takes a line.
    """

    def kernel_name(run: Run) -> str:
        return f"{run.kernel.solution}:{run.kernel.name}"

    op_width = max(len(run.kernel.op) for run in runs)
    kernel_width = max(len(kernel_name(run)) for run in runs)
    operand_width = max(len(run.operand) for run in runs)
    failed = 0
    for run in runs:
        line = (
            f"{run.kernel.op:{op_width}}  {kernel_name(run):{kernel_width}}  "
            f"{run.operand:{operand_width}}"
        )
        if run.unchecked is not None:
            tell(f"{line}  not checked: {run.unchecked}")
            continue
        outcomes = [verify(run.kernel, case, runtime=runtime, device=device) for case in run.cases]
        failures = [outcome for outcome in outcomes if outcome.failure is not None]
        failed += len(failures)
        farthest = worst(outcomes)
        tell(
            f"{line}  {len(outcomes):4} cases  {farthest.error:7.1e} of {farthest.tolerance:7.1e}  "
            f"{'FAIL' if failures else 'pass'}"
        )
        for outcome in failures[:_FAILURES_SHOWN]:
            tell(f"    {outcome.case.name}: {outcome.failure}")
        if len(failures) > _FAILURES_SHOWN:
            tell(f"    and {len(failures) - _FAILURES_SHOWN} more")
    return failed
