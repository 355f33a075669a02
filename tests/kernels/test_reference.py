"""What the reference promises beside the formulas that `test_verify.py` holds it to."""

import numpy as np
import pytest
import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.verify.case import noise
from tokenspeed.kernels.verify.paging import scattered_rows

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [(15, 1), (16, 1), (0, 1), (63, 2), (0, 9), (7, 18)]


def reference(op, dtype, **traits):  # type: ignore[no-untyped-def]
    selector = KernelSelector(
        device=torch.device("cpu"), dtype=dtype, overrides={op.name: "reference"}
    )
    return selector.select(op, traits=traits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    lengths = ROWS
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
