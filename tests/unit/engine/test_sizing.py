"""The size of the KV pool, and what is said when it can not be had."""

import pytest

from tokenspeed.core.config import EngineConfig, KVSpec
from tokenspeed.core.errors import InsufficientMemory
from tokenspeed.engine.sizing import draft_seats, format_size, pages_that_fit

GIB = 1 << 30
SPEC = KVSpec(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")


def pages(
    *,
    asked: int | None = None,
    available: int = 8 * GIB,
    context: int = 8192,
    page_size: int = 32,
) -> int:
    return pages_that_fit(
        EngineConfig(model="m", kv_cache_size_bytes=asked, page_size=page_size),
        (SPEC,),
        weights_size_bytes=GIB // 4,
        context_max=context,
        available_size_bytes=available,
    )


def test_the_pool_gets_what_was_asked_for() -> None:
    assert pages(asked=GIB) == GIB // (SPEC.token_size_bytes * 32)


def test_by_default_the_pool_leaves_room_and_holds_a_whole_context() -> None:
    found = pages()
    assert found >= 8192 // 32
    assert found * 32 * SPEC.token_size_bytes <= 4 * GIB


def test_a_context_that_takes_most_of_the_memory_still_fits() -> None:
    assert pages(context=131072, available=4 * GIB) == 131072 // 32


def test_too_little_memory_says_how_much_is_needed_and_which_flag_shrinks_it() -> None:
    with pytest.raises(InsufficientMemory, match=r"256.0 MiB for weights.*--max-context"):
        pages(context=131072, available=2 * GIB)
    with pytest.raises(InsufficientMemory, match=r"9.0 GiB for the KV cache.*--kv-cache-memory"):
        pages(asked=9 * GIB)


def test_a_pool_below_one_context_says_what_would_fit() -> None:
    with pytest.raises(InsufficientMemory, match=r"lower --max-context to 1440 or less"):
        pages(asked=32 << 20)
    with pytest.raises(InsufficientMemory, match=r"holds 0 tokens\. Raise --kv-cache-memory\.$"):
        pages(asked=1)


def test_a_page_beyond_a_context_is_what_there_is_to_lower() -> None:
    with pytest.raises(InsufficientMemory, match=r"Lower --page-size to 8192 or less, or choose"):
        pages(page_size=1_000_000)
    with pytest.raises(InsufficientMemory, match=r"Raise --kv-.*, or lower --page-size to 8192"):
        pages(asked=GIB, page_size=1_000_000)
    assert pages(asked=GIB, context=16) == GIB // (SPEC.token_size_bytes * 32)


def test_a_draft_model_has_room_beside_the_cache_for_some_requests_and_one_at_least() -> None:
    def seats(asked: int | None, seat: int) -> int:
        config = EngineConfig(model="m", kv_cache_size_bytes=asked, max_running=16)
        return draft_seats(config, seat_size_bytes=seat, room_size_bytes=GIB + (256 << 20))

    assert seats(8 * GIB, 128 << 20) == 8
    assert seats(8 * GIB, 16 << 20) == 16
    assert seats(64 << 20, 16 << 20) == 1
    # An eighth of half of what is at hand beside the reserve.
    assert seats(None, 16 << 20) == 4


def test_sizes_are_written_for_people() -> None:
    assert [format_size(n) for n in (12, 2048, 3 << 20, GIB + GIB // 2)] == [
        "12 B",
        "2.0 KiB",
        "3.0 MiB",
        "1.5 GiB",
    ]
