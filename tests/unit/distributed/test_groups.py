"""The mesh, and collectives over real Gloo: the same bits on all ranks, in any cut."""

import itertools
from pathlib import Path

import pytest
import torch
from tests.support.ranks import in_threads
from torch.distributed import Store

from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.distributed import Mesh, connect, file_store, share
from tokenspeed.distributed.group import SHORT_SIZE_BYTES


def test_both_views_of_a_mesh_are_made_of_the_same_cells() -> None:
    mesh = Mesh(tp=4, ep=2)
    assert mesh.cells == (2, 2)
    assert mesh.cells_of("tp") == (0, 1)
    assert mesh.cells_of("ep", experts=True) == (0,)
    assert mesh.cells_of("tp", experts=True) == (1,)
    assert mesh.groups((0,)) == ((0, 2), (1, 3))
    assert [mesh.index(rank, (0, 1)) for rank in range(4)] == [0, 1, 2, 3]
    assert Mesh(dp=2, tp=2, ep=4).cells_of("ep", experts=True) == (0, 1)
    assert Mesh().cells == ()


def test_degrees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tp must be at least 1"):
        Mesh(tp=0)
    with pytest.raises(ConfigError, match="--ep 3 does not divide the 4 ranks"):
        Mesh(tp=4, ep=3)
    with pytest.raises(ConfigError, match="neither divides nor is divided by tp 3"):
        Mesh(dp=2, tp=3, ep=3)


@pytest.mark.parametrize(("units", "ranks"), [(7, 3), (2, 4), (0, 2), (8, 4)])
def test_shares_follow_each_other_and_differ_by_one_at_most(units: int, ranks: int) -> None:
    found = [share(units, ranks, index) for index in range(ranks)]
    assert found[0][0] == 0 and found[-1][1] == units
    assert all(one[1] == other[0] for one, other in itertools.pairwise(found))
    sizes = [end - first for first, end in found]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_row_of_a_sum_is_the_same_bits_in_long_and_short_tensors(
    ranks: int, dtype: torch.dtype
) -> None:
    rows = SHORT_SIZE_BYTES // 64

    def run(rank: int, store: Store) -> torch.Tensor:
        mesh = Mesh(tp=ranks)
        group = connect(mesh, rank, [(0,)], store=store)[(0,)]
        x_TM = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rank)).to(dtype)
        assert x_TM.nbytes > SHORT_SIZE_BYTES
        whole = group.all_reduce(x_TM)
        assert torch.equal(group.all_reduce(x_TM[5:6]), whole[5:6])
        sizes = group.shares(rows)
        part = group.reduce_scatter(x_TM, dim=0, sizes=sizes)
        assert torch.equal(group.all_gather(part, dim=0, sizes=sizes), whole)
        turned = group.all_to_all(
            part, split_dim=1, split_sizes=group.shares(64), join_dim=0, join_sizes=sizes
        )
        assert torch.equal(group.all_gather(turned, dim=1, sizes=group.shares(64)), whole)
        assert group.calls == 6
        return whole

    first, *others = in_threads(ranks, run)
    assert all(torch.equal(first, other) for other in others)
    values = [
        torch.randn(rows, 64, generator=torch.Generator().manual_seed(rank)).to(dtype).float()
        for rank in range(ranks)
    ]
    assert torch.equal(first, sum(values[1:], values[0]).to(dtype))


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_a_softmax_are_merged_into_the_whole_the_same_bits_in_any_batch(
    ranks: int,
) -> None:
    rows, elements, positions = SHORT_SIZE_BYTES // 16, 8, 9 * ranks
    draws = torch.Generator().manual_seed(ranks)
    scores = 20 * torch.randn(rows, positions, generator=draws)
    values = torch.randn(rows, positions, elements, generator=draws)
    # Of the first row the last rank has nothing.
    scores[0, 9 * (ranks - 1) :] = -torch.inf

    def part(of: slice) -> torch.Tensor:
        sums = scores[:, of].logsumexp(-1, keepdim=True)
        weights = (scores[:, of] - sums).exp().nan_to_num(0.0)
        return torch.cat((torch.einsum("rp,rpe->re", weights, values[:, of]), sums), dim=-1)

    def run(rank: int, store: Store) -> torch.Tensor:
        group = connect(Mesh(cp=ranks), rank, [(0,)], store=store)[(0,)]
        mine = part(slice(9 * rank, 9 * rank + 9))
        assert mine.nbytes > SHORT_SIZE_BYTES
        merged = group.merge(mine.view(2, -1, elements + 1))
        for row in (0, 7, rows - 1):
            assert torch.equal(group.merge(mine[row : row + 1])[0], merged.flatten(0, 1)[row])
        return merged

    first, *others = in_threads(ranks, run)
    assert all(torch.equal(first, other) for other in others)
    assert torch.allclose(first.flatten(0, 1), part(slice(None)), rtol=2e-5, atol=2e-6)


def test_a_rank_that_stays_alone_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"rank 0 did not find ranks 0, 1 within 0\.5 s"):
        connect(Mesh(tp=2), 0, [(0,)], store=file_store(tmp_path / "store", 2), timeout_s=0.5)
