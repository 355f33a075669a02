"""One set of operands for one op, and what comparing a kernel's results with the formula gives."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.registry import TraitValue

__all__ = [
    "HALF_TYPES",
    "TYPES",
    "Call",
    "Case",
    "Compared",
    "compare",
    "equal",
    "named",
    "noise",
    "stored",
]

Call = Callable[..., Any]
"""A kernel with everything bound but the op's parameters."""

HALF_TYPES = (torch.bfloat16, torch.float16)
TYPES = (torch.float32, *HALF_TYPES)
"""Element types of activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One result of a kernel beside the exact one.

    Attributes:
        what: which result.
        error: relative to the exact result; infinite where the two cannot be compared.
        mismatch: what is wrong beside the error, in words; None if nothing is.
    """

    what: str
    error: float
    mismatch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Operands of one op, made anew for each run from a fixed seed.

    Attributes:
        op: its name.
        format_name: format of the main operand, as selection sees it.
        dtype: element type of activations.
        name: sizes, in words.
        detail: what sets the operand apart from others of its format; None if nothing does.
        traits: those a caller of the op would state.
        check: runs a kernel and compares each of its results; the runtime packs weights.
    """

    op: str
    format_name: str
    dtype: torch.dtype
    name: str
    check: Callable[[Call, CpuRuntime], Iterator[Compared]]
    detail: str | None = None
    traits: Mapping[str, TraitValue] = field(default_factory=dict)

    @property
    def operand(self) -> str:
        """The format, with what sets the operand apart."""
        return f"{self.format_name} {self.detail}" if self.detail else self.format_name


def named(dtype: torch.dtype) -> str:
    """The element type's name as formats have it."""
    return str(dtype).removeprefix("torch.")


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal random numbers that are the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def stored(x: torch.Tensor, format_name: str) -> torch.Tensor:
    """Numbers in the type of a format's KV pages, where it has one that activations have not."""
    if format_name != FLOAT8:
        return x
    most = torch.finfo(torch.float8_e4m3fn).max
    return x.float().clamp(-most, most).to(torch.float8_e4m3fn)


def compare(
    what: str,
    ours: object,
    exact: torch.Tensor,
    dtype: torch.dtype,
    *,
    size: torch.Tensor | None = None,
) -> Compared:
    """The relative error of a result.

    It is norm(ours - exact) / norm(exact), or half of the same of largest absolute values where
    that is more: a single wrong element must not drown in many right ones.

    Args:
        what: the result's name.
        ours: what the kernel gave.
        exact: float64.
        dtype: the element type the result must have.
        size: what the error is relative to; the exact result if None.
    """
    mismatch = _mismatch(ours, exact.shape, dtype)
    if mismatch is not None:
        return Compared(what=what, error=torch.inf, mismatch=mismatch)
    assert isinstance(ours, torch.Tensor)
    if not exact.numel():
        return Compared(what=what, error=0.0)
    difference = ours.double() - exact
    size = exact if size is None else size
    by_norm = _ratio(difference.norm(), size.norm())
    by_largest = _ratio(difference.abs().max(), size.abs().max()) / 2
    return Compared(what=what, error=max(by_norm, by_largest))


def equal(what: str, ours: object, exact: torch.Tensor) -> Compared:
    """The share of elements that differ, for results that have one right answer.

    Args:
        what: the result's name.
        ours: what the kernel gave.
        exact: of the element type the result must have.
    """
    mismatch = _mismatch(ours, exact.shape, exact.dtype)
    if mismatch is not None:
        return Compared(what=what, error=torch.inf, mismatch=mismatch)
    assert isinstance(ours, torch.Tensor)
    wrong = int((ours != exact).sum())
    if not wrong:
        return Compared(what=what, error=0.0)
    return Compared(
        what=what,
        error=wrong / exact.numel(),
        mismatch=f"differs in {wrong} of {exact.numel()} elements",
    )


def _mismatch(ours: object, shape: torch.Size, dtype: torch.dtype) -> str | None:
    wanted = f"{named(dtype)} {list(shape)}"
    if not isinstance(ours, torch.Tensor):
        return f"is {type(ours).__name__}, not a tensor of {wanted}"
    if ours.dtype != dtype or ours.shape != shape:
        return f"is {named(ours.dtype)} {list(ours.shape)}, not {wanted}"
    return None


def _ratio(difference: torch.Tensor, size: torch.Tensor) -> float:
    if not difference:
        return 0.0
    # No comparison with NaN is true, and such a result must not pass.
    ratio = float(difference / size)
    return ratio if ratio == ratio else torch.inf  # noqa: PLR0124
