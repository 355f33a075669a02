"""Owns the declarations of rotary position embeddings; never computes one.

Legend: T tokens, H heads, D elements of a head, E = D / 2.
"""

import torch

from tokenspeed.kernels.registry import declare_op

__all__ = ["angles", "rotate"]


@declare_op("rope.angles")
def angles(
    positions_T: torch.Tensor, frequencies_E: torch.Tensor, length: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_TE, sin_TE) of position times frequency, each times a length.

    Positions are int64, frequencies float32, and so are their products, as where models were
    trained. Cosine and sine are rounded to float32 before the length multiplies them.
    """
    return angles.best(frequencies_E)(positions_T, frequencies_E, length)


@declare_op("rope.rotate", traits=("head_dim",))
def rotate(x_THD: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """Rotate element i of each head with element i + D/2 by its token's angle i.

    This is the layout of Hugging Face checkpoints ("rotate half" of RoFormer, Su et al. 2021).
    cos and sin are float32 and so is the arithmetic; the result has x's type.

    Traits:
        head_dim: D.
    """
    return rotate.best(x_THD, head_dim=x_THD.shape[2])(x_THD, cos_TE, sin_TE)
