"""Matrix products with weights as quantised checkpoints have them.

Weights of four bits are multiplied with activations as they are (W4A16). Beside FP8 in blocks
activations become FP8 too, with a scale for each token and as many inputs as a block has
(DeepSeek-V3, 2024, section 3.3). Of few tokens a product reads half a byte or one for each weight
and does as many operations as a dense one.

Legend: T tokens, I inputs, O outputs, G groups of inputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tokenspeed.kernels.activations import Activations
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.quantised import (
    FLOAT8_BLOCKS,
    INT4_GROUPS,
    Float8Blocks,
    Int4Groups,
    QuantisedMatrix,
)
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.triton import gemm
from tokenspeed.kernels.triton.attention import dot_precision
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import next_power_of_2, triton_kernel
from tokenspeed.kernels.triton.tuning import tuned
from tokenspeed.kernels.weights import Matrix

__all__ = [
    "FLOAT8_GPU",
    "float8_rows",
    "linear_float8",
    "linear_float8_fixed",
    "linear_int4",
    "linear_int4_fixed",
]

_device = DeviceCode("quantised")
_OP = "gemm.linear"
_FLOAT8 = torch.float8_e4m3fn
FLOAT8_GPU = Capability(device="cuda", features=frozenset({"triton"}), arch_min=(8, 9))
"""Whose matrix units multiply numbers of FP8."""

_ROWS_MIN, _ROWS_MAX, _ROWS_FIXED = 16, 128, 64
_GROUPS_AT_ONCE = 8

_Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@triton_kernel(_OP, formats=(INT4_GROUPS,), traits={"bias": None}, batch_dependent=True)
def linear_int4(x_TI: Activations, weight_OI: Matrix, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Tiles as high as there are tokens; dense parts by the library."""
    return _product(x_TI, weight_OI, bias_O, fixed=False)


