"""Matrix products with dense weights.

PyTorch's own (cuBLAS, hipBLAS) are the fastest there are, and choose how they sum by the number of
rows: they serve where that does not matter, and kernels of one tile where it does.

Legend: T tokens, S sampled tokens, H heads, I inputs, O outputs, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Final

import torch

from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.reference import gemm as reference
from tokenspeed.kernels.registry import ANY, Priority, registry
from tokenspeed.kernels.triton.attention import dot_precision
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import DENSE, triton_kernel

__all__ = ["heads", "linear", "logits"]

_device = DeviceCode("gemm")
_TILE: Final = {"M": 64, "N": 32}


def _of_the_library(op: str, call: Callable[..., object], **traits: Any) -> None:
    registry.kernel(
        op,
        solution="torch",
        requires=Capability(device="cuda"),
        formats=DENSE,
        traits=traits,
        priority=Priority.NATIVE,
        batch_dependent=True,
    )(call)


_of_the_library("gemm.heads", reference.heads)
_of_the_library("gemm.linear", reference.linear, bias=ANY)
_of_the_library("gemm.logits", reference.logits)


@triton_kernel("gemm.linear", traits={"bias": None})
def linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """Tiles of one size."""
    y_TO = x_TI.new_empty((len(x_TI), len(weight_OI)))
    _product(x_TI[:, None], weight_OI[None], bias_O, y_TO[:, None])
    return y_TO


@triton_kernel("gemm.heads")
def heads(x_THI: torch.Tensor, weight_HOI: torch.Tensor) -> torch.Tensor:
    """Tiles of one size, of each head."""
    y_THO = x_THI.new_empty((*x_THI.shape[:2], weight_HOI.shape[1]))
    _product(x_THI, weight_HOI, None, y_THO)
    return y_THO


@triton_kernel("gemm.logits")
def logits(x_SI: torch.Tensor, weight_VI: torch.Tensor) -> torch.Tensor:
    """Tiles of one size; float32 sums are stored as they are."""
    shape = (len(x_SI), len(weight_VI))
    y_SV = torch.empty(shape, dtype=torch.float32, device=x_SI.device)
    _product(x_SI[:, None], weight_VI[None], None, y_SV[:, None])
    return y_SV


def _product(
    x_THI: torch.Tensor,
    weight_HOI: torch.Tensor,
    bias_O: torch.Tensor | None,
    y_THO: torch.Tensor,
) -> None:
    tokens, count, inputs = x_THI.shape
    outputs = weight_HOI.shape[1]
    if not y_THO.numel():
        return
    if x_THI.stride(-1) != 1:
        x_THI = x_THI.contiguous()
    grid = (-(-outputs // _TILE["N"]), -(-tokens // _TILE["M"]), count)
    _device.product[grid](
        x_THI,
        weight_HOI.contiguous(),
        bias_O,
        y_THO,
        tokens,
        inputs,
        outputs,
        x_THI.stride(0),
        x_THI.stride(1),
        y_THO.stride(0),
        y_THO.stride(1),
        HAS_BIAS=bias_O is not None,
        INPUTS=64 if x_THI.dtype == torch.float32 else 128,
        PRECISION=dot_precision(x_THI.dtype),
        num_warps=4,
        num_stages=3,
        **_TILE,
    )
