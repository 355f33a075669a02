"""KV storage: the tensors that page numbers index.

Legend: P pages, C positions of a page, H KV heads, D elements of a head, E elements of a latent.
"""

from collections.abc import Sequence

import torch

from tokenspeed.core.config import KVSpec
from tokenspeed.core.errors import InsufficientMemory
from tokenspeed.core.step import Int32Array
from tokenspeed.kernels.cpu import prefer_huge_pages

__all__ = ["KVPool", "KVPools"]


class KVPool:
    """K and V of one cache group: per layer two tensors [P, C, H, D], with D as wide as
    `KVSpec.head_elements` says; of latents one tensor [P, C, E].

    With `host_pages`, as much again for pages that left the device; on a GPU that memory is
    pinned, so that copies run beside the forward.

    The memory is reserved, not written: an operating system that maps pages on first touch
    charges the process only for what requests fill. A position is read only after the step
    that wrote it, so what an untouched one holds never matters.

    Args:
        spec: layers, heads and element type.
        pages: P.
        page_size: C.
        device: where the tensors live.
        host_pages: pages of the tier on the host.
        padded: whether there is one page more, behind those that plans name.

    Raises:
        InsufficientMemory: the device or the host cannot hold the pool.
    """

    def __init__(
        self,
        spec: KVSpec,
        *,
        pages: int,
        page_size: int,
        device: torch.device,
        host_pages: int = 0,
        padded: bool = False,
    ) -> None:
        self.spec = spec
        self.pages = pages
        self.page_size = page_size
        self.host_pages = host_pages
        self.padding_page = pages if padded else None
        try:
            self._layers = self._tensors(pages + padded, device)
        except (RuntimeError, MemoryError) as error:
            raise InsufficientMemory(
                f"a KV pool of {pages} pages needs {self.size_bytes:,} bytes on {device}, "
                "which it does not have. Lower --kv-cache-memory."
            ) from error
        try:
            self._host = self._tensors(
                host_pages, torch.device("cpu"), pinned=device.type == "cuda" and host_pages > 0
            )
        except (RuntimeError, MemoryError) as error:
            raise InsufficientMemory(
                f"a KV cache of {host_pages} pages on the host needs {self.host_size_bytes:,} "
                "bytes, which it does not have. Lower --host-cache-memory."
            ) from error

    def _tensors(
        self, pages: int, device: torch.device, *, pinned: bool = False
    ) -> tuple[tuple[torch.Tensor, ...], ...]:
        heads = () if self.spec.latent else (self.spec.kv_heads,)
        shape = (pages, self.page_size, *heads, self.spec.head_elements)
        dtype = _ELEMENTS[self.spec.dtype]

        def tensor() -> torch.Tensor:
            made = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
            if device.type == "cpu" and not pinned:
                # Attention jumps from page to page, and would look up each one's address.
                prefer_huge_pages(made)
            return made

        vectors = 1 if self.spec.latent else 2
        return tuple(tuple(tensor() for _ in range(vectors)) for _ in range(self.spec.layers))

    def store(self, pages: Int32Array, host_pages: Int32Array) -> None:
        """Copy pages [M] of the device to pages [M] of the host."""
        _copy(self._layers, pages, self._host, host_pages)

    def load(self, host_pages: Int32Array, pages: Int32Array) -> None:
        """Copy pages [M] of the host to pages [M] of the device."""
        _copy(self._host, host_pages, self._layers, pages)

    def clear_padding(self) -> None:
        """Fill the padding page with zeros: what rows that only fill up read is finite."""
        assert self.padding_page is not None
        for parts in self._layers:
            for part in parts:
                part[self.padding_page].zero_()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_PCHD and v_PCHD of layer `index` of the group."""
        k_PCHD, v_PCHD = self._layers[index]
        return k_PCHD, v_PCHD

    def latents(self, index: int) -> torch.Tensor:
        """latents_PCE of layer `index` of a group of latents."""
        (latents_PCE,) = self._layers[index]
        return latents_PCE

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers' K and V on the device."""
        return self.pages * self.page_size * self.spec.token_size_bytes

    @property
    def host_size_bytes(self) -> int:
        """Bytes of all layers' K and V on the host."""
        return self.host_pages * self.page_size * self.spec.token_size_bytes


class KVPools:
    """The pools of a model, one per cache group, in the order of `Model.kv_specs()`.

    Args:
        specs: what each group keeps of a token.
        pages: pages of each group.
        page_size: token positions of a page.
        device: where the tensors live.
        host_pages: pages of each group's tier on the host.
        padded: whether each has one page more, where rows write that only fill up a captured step.

    Raises:
        InsufficientMemory: the device or the host cannot hold them.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec],
        *,
        pages: int,
        page_size: int,
        device: torch.device,
        host_pages: int = 0,
        padded: bool = False,
    ) -> None:
        self.pools = tuple(
            KVPool(
                spec,
                pages=pages,
                page_size=page_size,
                device=device,
                host_pages=host_pages,
                padded=padded,
            )
            for spec in specs
        )

    def layer(self, group: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_PCHD and v_PCHD of a layer, counted within its group."""
        return self.pools[group].layer(layer)

    def latents(self, group: int, layer: int) -> torch.Tensor:
        """latents_PCE of a layer, counted within its group."""
        return self.pools[group].latents(layer)

    @property
    def size_bytes(self) -> int:
        """Bytes of all groups."""
        return sum(pool.size_bytes for pool in self.pools)


def _copy(
    sources: tuple[tuple[torch.Tensor, ...], ...],
    from_pages: Int32Array,
    targets: tuple[tuple[torch.Tensor, ...], ...],
    to_pages: Int32Array,
) -> None:
    for ours, others in zip(sources, targets, strict=True):
        for source, target in zip(ours, others, strict=True):
            chosen = torch.from_numpy(from_pages).to(source.device, torch.int64)
            places = torch.from_numpy(to_pages).to(target.device, torch.int64)
            target[places] = source[chosen].to(target.device)


_ELEMENTS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
