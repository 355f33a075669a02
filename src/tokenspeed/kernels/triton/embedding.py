"""Table lookups.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

import torch

from tokenspeed.kernels.reference.embedding import rows_held
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import next_power_of_2, triton_kernel

__all__ = ["lookup", "take"]

_device = DeviceCode("rows")
_BLOCK_MAX = 1024


@triton_kernel("embedding.lookup")
def lookup(
    token_ids_T: torch.Tensor,
    table_VM: torch.Tensor,
    scale: float = 1.0,
    first: int | None = None,
) -> torch.Tensor:
    """A copy that widens."""
    if first is None:
        x_TM = _taken(table_VM, token_ids_T, torch.float32)
    else:
        ids_T, held_T1 = rows_held(token_ids_T, table_VM, first)
        x_TM = _taken(table_VM, ids_T, torch.float32).mul_(held_T1)
    return x_TM if scale == 1.0 else x_TM.mul_(scale)


@triton_kernel("embedding.take")
def take(x_TM: torch.Tensor, indices_S: torch.Tensor) -> torch.Tensor:
    """A copy."""
    return _taken(x_TM, indices_S, x_TM.dtype)


def _taken(table_XM: torch.Tensor, indices_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    features = table_XM.shape[1]
    taken_NM = torch.empty((len(indices_N), features), dtype=dtype, device=table_XM.device)
    if taken_NM.numel():
        if table_XM.stride(-1) != 1:
            table_XM = table_XM.contiguous()
        block = min(_BLOCK_MAX, next_power_of_2(features))
        _device.take_rows[(len(indices_N), -(-features // block))](
            table_XM,
            indices_N,
            taken_NM,
            features,
            table_XM.stride(0),
            BLOCK=block,
            num_warps=4,
        )
    return taken_NM
