"""Gated activations.

Legend: T tokens, F features of the MLP.
"""

import torch

from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import next_power_of_2, triton_kernel

__all__ = ["gelu_tanh_and_mul", "silu_and_mul"]

_device = DeviceCode("activation")
_BLOCK_MAX = 1024


@triton_kernel("activation.silu_and_mul")
def silu_and_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """One pass in float32, rounded once."""
    return _gate(gate_up_T2F, gelu=False)


@triton_kernel("activation.gelu_tanh_and_mul")
def gelu_tanh_and_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """One pass in float32, rounded once."""
    return _gate(gate_up_T2F, gelu=True)


def _gate(gate_up_T2F: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    tokens, features = len(gate_up_T2F), gate_up_T2F.shape[1] // 2
    x_TF = gate_up_T2F.new_empty((tokens, features))
    if x_TF.numel():
        if gate_up_T2F.stride(-1) != 1:
            gate_up_T2F = gate_up_T2F.contiguous()
        block = min(_BLOCK_MAX, next_power_of_2(features))
        _device.gate_and_mul[(tokens, -(-features // block))](
            gate_up_T2F,
            x_TF,
            features,
            gate_up_T2F.stride(0),
            GELU=gelu,
            BLOCK=block,
            num_warps=4,
        )
    return x_TF
