"""Triton's attention, interpreted: against the formula and the reference, on any schedule.

Legend: R rows, T tokens, Q query heads, H KV heads, D elements of a head, C positions of a page.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from tests.kernels.triton_cases import SEED, drawn_cases, interpreting, verify_interpreted
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.kernels import reference
from tokenspeed.kernels.triton import attention, latent
from tokenspeed.kernels.triton.schedule import Schedule, fold_of, make_schedule
from tokenspeed.kernels.verify.paging import scattered_rows

__all__ = ["interpreting"]

Lengths = list[tuple[int, int]]


def drawn_lengths(choose: random.Random, rows: int) -> Lengths:
    """(context, new) of decode rows, drafts and prompts."""
    return [(choose.randrange(400), choose.choice((1, 1, 2, 4, 8, 23))) for _ in range(rows)]


@needs_interpreter
@pytest.mark.parametrize("op", ["attention.paged_mha", "attention.paged_mla"])
def test_attention_is_what_the_formula_says(op: str) -> None:
    for kernel, case in drawn_cases(op, each=3):
        verify_interpreted(kernel, case)


@needs_interpreter
@pytest.mark.parametrize("turn", range(3))
def test_any_rows_get_what_the_reference_gives(turn: int) -> None:
    choose = random.Random(SEED + turn)
    torch.manual_seed(SEED + turn)
    page_size = choose.choice((16, 32, 64))
    kv_heads, group = choose.choice(((1, 7), (2, 4), (3, 1)))
    head_dim = choose.choice((16, 48, 64))
    rows, pages = scattered_rows(drawn_lengths(choose, 4), page_size=page_size, seed=SEED % 1000)
    q_TQD = torch.randn(int(rows.query_starts[-1]), kv_heads * group, head_dim).bfloat16()
    k_PCHD, v_PCHD = torch.randn(2, pages, page_size, kv_heads, head_dim).bfloat16()
    for window, sinks_Q in ((None, None), (50, 3 * torch.randn(kv_heads * group))):
        terms = {"window": window, "sinks_Q": sinks_Q}
        wanted = reference.attention.paged_mha(q_TQD, k_PCHD, v_PCHD, rows, 0.2, **terms)
        found = attention.paged_mha(q_TQD, k_PCHD, v_PCHD, rows, 0.2, **terms)
        off = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert off < 6e-3, (float(off), window, rows)


@needs_interpreter
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("page_size", [32, 64])
@pytest.mark.parametrize(
    ("heads", "new"),
    [(16, 1), (16, 2), (16, 3), (16, 4), (16, 5), (16, 6), (16, 7), (16, 8), (128, 1), (70, 2)],
)
def test_drafted_tokens_and_heads_fold_into_tiles(
    heads: int, new: int, page_size: int, stored: torch.dtype
) -> None:
    torch.manual_seed(SEED + heads)
    lengths = [(random.Random(SEED + row).randrange(260), new) for row in range(3)]
    rows, pages = scattered_rows(lengths, page_size=page_size, seed=SEED % 1000)
    q_TQE = torch.randn(3 * new, heads, 48).bfloat16()
    pool_PCE = torch.randn(pages, page_size, 48).to(stored)
    wanted = reference.latent.paged_mla(q_TQE, pool_PCE, rows, 0.2, value_dim=32)
    found = latent.paged_mla(q_TQE, pool_PCE, rows, 0.2, value_dim=32)
    off = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert off < 6e-3, float(off)


def test_the_largest_fold_that_divides_is_taken() -> None:
    assert fold_of([4, 4], group=16, rows_max=64) == 4
    assert fold_of([8], group=16, rows_max=64) == 4
    assert fold_of([6, 6], group=16, rows_max=64) == 3
    assert fold_of([5], group=16, rows_max=64) == 1
    assert fold_of([1], group=64, rows_max=64) == 1
    assert fold_of([1, 700], group=16, rows_max=64) == 4
    assert latent.heads_of_a_tile(128) == (64, 2)
    assert latent.heads_of_a_tile(16) == (16, 1)
    assert latent.heads_of_a_tile(97) == (64, 2)


def schedule_of(lengths: Lengths, **terms: int | None) -> Schedule:
    starts = np.cumsum([0, *(new for _, new in lengths)], dtype=np.int32)
    contexts = np.array([context for context, _ in lengths], dtype=np.int32)
    slots = np.arange(len(lengths), dtype=np.int32)
    how = {"fold": 4, "block": 32, "programs": 7, "window": None, "split": None, **terms}
    return make_schedule(starts[:-1], starts[1:], contexts, slots, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", [None, 128])
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("fold", [1, 4, 8])
def test_nothing_is_read_for_tokens_that_fill_up_a_row(
    fold: int, window: int | None, split: int | None
) -> None:
    print(f"TOKENSPEED_TEST_SEED={SEED}")
    choose = random.Random(SEED)
    # The last row has no more than a token that fills up the step.
    lengths = [(choose.randrange(400), 8) for _ in range(6)] + [(0, 8)]
    counts = np.array([choose.randrange(1, 9) for _ in range(6)] + [1], dtype=np.int32)
    found = schedule_of(lengths, fold=fold, split=split, window=window, token_counts=counts)
    read: dict[int, list[tuple[int, int]]] = {}
    for first, tokens, position, slot, begin, end, _, _ in found.items.tolist():
        context, count = lengths[slot][0], int(counts[slot])
        assert begin < end <= context + count
        if position >= context + count:
            # A tile of none that count.
            assert end - begin <= 32
        for token in range(first, first + tokens):
            read.setdefault(token, []).append((begin, end))
    # Each token has a result.
    assert sorted(read) == list(range(8 * len(lengths)))
    for slot, (context, _) in enumerate(lengths):
        for token in range(counts[slot]):
            pieces = sorted(read[8 * slot + token])
            own = context + token
            assert pieces[0][0] <= (0 if window is None else max(0, own + 1 - window))
            assert pieces[-1][1] > own
            assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert found.starts[-1] == len(found.items)


@pytest.mark.parametrize("split", [None, 128])
@pytest.mark.parametrize("window", [None, 70])
def test_every_position_a_token_sees_is_read_once(split: int | None, window: int | None) -> None:
    print(f"TOKENSPEED_TEST_SEED={SEED}")
    lengths = drawn_lengths(random.Random(SEED), 9)
    found = schedule_of(lengths, split=split, window=window)
    starts = np.cumsum([0, *(new for _, new in lengths)])
    read: dict[int, list[tuple[int, int]]] = {}
    for first, tokens, position, slot, begin, end, _, whole in found.items.tolist():
        context, new = lengths[slot]
        assert position - context == first - starts[slot]
        assert first + tokens <= starts[slot] + new
        for token in range(first, first + tokens):
            read.setdefault(token, []).append((begin, end))
        if whole:
            assert all(len(read[token]) == 1 for token in range(first, first + tokens))
    for slot, (context, new) in enumerate(lengths):
        for token in range(new):
            pieces = sorted(read[int(starts[slot]) + token])
            own = context + token
            needed = 0 if window is None else max(0, own + 1 - window)
            assert pieces[0][0] <= needed
            assert pieces[-1][1] > own
            assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
            if split is not None:
                assert all(begin % split == 0 for begin, _ in pieces[1:])
    assert found.starts[0] == 0
    assert found.starts[-1] == len(found.items)
    assert found.partials == sum(end - begin for *_, begin, end in found.merges.tolist())


def test_programs_read_equal_shares() -> None:
    """One long row beside short ones: no program reads more than its part and a block."""
    found = schedule_of([(100_000, 1), (50, 1), (3000, 1)], programs=132)
    shares = []
    for first, end in zip(found.starts, found.starts[1:], strict=False):
        shares.append(int((found.items[first:end, 5] - found.items[first:end, 4]).sum()))
    assert max(shares) <= 103_053 / 132 + 2 * 32
    assert len(found.merges) <= 132


def test_a_fixed_schedule_cuts_a_row_where_it_did_alone() -> None:
    lengths = [(900, 1), (40, 3), (300, 1)]
    together = schedule_of(lengths, split=128).items
    for slot, row in enumerate(lengths):
        alone = schedule_of([row], split=128).items
        of_row = together[together[:, 3] == slot]
        assert of_row[:, 4:6].tolist() == alone[:, 4:6].tolist()
