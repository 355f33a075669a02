"""Rotary position embeddings.

Legend: T tokens, H heads, D elements of a head, E = D / 2.
"""

import torch

from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["angles", "rotate"]


@kernel("rope.angles", solution="reference", formats=("float32",), priority=Priority.REFERENCE)
def angles(
    positions_T: torch.Tensor, frequencies_E: torch.Tensor, length: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The angles, and their cosines and sines."""
    angles_TE = positions_T[:, None].float() * frequencies_E
    cos_TE, sin_TE = angles_TE.cos(), angles_TE.sin()
    return (cos_TE, sin_TE) if length == 1.0 else (cos_TE * length, sin_TE * length)


@kernel(
    "rope.rotate",
    solution="reference",
    formats=ANY,
    traits={"head_dim": ANY},
    priority=Priority.REFERENCE,
)
def rotate(x_THD: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """A rotation of the plane for each pair (i, i + E)."""
    first_THE, second_THE = x_THD.float().chunk(2, dim=-1)
    cos_T1E, sin_T1E = cos_TE[:, None], sin_TE[:, None]
    turned = (
        first_THE * cos_T1E - second_THE * sin_T1E,
        second_THE * cos_T1E + first_THE * sin_T1E,
    )
    return torch.cat(turned, dim=-1).to(x_THD.dtype)
