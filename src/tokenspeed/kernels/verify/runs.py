"""Which kernels are checked with which cases, and how each check ends."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.capability import Platform
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import ANY, Kernel, Registry
from tokenspeed.kernels.selection import objection
from tokenspeed.kernels.verify import (
    attention,
    gemm,
    latent,
    moe,
    partial,
    partial_latent,
    quantised,
    rounded,
    rowwise,
    sampling,
)
from tokenspeed.kernels.verify.case import Case
from tokenspeed.kernels.verify.elsewhere import on_device
from tokenspeed.kernels.verify.tolerances import TOLERANCES

__all__ = ["CASES", "Outcome", "Run", "plan_runs", "verify", "worst"]


def _all(*grids: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    return lambda: chain.from_iterable(grid() for grid in grids)


CASES: Final[Mapping[str, Callable[[], Iterator[Case]]]] = {
    "activation.gelu_tanh_and_mul": rowwise.gelu_tanh_and_mul_cases,
    "activation.silu_and_mul": rowwise.silu_and_mul_cases,
    "attention.join_heads": latent.join_heads_cases,
    "attention.paged_mha": _all(attention.paged_mha_cases, rounded.paged_mha_cases),
    "attention.paged_mla": latent.paged_mla_cases,
    "attention.partial_mha": partial.partial_mha_cases,
    "attention.partial_mla": partial_latent.partial_mla_cases,
    "attention.project_parts": partial_latent.project_parts_cases,
    "attention.prompt_mla": latent.prompt_mla_cases,
    "embedding.lookup": gemm.lookup_cases,
    "embedding.take": rowwise.take_cases,
    "gemm.heads": gemm.heads_cases,
    "gemm.linear": _all(gemm.linear_cases, quantised.linear_cases),
    "gemm.logits": gemm.logits_cases,
    "kvcache.append": _all(attention.append_cases, rounded.append_cases),
    "kvcache.append_latents": latent.append_latents_cases,
    "kvcache.rotate_and_append": attention.rotate_and_append_cases,
    "moe.add": moe.add_cases,
    "moe.experts": moe.experts_cases,
    "moe.route": moe.route_cases,
    "norm.add_rms_norm": rowwise.add_rms_norm_cases,
    "norm.rms_norm": rowwise.rms_norm_cases,
    "rope.angles": rowwise.angles_cases,
    "rope.rotate": rowwise.rotate_cases,
    "sampling.add_bias": sampling.bias_cases,
    "sampling.apply_bitmask": sampling.bitmask_cases,
    "sampling.argmax": sampling.argmax_cases,
    "sampling.draw": sampling.draw_cases,
    "sampling.logprobs": sampling.logprobs_cases,
    "sampling.penalise": sampling.penalise_cases,
}
"""The grid of each op, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One kernel over the cases of one kind of operand.

    Attributes:
        kernel: what is checked.
        operand: format of the main operand, and what sets it apart.
        cases: none where the kernel cannot be checked.
        unchecked: why it cannot; None where it can.
    """

    kernel: Kernel
    operand: str
    cases: tuple[Case, ...] = ()
    unchecked: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a kernel did in one case.

    Attributes:
        case: what it computed.
        error: the largest of its results' errors; infinite where it raised.
        tolerance: the error allowed.
        failure: what is wrong, in words; None if nothing is.
    """

    case: Case
    error: float
    tolerance: float
    failure: str | None


def plan_runs(
    registry: Registry,
    *,
    platform: Platform,
    ops: Iterable[str] = (),
    solution: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Run]:
    """Every kernel with the cases it handles, in order of ops and of preference.

    A kernel's formats for which there are no cases, and kernels that cannot run here, are runs
    without cases.

    Args:
        registry: where kernels are looked up.
        platform: what the device offers.
        ops: those to look at; all if there are none.
        solution: the only one to look at; all if None.
        dtype: the only element type of activations to look at; all if None.

    Raises:
        KernelError: no such op, or none of them has such a solution.
    """
    names = sorted({registry.op(name).name for name in ops} or registry.ops)
    kernels = [kernel for name in names for kernel in registry.candidates(name)]
    solutions = sorted({kernel.solution for kernel in kernels})
    if solution is not None and solution not in solutions:
        raise KernelError(
            f"no kernel of the solution {solution!r} to verify; solutions here are "
            f"{', '.join(solutions) or 'none'}"
        )
    return [
        run
        for kernel in kernels
        if solution in (None, kernel.solution)
        for run in _runs_of(kernel, platform, dtype)
    ]


def verify(
    kernel: Kernel, case: Case, *, runtime: CpuRuntime, device: torch.device | None = None
) -> Outcome:
    """Run a kernel in one case, and compare its results with the formula.

    Args:
        kernel: anybody's.
        case: one it handles.
        runtime: threads, memory and instruction set of native kernels.
        device: where operands are copied to and results from; None for neither.
    """
    call = kernel.call
    if kernel.takes_runtime:
        call = functools.partial(call, runtime=runtime)
    if device is not None:
        call = on_device(call, device)
    tolerance = TOLERANCES[case.op].of(case)
    worst, faults = 0.0, []
    try:
        for compared in case.check(call, runtime):
            worst = max(worst, compared.error)
            if compared.mismatch is not None:
                faults.append(f"{compared.what} {compared.mismatch}")
            elif not compared.error <= tolerance:
                faults.append(f"{compared.what}: error {compared.error:.1e}")
    # Kernels are anybody's code: that one raises must not hide how the others do.
    except Exception as error:
        worst = torch.inf
        faults.append(f"{type(error).__name__}: {error}")
    return Outcome(case=case, error=worst, tolerance=tolerance, failure="; ".join(faults) or None)


def _runs_of(kernel: Kernel, platform: Platform, dtype: torch.dtype | None) -> Iterator[Run]:
    unmet = kernel.requires.unmet_by(platform)
    formats = ("any format",) if kernel.formats is ANY else tuple(kernel.formats)
    if unmet is not None:
        yield Run(kernel=kernel, operand=", ".join(sorted(formats)), unchecked=unmet)
        return
    grid = list(CASES[kernel.op]()) if kernel.op in CASES else []
    known = {case.format_name for case in grid}
    for name in sorted(formats):
        if name not in known and (kernel.formats is not ANY or not grid):
            why = "there are no cases of this format" if grid else "there are no cases of this op"
            yield Run(kernel=kernel, operand=name, unchecked=why)
    by_operand: dict[str, list[Case]] = {}
    for case in grid:
        if dtype in (None, case.dtype) and not objection(
            kernel, platform, format_name=case.format_name, traits=case.traits
        ):
            by_operand.setdefault(case.operand, []).append(case)
    for operand, cases in by_operand.items():
        yield Run(kernel=kernel, operand=operand, cases=tuple(cases))


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The one that lies farthest from the formula, measured by what is allowed."""
    return max(outcomes, key=lambda outcome: (outcome.failure is not None, outcome.error))
