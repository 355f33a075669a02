"""KV storage: the tensors that page numbers index.

Legend: P pages, C positions of a page, H KV heads, D elements of a head.
"""

from collections.abc import Sequence

import torch

from tokenspeed.core.config import KVSpec
from tokenspeed.core.errors import InsufficientMemory

__all__ = ["KVPool", "KVPools"]


class KVPool:
    """K and V of one cache group: per layer two tensors [P, C, H, D].

    The memory is reserved, not written: an operating system that maps pages on first touch
    charges the process only for what requests fill. A position is read only after the step
    that wrote it, so what an untouched one holds never matters.

    Args:
        spec: layers, heads and element type.
        pages: P.
        page_size: C.
        device: where the tensors live.

    Raises:
        InsufficientMemory: the device cannot hold the pool.
    """

    def __init__(self, spec: KVSpec, *, pages: int, page_size: int, device: torch.device) -> None:
        self.spec = spec
        self.pages = pages
        self.page_size = page_size
        shape = (pages, page_size, spec.kv_heads, spec.head_dim)
        dtype = _ELEMENTS[spec.dtype]
        try:
            self._layers = tuple(
                (
                    torch.empty(shape, dtype=dtype, device=device),
                    torch.empty(shape, dtype=dtype, device=device),
                )
                for _ in range(spec.layers)
            )
        except (RuntimeError, MemoryError) as error:
            raise InsufficientMemory(
                f"a KV pool of {pages} pages needs {self.size_bytes:,} bytes on {device}, "
                "which it does not have. Lower --kv-cache-memory."
            ) from error

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_PCHD and v_PCHD of layer `index` of the group."""
        return self._layers[index]

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers' K and V."""
        return self.pages * self.page_size * self.spec.token_size_bytes


class KVPools:
    """The pools of a model, one per cache group, in the order of `Model.kv_specs()`.

    Args:
        specs: what each group keeps of a token.
        pages: pages of each group.
        page_size: token positions of a page.
        device: where the tensors live.

    Raises:
        InsufficientMemory: the device cannot hold them.
    """

    def __init__(
        self, specs: Sequence[KVSpec], *, pages: int, page_size: int, device: torch.device
    ) -> None:
        self.pools = tuple(
            KVPool(spec, pages=pages, page_size=page_size, device=device) for spec in specs
        )

    def layer(self, group: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_PCHD and v_PCHD of a layer, counted within its group."""
        return self.pools[group].layer(layer)

    @property
    def size_bytes(self) -> int:
        """Bytes of all groups."""
        return sum(pool.size_bytes for pool in self.pools)


_ELEMENTS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
