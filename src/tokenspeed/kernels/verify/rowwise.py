"""Norms, rotary positions, activations, and rows taken from a batch.

Legend: T tokens, S sampled tokens, M model features, H heads, D elements of a head, E = D / 2,
F features of the MLP.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.activations import QUANTISED_ROWS, QuantisedRows
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.verify.blocks import identity_weight
from tokenspeed.kernels.verify.case import (
    HALF_TYPES,
    TYPES,
    Call,
    Case,
    Compared,
    compare,
    equal,
    named,
    noise,
)

__all__ = [
    "add_rms_norm_cases",
    "angles_cases",
    "gelu_tanh_and_mul_cases",
    "rms_norm_cases",
    "rotate_cases",
    "silu_and_mul_cases",
    "take_cases",
]

_EPSILON = 1e-5
_FEATURES = ((1, 1), (3, 576), (5, 77), (9, 1000))
# Of quantised rows: one step, steps beyond those quantised at once, and rows beyond a tile.
_QUANTISED = ((1, 32), (3, 576), (7, 1536), (37, 96))
# Types that native products give.
_PRODUCTS = (torch.float32, torch.bfloat16)
# Behind the first slot for a rotated head lie others, as in one product of queries, keys, values.
_HEADS_BEHIND = 3


def rms_norm_cases() -> Iterator[Case]:
    """x of the weight's type, and wider than it; heads of a wider row."""
    yield from _norm_cases("norm.rms_norm", _rms_norm)
    for dtype in TYPES:
        yield Case(
            op="norm.rms_norm",
            format_name=named(dtype),
            dtype=dtype,
            name="5 x 3 heads x 64",
            check=partial(_head_norm, dtype),
        )


def add_rms_norm_cases() -> Iterator[Case]:
    """The sum must be the nearest float32; the norm starts from it."""
    yield from _norm_cases("norm.add_rms_norm", _add_rms_norm)


def _norm_cases(op: str, check: Callable[..., Iterator[Compared]]) -> Iterator[Case]:
    for x_type, dtype in _norm_types():
        for tokens, features in _FEATURES:
            yield Case(
                op=op,
                format_name=named(dtype),
                dtype=dtype,
                name=f"{tokens} x {features}, {named(x_type)}",
                check=partial(check, (tokens, features), x_type, dtype),
            )
        for tokens, features in _QUANTISED if dtype in _PRODUCTS else ():
            yield Case(
                op=op,
                format_name=QUANTISED_ROWS,
                dtype=dtype,
                name=f"{tokens} x {features}, {named(x_type)}",
                check=partial(check, (tokens, features), x_type, dtype),
            )


def take_cases() -> Iterator[Case]:
    """No row, the first and the last, one twice, all."""
    for dtype in TYPES:
        for shape in _FEATURES:
            yield Case(
                op="embedding.take",
                format_name=named(dtype),
                dtype=dtype,
                name=f"of {shape[0]} x {shape[1]}",
                check=partial(_take, shape, dtype),
            )


def angles_cases() -> Iterator[Case]:
    """Up to positions far in."""
    for frequencies in (1, 16, 33):
        yield Case(
            op="rope.angles",
            format_name="float32",
            dtype=torch.float32,
            name=f"{frequencies} frequencies",
            check=partial(_angles, frequencies),
        )


def rotate_cases() -> Iterator[Case]:
    """Heads that lie in a wider row."""
    for dtype in TYPES:
        for tokens, heads, head_dim in ((1, 1, 2), (5, 3, 64), (7, 11, 18), (3, 12, 128)):
            yield Case(
                op="rope.rotate",
                format_name=named(dtype),
                dtype=dtype,
                name=f"{tokens} x {heads} x {head_dim}",
                traits={"head_dim": head_dim},
                check=partial(_rotate, (tokens, heads, head_dim), dtype),
            )


def silu_and_mul_cases() -> Iterator[Case]:
    """Gates beyond where exp overflows, too."""
    yield from _gated_cases("activation.silu_and_mul", torch.nn.functional.silu)


def gelu_tanh_and_mul_cases() -> Iterator[Case]:
    """Gates beyond where exp overflows, too."""
    gelu = partial(torch.nn.functional.gelu, approximate="tanh")
    yield from _gated_cases("activation.gelu_tanh_and_mul", gelu)


def _gated_cases(op: str, gate: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Case]:
    for dtype in TYPES:
        for tokens, features in ((1, 1), (3, 96), (5, 77), (5, 1536)):
            yield Case(
                op=op,
                format_name=named(dtype),
                dtype=dtype,
                name=f"{tokens} x {features}",
                check=partial(_gated, gate, dtype, (tokens, features)),
            )
        for tokens, features in _QUANTISED if dtype in _PRODUCTS else ():
            yield Case(
                op=op,
                format_name=QUANTISED_ROWS,
                dtype=dtype,
                name=f"{tokens} x {features}",
                check=partial(_gated, gate, dtype, (tokens, features)),
            )


