"""Matrix products with dense weights.

Legend: T tokens, S sampled tokens, H heads, I inputs, O outputs, V vocabulary,
C a cut of it.
"""

import torch
import torch.nn.functional as F

from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["DENSE", "heads", "linear", "logits"]

# 4 MiB of two-byte weights.
ELEMENTS_IN_CACHE = 1 << 21
DENSE = ("float32", "bfloat16", "float16")
"""Formats of weights that are plain tensors."""


@kernel(
    "gemm.linear",
    solution="reference",
    formats=DENSE,
    traits={"bias": ANY},
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """PyTorch's own product, which on CPUs is oneDNN's in bfloat16."""
    return F.linear(x_TI, weight_OI, bias_O)


@kernel(
    "gemm.heads",
    solution="reference",
    formats=DENSE,
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def heads(x_THI: torch.Tensor, weight_HOI: torch.Tensor) -> torch.Tensor:
    """A batch of products, one a head."""
    return torch.bmm(x_THI.transpose(0, 1), weight_HOI.transpose(1, 2)).transpose(0, 1)


@kernel(
    "gemm.logits",
    solution="reference",
    formats=DENSE,
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def logits(x_SI: torch.Tensor, weight_VI: torch.Tensor) -> torch.Tensor:
    """float32 logits without a float32 copy of the weights.

    PyTorch rounds a bfloat16 product to bfloat16. A second product from which the first is
    subtracted inside the float32 accumulator gives what the rounding lost: twice the work, and
    an error near 2^-17 instead of 2^-9. The vocabulary is cut so that the second product finds
    its weights in the cache.
    """
    if x_SI.dtype == torch.float32:
        return F.linear(x_SI, weight_VI)
    logits_SV = x_SI.new_empty((len(x_SI), len(weight_VI)), dtype=torch.float32)
    cut = max(1, ELEMENTS_IN_CACHE // weight_VI.shape[1])
    for weight_CI, logits_SC in zip(
        torch.split(weight_VI, cut), torch.split(logits_SV, cut, dim=1), strict=True
    ):
        rounded_SC = F.linear(x_SI, weight_CI)
        lost_SC = torch.addmm(rounded_SC, x_SI, weight_CI.T, beta=-1)
        logits_SC.copy_(rounded_SC).add_(lost_SC)
    return logits_SV
