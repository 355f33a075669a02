"""Every op's reference against its formula in float64, over odd shapes.

Legend: T tokens, I inputs, O outputs, M features, H KV heads, Q query heads, D head elements.
"""

import math

import numpy as np
import pytest
import torch

from tests.kernels.tolerances import TOLERANCES
from tests.support.forward import Request, build_rows
from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.kernels.rows import PagedRows

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1, 1), (1, 64, 48), (3, 7, 5), (8, 96, 33), (37, 61, 129)]


def reference(op, dtype, **traits):  # type: ignore[no-untyped-def]
    selector = KernelSelector(
        device=torch.device("cpu"), dtype=dtype, overrides={op.name: "reference"}
    )
    return selector.select(op, traits=traits)


def assert_close(op: str, ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = getattr(TOLERANCES[op], str(dtype).removeprefix("torch."))
    difference = ours.double() - exact
    assert ours.shape == exact.shape
    assert difference.norm() <= tolerance * exact.norm()
    assert difference.abs().max() <= 2 * tolerance * exact.abs().max()


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def test_every_op_is_in_the_table_of_tolerances() -> None:
    families = (
        ops.activation,
        ops.attention,
        ops.embedding,
        ops.gemm,
        ops.kvcache,
        ops.norm,
        ops.rope,
    )
    names = {getattr(family, name).name for family in families for name in family.__all__}
    assert names == set(TOLERANCES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(tokens: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    x = noise(tokens, inputs, dtype=dtype)
    weight = noise(outputs, inputs, dtype=dtype, seed=1)
    added = noise(outputs, dtype=dtype, seed=2) if bias else None
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    ours = reference(ops.gemm.linear, dtype, bias=bias)(x, weight, added)
    assert ours.dtype == dtype
    assert_close("gemm.linear", ours, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [*SIZES, (3, 1024, 5001)])
def test_logits_are_float32_and_as_exact(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    x, weight = noise(tokens, inputs, dtype=dtype), noise(outputs, inputs, dtype=dtype, seed=1)
    ours = reference(ops.gemm.logits, dtype)(x, weight)
    assert ours.dtype == torch.float32
    assert_close("gemm.logits", ours, x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (3, 576), (5, 77)])
def test_norms(tokens: int, features: int, dtype: torch.dtype) -> None:
    x, residual = noise(tokens, features, dtype=dtype), noise(tokens, features, dtype=dtype, seed=1)
    weight = noise(features, dtype=dtype, seed=2)

    def exact(values: torch.Tensor) -> torch.Tensor:
        wide = values.double()
        mean = wide.square().mean(-1, keepdim=True)
        return wide / torch.sqrt(mean + 1e-5) * weight.double()

    plain = reference(ops.norm.rms_norm, dtype)(x, weight, 1e-5)
    assert_close("norm.rms_norm", plain, exact(x), dtype)
    normed, total = reference(ops.norm.add_rms_norm, dtype)(x, residual.float(), weight, 1e-5)
    assert torch.equal(total, (x.double() + residual.double()).float())
    assert normed.dtype == dtype
    assert_close("norm.add_rms_norm", normed, exact(total), dtype)


def test_angles_are_those_of_float32_products() -> None:
    positions = torch.tensor([0, 1, 7, 5000, 131071])
    frequencies = 1.0 / 10000.0 ** (torch.arange(16) / 16)
    products = (positions.float()[:, None] * frequencies).double()
    cos, sin = reference(ops.rope.angles, torch.float32)(positions, frequencies)
    assert_close("rope.angles", cos, products.cos(), torch.float32)
    assert_close("rope.angles", sin, products.sin(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (5, 3, 64), (7, 11, 18)])
def test_rotate_turns_each_pair_as_a_complex_number(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    x = noise(tokens, heads, head_dim, dtype=dtype)
    angles = noise(tokens, head_dim // 2, dtype=torch.float32, seed=1) * 100
    cos, sin = angles.cos(), angles.sin()
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    exact = torch.cat((turned.real, turned.imag), -1)
    ours = reference(ops.rope.rotate, dtype, head_dim=head_dim)(x, cos, sin)
    assert ours.dtype == dtype
    assert_close("rope.rotate", ours, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (3, 96), (5, 77)])
def test_silu_and_mul(tokens: int, features: int, dtype: torch.dtype) -> None:
    x = noise(tokens, 2 * features, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    ours = reference(ops.activation.silu_and_mul, dtype)(x)
    assert_close("activation.silu_and_mul", ours, gate / (1 + torch.exp(-gate)) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lookup(dtype: torch.dtype) -> None:
    table = noise(19, 5, dtype=dtype).float()
    ids = torch.tensor([3, 18, 0, 3])
    ours = reference(ops.embedding.lookup, dtype)(ids, table.to(dtype))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, torch.stack([table[3], table[18], table[0], table[3]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_its_slots_and_no_other(dtype: torch.dtype) -> None:
    k_pool, v_pool = (noise(4, 8, 2, 6, dtype=dtype, seed=seed) for seed in (1, 2))
    before = k_pool.clone(), v_pool.clone()
    # Views with strides, as the projections give them.
    both = noise(3, 5, 6, dtype=dtype)
    k, v = both[:, :2], both[:, 3:]
    slots = torch.tensor([31, 0, 17])
    reference(ops.kvcache.append, dtype, head_dim=6)(k, v, k_pool, v_pool, slots)
    for pool, old, new in ((k_pool, before[0], k), (v_pool, before[1], v)):
        for slot in range(32):
            found = pool[slot // 8, slot % 8]
            written = slots.tolist().index(slot) if slot in slots else None
            assert torch.equal(found, old[slot // 8, slot % 8] if written is None else new[written])


def scattered_rows(
    lengths: list[tuple[int, int]], *, page_size: int, seed: int
) -> tuple[PagedRows, int]:
    """Rows of (context, new) tokens over pages in random order, and how many pages there are."""
    choose = np.random.default_rng(seed)
    counts = [-(-(context + new) // page_size) for context, new in lengths]
    pages = choose.permutation(sum(counts) + 3).tolist()
    slots = choose.permutation(len(lengths) + 2).tolist()
    rows = []
    for (context, new), count, slot in zip(lengths, counts, slots, strict=False):
        own, pages = pages[:count], pages[count:]
        rows.append((Request(slot=slot, pages=own, length=context), new))
    table = torch.full((len(lengths) + 2, max(counts)), -1, dtype=torch.int32)
    return build_rows(rows, table, page_size), sum(counts) + 3


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: PagedRows, scale: float
) -> torch.Tensor:
    """One token and one head at a time, straight from the definition."""
    group = q.shape[1] // k.shape[2]
    out = torch.empty(q.shape, dtype=torch.float64)
    for row in range(len(rows.context_lens)):
        start, end = rows.query_starts[row : row + 2].tolist()
        pages = rows.page_table_XP[rows.row_slots[row]].tolist()
        for token in range(start, end):
            length = int(rows.context_lens[row]) + token - start + 1
            where = [(pages[at // rows.page_size], at % rows.page_size) for at in range(length)]
            for head in range(q.shape[1]):
                keys = torch.stack([k[page, at, head // group] for page, at in where]).double()
                values = torch.stack([v[page, at, head // group] for page, at in where]).double()
                weights = torch.softmax(keys @ q[token, head].double() * scale, 0)
                out[token, head] = weights @ values
    return out


ROWS = [
    [(0, 1)],
    [(40, 1)],
    [(0, 37)],
    [(29, 5)],
    [(15, 1), (16, 1), (0, 1), (63, 2), (0, 9), (7, 18)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 8), (9, 3, 64), (14, 2, 20)])
@pytest.mark.parametrize("lengths", ROWS)
def test_attention_over_scattered_pages(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    rows, pages = scattered_rows(lengths, page_size=16, seed=len(lengths))
    tokens = int(rows.query_starts[-1])
    q = noise(tokens, heads, head_dim, dtype=dtype)
    k, v = (noise(pages, 16, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    scale = 1.3 / math.sqrt(head_dim)
    ours = reference(ops.attention.paged_mha, dtype, head_dim=head_dim)(q, k, v, rows, scale)
    assert ours.dtype == dtype
    exact = exact_attention(q, k, v, rows, scale)
    assert_close("attention.paged_mha", ours, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    lengths = ROWS[-1]
    rows, pages = scattered_rows(lengths, page_size=16, seed=0)
    q = noise(int(rows.query_starts[-1]), 6, 32, dtype=dtype)
    k, v = (noise(pages, 16, 2, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    attend = reference(ops.attention.paged_mha, dtype, head_dim=32)
    together = attend(q, k, v, rows, 0.2)
    for row in range(len(lengths)):
        start, end = rows.query_starts[row : row + 2].tolist()
        alone = PagedRows(
            query_starts=np.array([0, end - start], dtype=np.int32),
            context_lens=rows.context_lens[row : row + 1],
            row_slots=rows.row_slots[row : row + 1],
            page_table_XP=rows.page_table_XP,
            kv_slots_T=rows.kv_slots_T[start:end],
            page_size=rows.page_size,
        )
        assert torch.equal(attend(q[start:end], k, v, alone, 0.2), together[start:end])


def test_a_direct_call_runs_the_best_kernel() -> None:
    x, weight = noise(3, 8, dtype=torch.float32), noise(5, 8, dtype=torch.float32, seed=1)
    assert torch.allclose(ops.gemm.linear(x, weight, None), x @ weight.T, atol=1e-6)
    assert ops.gemm.logits(x.bfloat16(), weight.bfloat16()).dtype == torch.float32
    ones = torch.ones(8)
    expected = reference(ops.norm.rms_norm, torch.float32)(x, ones, 0.0)
    assert torch.allclose(ops.norm.rms_norm(x, ones, 0.0), expected, rtol=1e-6)
    assert torch.equal(ops.norm.add_rms_norm(x, x, ones, 0.0)[1], 2 * x)
    assert ops.activation.silu_and_mul(x).shape == (3, 4)
    assert torch.equal(ops.embedding.lookup(torch.tensor([2]), x), x[2:])
    angles = torch.zeros(3, 2)
    heads = x.view(3, 2, 4)
    assert torch.equal(ops.rope.rotate(heads, angles.cos(), angles.sin()), heads)
    k_pool, v_pool = torch.zeros(2, 16, 2, 4), torch.zeros(2, 16, 2, 4)
    rows, _ = scattered_rows([(0, 3)], page_size=16, seed=0)
    rows.page_table_XP.fill_(1)
    ops.kvcache.append(heads, heads, k_pool, v_pool, torch.tensor([16, 17, 18]))
    out = ops.attention.paged_mha(heads, k_pool, v_pool, rows, 0.5)
    assert torch.equal(out[0], heads[0])
