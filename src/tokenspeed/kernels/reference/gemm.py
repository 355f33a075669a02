"""Matrix products with dense weights.

Legend: T tokens, S sampled tokens, I inputs, O outputs, V vocabulary.
"""

import torch
import torch.nn.functional as F

from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["linear", "logits"]

DENSE = ("float32", "bfloat16", "float16")


@kernel(
    "gemm.linear",
    solution="reference",
    formats=DENSE,
    traits={"bias": ANY},
    priority=Priority.REFERENCE,
)
def linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """PyTorch's own product, which on CPUs is oneDNN's in bfloat16."""
    return F.linear(x_TI, weight_OI, bias_O)


@kernel("gemm.logits", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def logits(x_SI: torch.Tensor, weight_VI: torch.Tensor) -> torch.Tensor:
    """float32 logits without a float32 copy of the weights.

    PyTorch gives a bfloat16 product rounded to bfloat16. A second product from which the first
    is subtracted inside the float32 accumulator gives what the rounding lost: two passes over
    the weights, and an error near 2^-17 instead of 2^-9.
    """
    rounded_SV = F.linear(x_SI, weight_VI)
    if rounded_SV.dtype == torch.float32:
        return rounded_SV
    lost_SV = torch.addmm(rounded_SV, x_SI, weight_VI.T, beta=-1)
    return rounded_SV.float() + lost_SV.float()