def _norm_types() -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Types of x and of the weight."""
    yield from ((dtype, dtype) for dtype in TYPES)
    yield from ((torch.float32, dtype) for dtype in HALF_TYPES)


def _exact_norm(x_TM: torch.Tensor, weight_M: torch.Tensor) -> torch.Tensor:
    wide_TM = x_TM.double()
    mean_T1 = wide_TM.square().mean(-1, keepdim=True)
    return wide_TM / torch.sqrt(mean_T1 + _EPSILON) * weight_M.double()


def _rms_norm(
    shape: tuple[int, int],
    x_type: torch.dtype,
    dtype: torch.dtype,
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    x_TM, weight_M = noise(*shape, dtype=x_type), noise(shape[1], dtype=dtype, seed=2)
    y_TM = kernel(x_TM, weight_M, _EPSILON)
    yield _compare("y", y_TM, _exact_norm(x_TM, weight_M), dtype, runtime)


def _head_norm(dtype: torch.dtype, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    x_THD = noise(5, 3 + _HEADS_BEHIND, 64, dtype=dtype)[:, :3]
    weight_D = noise(64, dtype=dtype, seed=2)
    yield compare("y", kernel(x_THD, weight_D, _EPSILON), _exact_norm(x_THD, weight_D), dtype)


def _add_rms_norm(
    shape: tuple[int, int],
    x_type: torch.dtype,
    dtype: torch.dtype,
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    x_TM, weight_M = noise(*shape, dtype=x_type), noise(shape[1], dtype=dtype, seed=2)
    residual_TM = noise(*shape, dtype=torch.float32, seed=1)
    y_TM, sum_TM = kernel(x_TM, residual_TM, weight_M, _EPSILON)
    exact_sum_TM = (x_TM.double() + residual_TM.double()).float()
    yield equal("the sum", sum_TM, exact_sum_TM)
    yield _compare("y", y_TM, _exact_norm(exact_sum_TM, weight_M), dtype, runtime)


def _take(
    shape: tuple[int, int], dtype: torch.dtype, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    x_TM = noise(*shape, dtype=dtype)
    for indices in ([], [0], [shape[0] - 1, 0, 0], list(range(shape[0]))):
        indices_S = torch.tensor(indices, dtype=torch.int64)
        yield equal(f"rows {indices}", kernel(x_TM, indices_S), x_TM[indices_S])


def _angles(frequencies: int, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    positions_T = torch.tensor([0, 1, 7, 5000, 131071])
    frequencies_E = 1.0 / 10000.0 ** (torch.arange(frequencies) / frequencies)
    # The product is rounded to float32 by the op's definition.
    turns_TE = (positions_T.float()[:, None] * frequencies_E).double()
    cos_TE, sin_TE = kernel(positions_T, frequencies_E)
    yield compare("the cosine", cos_TE, turns_TE.cos(), torch.float32)
    yield compare("the sine", sin_TE, turns_TE.sin(), torch.float32)
    cos_TE, sin_TE = kernel(positions_T, frequencies_E, 1.25)
    yield compare("1.25 of the cosine", cos_TE, 1.25 * turns_TE.cos(), torch.float32)
    yield compare("1.25 of the sine", sin_TE, 1.25 * turns_TE.sin(), torch.float32)


def _rotate(
    shape: tuple[int, int, int], dtype: torch.dtype, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    tokens, heads, head_dim = shape
    x_THD = noise(tokens, heads + _HEADS_BEHIND, head_dim, dtype=dtype)[:, :heads]
    turns_TE = noise(tokens, head_dim // 2, dtype=torch.float32, seed=1) * 100
    cos_TE, sin_TE = turns_TE.cos(), turns_TE.sin()
    # A pair is a complex number, and turning it a product with another.
    turn_T1E = torch.complex(cos_TE.double(), sin_TE.double())[:, None]
    turned_THE = torch.complex(*x_THD.double().chunk(2, -1)) * turn_T1E
    exact_THD = torch.cat((turned_THE.real, turned_THE.imag), -1)
    yield compare("x", kernel(x_THD, cos_TE, sin_TE), exact_THD, dtype)


def _gated(
    gate: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    shape: tuple[int, int],
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    tokens, features = shape
    gate_up_T2F = 8 * noise(tokens, 2 * features, dtype=dtype)
    if tokens > 1:
        gate_up_T2F[0, 0], gate_up_T2F[1, 0] = 200.0, -200.0
    gate_TF, up_TF = gate_up_T2F.double().chunk(2, -1)
    exact_TF = gate(gate_TF) * up_TF
    yield _compare("x", kernel(gate_up_T2F), exact_TF, dtype, runtime)


def _compare(
    what: str, ours: object, exact: torch.Tensor, dtype: torch.dtype, runtime: CpuRuntime
) -> Compared:
    """As `compare`; of quantised rows, what a product reads."""
    if not isinstance(ours, QuantisedRows):
        return compare(what, ours, exact, dtype)
    if ours.dtype != dtype or ours.shape != exact.shape:
        found = f"rows of {named(ours.dtype)} {list(ours.shape)}"
        return Compared(what=what, error=torch.inf, mismatch=f"are quantised {found}")
    read = torch.empty(exact.shape)
    weight = identity_weight(exact.shape[1], runtime=runtime)
    _cpu.linear(runtime, ours.memory, weight.matrices, None, read)
    return compare(what, read, exact, torch.float32)
