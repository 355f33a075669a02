"""Names of the formats that KV pages may have."""

from typing import Final

import torch

__all__ = ["FLOAT8", "ROUNDED", "kv_formats", "pool_format"]

FLOAT8: Final = "float8_e4m3fn"
"""Numbers of 8 bits without scales, in the plain order; what lies beyond 448 becomes that."""

ROUNDED: Final = "interleaved_int8"
"""Whole numbers of 8 bits with a scale for each position and head."""

# Interleaved pages hold whole vectors of positions.
_POSITIONS = 16


def kv_formats(dtype_name: str, *, page_size: int) -> tuple[str, ...]:
    """Formats of pages whose elements are of a type, best first; none if there is none.

    Args:
        dtype_name: "float32", "bfloat16", "float16", "int8" or "float8_e4m3fn".
        page_size: positions of a page.
    """
    if dtype_name == FLOAT8:
        return (FLOAT8,)
    interleaved = (f"interleaved_{dtype_name}",) if page_size % _POSITIONS == 0 else ()
    return interleaved if dtype_name == "int8" else (*interleaved, dtype_name)


def pool_format(pool_PCHD: torch.Tensor) -> str:
    """The format of a pool of which no more is known than its type."""
    if pool_PCHD.dtype == torch.int8:
        return ROUNDED
    return str(pool_PCHD.dtype).removeprefix("torch.")
