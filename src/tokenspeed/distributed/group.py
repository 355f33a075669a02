"""Groups of ranks, and the collectives between their members.

Sums over ranks are made in float32 in the order of ranks, element by element, and rounded once. So
every member gets the same bits, and a token's bits do not depend on what else is in the batch, as
they would in a ring, where the order follows from an element's place.

All collectives are made of one, the all-to-all, which Gloo does in a round and in any sizes; what
each rank sends is what a ring would send, but for a short tensor that is summed: that one is sent
whole to every member, a round instead of two.
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import AllToAllOptions, FileStore, PrefixStore, Store
from torch.distributed import ProcessGroupGloo

from tokenspeed.core.errors import EngineError
from tokenspeed.distributed.mesh import Mesh, share

__all__ = ["LOOPBACK", "Group", "Store", "connect", "file_store", "gloo_group"]

# Of a sum: below it a round costs more than the bytes saved by a second one.
SHORT_SIZE_BYTES = 1 << 16
# The longest wait for another member. Whoever watches the engine gives it up after two seconds more
# of silence, in which the ranks say who was waited for.
COLLECTIVE_TIMEOUT_S = 6.5
LOOPBACK = "127.0.0.1"
CPU = torch.device("cpu")


class Group:
    """Ranks that share a tensor, seen from one of them. Made by `connect`.

    Every member calls the same collectives in the same order. One that waits for longer than
    `COLLECTIVE_TIMEOUT_S`, or whose peer is gone, raises EngineError.

    Args:
        process_group: torch's, of the same members in the same order.
        ranks: the members, by their rank in the mesh.
        index: which of them this one is.

    Attributes:
        calls: collectives so far.
    """

    def __init__(self, process_group: Any, ranks: Sequence[int], index: int) -> None:
        self.ranks = tuple(ranks)
        self.index = index
        self.calls = 0
        self._process_group = process_group
        self._options = AllToAllOptions()
        self._options.timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)

    @property
    def size(self) -> int:
        """Members."""
        return len(self.ranks)

    def all_reduce(self, x: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
        """The sum of all members' tensors, of x's type, or float32 where `wide`."""
        self.calls += 1
        dtype = torch.float32 if wide else x.dtype
        if self.size == 2 or x.nbytes <= SHORT_SIZE_BYTES:
            return _sum(self._exchange([x] * self.size, [x.shape] * self.size), dtype)
        flat = x.reshape(-1)
        sizes = [self._share(len(flat), rank) for rank in range(self.size)]
        mine = (sizes[self.index],)
        part = _sum(self._exchange(_split(flat, sizes), [mine] * self.size), dtype)
        parts = self._exchange([part] * self.size, [(size,) for size in sizes])
        return torch.cat(parts).view(x.shape)

    def merge(self, parts: torch.Tensor) -> torch.Tensor:
        """All members' parts of a softmax put together in the order of ranks, with the logarithm of
        the whole sum behind them; see `PartialSoftmax`.

        Args:
            parts: float32 [..., X]: X - 1 elements of a mean, then the logarithm of its sum.
        """
        self.calls += 1
        rows = parts.reshape(-1, parts.shape[-1])
        if self.size == 2 or rows.nbytes <= SHORT_SIZE_BYTES:
            return _merged(self._exchange([rows] * self.size, [rows.shape] * self.size)).view(
                parts.shape
            )
        sizes = self.shares(len(rows))
        pieces = _split(rows, sizes)
        mine = _merged(self._exchange(pieces, [pieces[self.index].shape] * self.size))
        shapes = [_with(rows.shape, 0, size) for size in sizes]
        return torch.cat(self._exchange([mine] * self.size, shapes)).view(parts.shape)

    def reduce_scatter(self, x: torch.Tensor, *, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """This member's share of the sum; `sizes` are all members' shares of `dim`."""
        self.calls += 1
        pieces = _split(x, sizes, dim)
        shape = pieces[self.index].shape
        return _sum(self._exchange(pieces, [shape] * self.size), x.dtype)

    def all_gather(self, x: torch.Tensor, *, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """All members' shares put together along `dim`; `sizes` are what they have of it."""
        self.calls += 1
        shapes = [_with(x.shape, dim, size) for size in sizes]
        return torch.cat(self._exchange([x] * self.size, shapes), dim)

    def all_to_all(
        self,
        x: torch.Tensor,
        *,
        split_dim: int,
        split_sizes: Sequence[int],
        join_dim: int,
        join_sizes: Sequence[int],
    ) -> torch.Tensor:
        """Divide along one dimension what was divided along another."""
        self.calls += 1
        mine = _with(x.shape, split_dim, split_sizes[self.index])
        shapes = [_with(mine, join_dim, size) for size in join_sizes]
        return torch.cat(self._exchange(_split(x, split_sizes, split_dim), shapes), join_dim)

    def shares(self, total: int) -> list[int]:
        """How a count of tokens is divided over the members."""
        return [self._share(total, index) for index in range(self.size)]

    def _share(self, total: int, index: int) -> int:
        first, end = share(total, self.size, index)
        return end - first

    def _exchange(
        self, sent: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Send a tensor to each member, and get theirs, of known shapes and one type."""
        flat = torch.cat([piece.reshape(-1) for piece in sent])
        sizes = [torch.Size(shape).numel() for shape in shapes]
        received = flat.new_empty(sum(sizes))
        sent_sizes = [piece.numel() for piece in sent]
        try:
            self._process_group.alltoall_base(
                received, flat, sizes, sent_sizes, self._options
            ).wait()
        except RuntimeError as error:
            raise EngineError(
                f"ranks {', '.join(map(str, self.ranks))} lost each other: {error}"
            ) from error
        return [
            piece.view(list(shape))
            for piece, shape in zip(_split(received, sizes), shapes, strict=True)
        ]


def file_store(path: Path, ranks: int) -> Store:
    """Where ranks of one host find each other; the file need not exist yet."""
    return FileStore(str(path), ranks)


def connect(
    mesh: Mesh,
    rank: int,
    groups: Sequence[tuple[int, ...]],
    *,
    store: Store,
    address: str = LOOPBACK,
    device: torch.device = CPU,
    timeout_s: float = 8.0,
) -> dict[tuple[int, ...], Group]:
    """Connect a rank to the other members of its groups: over Gloo, or NCCL where it has a GPU.

    Args:
        mesh: all ranks, each of which calls this.
        rank: this one.
        groups: cells of each group, the same and in the same order on all ranks.
        store: where ranks find each other.
        address: of this host, on which Gloo listens.
        device: where the tensors are that ranks exchange.
        timeout_s: the longest wait for another member.

    Raises:
        EngineError: another member did not come in time.
    """
    found = {}
    for number, cells in enumerate(groups):
        (ranks,) = (ranks for ranks in mesh.groups(cells) if rank in ranks)
        prefixed = PrefixStore(f"{number}/{'-'.join(map(str, ranks))}/", store)
        if device.type == "cuda":
            process_group = _nccl_group(prefixed, rank, ranks, timeout_s=timeout_s)
        else:
            process_group = gloo_group(prefixed, rank, ranks, address=address, timeout_s=timeout_s)
        found[cells] = Group(process_group, ranks, ranks.index(rank))
    return found


def gloo_group(
    store: Store, rank: int, ranks: Sequence[int], *, address: str, timeout_s: float
) -> Any:
    """torch's group of some ranks over Gloo; raises EngineError where one does not come."""
    # Gloo alone of torch's groups is asked for by a name that is not public; with its public
    # constructor it would look up the host's name, and listen on whatever that means.
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    try:
        return ProcessGroupGloo(store, ranks.index(rank), len(ranks), options)
    except RuntimeError as error:
        raise EngineError(
            f"rank {rank} did not find ranks {', '.join(map(str, ranks))} within "
            f"{timeout_s:g} s: {error}"
        ) from error


def _nccl_group(store: Store, rank: int, ranks: Sequence[int], *, timeout_s: float) -> Any:
    # Only builds for NVIDIA's and AMD's devices have it.
    from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupNCCL(store, ranks.index(rank), len(ranks), options)


def _split(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[torch.Tensor, ...]:
    return torch.split(x, list(sizes), dim)


def _sum(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)


def _merged(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    # Exponents in float64 and rounded once: PyTorch's of float32 may differ in their last bit by
    # where in a tensor a number stands.
    logs = [part[:, -1:].double() for part in parts]
    most = torch.stack(logs).amax(0)
    weights = [(log - most).exp() for log in logs]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    mean = parts[0][:, :-1] * (weights[0] / total).float()
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        mean = mean + part[:, :-1] * (weight / total).float()
    return torch.cat((mean, (most + total.log()).float()), dim=1)


def _with(shape: Sequence[int], dim: int, size: int) -> list[int]:
    sizes = list(shape)
    sizes[dim] = size
    return sizes