@triton_kernel(_OP, formats=(INT4_GROUPS,), traits={"bias": None})
def linear_int4_fixed(
    x_TI: Activations, weight_OI: Matrix, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """Tiles of one height: a row's sums have one order in any batch."""
    return _product(x_TI, weight_OI, bias_O, fixed=True)


@triton_kernel(
    _OP, formats=(FLOAT8_BLOCKS,), traits={"bias": None}, requires=FLOAT8_GPU, batch_dependent=True
)
def linear_float8(
    x_TI: Activations, weight_OI: Matrix, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """As `linear_int4`, but activations are rounded to FP8 first."""
    return _product(x_TI, weight_OI, bias_O, fixed=False)


@triton_kernel(_OP, formats=(FLOAT8_BLOCKS,), traits={"bias": None}, requires=FLOAT8_GPU)
def linear_float8_fixed(
    x_TI: Activations, weight_OI: Matrix, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """As `linear_int4_fixed`, but activations are rounded to FP8 first."""
    return _product(x_TI, weight_OI, bias_O, fixed=True)


def float8_rows(x_TI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in FP8 [T, I], and their float32 scales [T, G], one for each `group` inputs."""
    tokens, inputs = x_TI.shape
    groups = -(-inputs // group)
    values_TI = torch.empty((tokens, inputs), dtype=_FLOAT8, device=x_TI.device)
    scales_TG = torch.empty((tokens, groups), dtype=torch.float32, device=x_TI.device)
    at_once = min(_GROUPS_AT_ONCE, next_power_of_2(groups))
    _device.quantise_rows[(tokens, -(-groups // at_once))](
        x_TI,
        values_TI,
        scales_TG,
        inputs,
        groups,
        x_TI.stride(0),
        torch.finfo(_FLOAT8).max,
        STEP=group,
        GROUPS=at_once,
        num_warps=4,
    )
    return values_TI, scales_TG


def _product(
    x_TI: Activations, weight_OI: Matrix, bias_O: torch.Tensor | None, *, fixed: bool
) -> torch.Tensor:
    assert isinstance(x_TI, torch.Tensor)
    assert isinstance(weight_OI, QuantisedWeight)
    if x_TI.stride(-1) != 1:
        x_TI = x_TI.contiguous()
    dense: _Dense = gemm.linear if fixed else F.linear
    matrices = weight_OI.matrices
    if len(matrices) == 1 and isinstance(matrices[0], torch.Tensor):
        return dense(x_TI, matrices[0], bias_O)
    y_TO = x_TI.new_empty((len(x_TI), weight_OI.shape[0]))
    if not y_TO.numel():
        return y_TO
    first = 0
    for matrix in matrices:
        end = first + matrix.shape[0]
        part_TO = y_TO[:, first:end]
        of_part = None if bias_O is None else bias_O[first:end]
        if isinstance(matrix, torch.Tensor):
            part_TO.copy_(dense(x_TI, matrix, of_part))
        elif isinstance(matrix, Int4Groups):
            _int4(x_TI, matrix, of_part, part_TO, fixed=fixed)
        elif isinstance(matrix, Float8Blocks):
            _float8(x_TI, matrix, of_part, part_TO, fixed=fixed)
        else:
            # Checkpoints of MXFP4 have experts and nothing else.
            part_TO.copy_(dense(x_TI, matrix.to_float().to(x_TI.dtype), of_part))
        first = end
    return y_TO


def _int4(
    x_TI: torch.Tensor,
    matrix: Int4Groups,
    bias_O: torch.Tensor | None,
    y_TO: torch.Tensor,
    *,
    fixed: bool,
) -> None:
    tile, launch = _tile(x_TI, matrix, fixed=fixed)
    _device.product_int4[_grid(y_TO, tile)](
        x_TI,
        matrix.numbers,
        matrix.scales_OG,
        matrix.zeros_OG,
        bias_O,
        y_TO,
        *x_TI.shape,
        matrix.shape[0],
        x_TI.stride(0),
        y_TO.stride(0),
        GROUP=matrix.group,
        HAS_ZEROS=matrix.zeros_OG is not None,
        HAS_BIAS=bias_O is not None,
        STEP=matrix.step,
        PRECISION=dot_precision(x_TI.dtype),
        **tile,
        **launch,
    )


def _float8(
    x_TI: torch.Tensor,
    matrix: Float8Blocks,
    bias_O: torch.Tensor | None,
    y_TO: torch.Tensor,
    *,
    fixed: bool,
) -> None:
    values_TI, scales_TG = float8_rows(x_TI, matrix.group)
    tile, launch = _tile(x_TI, matrix, fixed=fixed)
    _device.product_float8[_grid(y_TO, tile)](
        values_TI,
        scales_TG,
        matrix.values_OI,
        matrix.scales_BG,
        matrix.blocks_O,
        bias_O,
        y_TO,
        *x_TI.shape,
        matrix.shape[0],
        matrix.scales_BG.shape[1],
        y_TO.stride(0),
        HAS_BIAS=bias_O is not None,
        STEP=matrix.step,
        **tile,
        **launch,
    )


def _tile(
    x_TI: torch.Tensor, matrix: QuantisedMatrix, *, fixed: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Rows and outputs of a tile, and how it is run."""
    rows = min(_ROWS_MAX, max(_ROWS_MIN, next_power_of_2(len(x_TI))))
    rows = _ROWS_FIXED if fixed else rows
    few = rows <= _ROWS_FIXED
    kind = f"{'fp8' if isinstance(matrix, Float8Blocks) else 'int4'} of {matrix.group}"
    sizes = tuned(
        _OP,
        f"{rows} rows, {kind}, {x_TI.dtype}",
        x_TI.device,
        outputs=32 if few else 64,
        warps=4 if few else 8,
        stages=4 if few else 2,
    )
    tile = {"M": rows, "N": sizes["outputs"]}
    return tile, {"num_warps": sizes["warps"], "num_stages": sizes["stages"]}


def _grid(y_TO: torch.Tensor, tile: dict[str, int]) -> tuple[int, int]:
    tokens, outputs = y_TO.shape
    return -(-outputs // tile["N"]), -(-tokens // tile["M"])
