"""How much memory the KV pool gets."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenspeed.core.config import EngineConfig, KVSpec
from tokenspeed.core.errors import InsufficientMemory

if TYPE_CHECKING:
    from tokenspeed.distributed import Place

__all__ = [
    "PROPOSAL_LENGTH_MAX",
    "PROPOSAL_WINDOW",
    "RESERVE_SIZE_BYTES",
    "available_memory_size_bytes",
    "draft_seats",
    "format_size",
    "memory_share_size_bytes",
    "pages_that_fit",
    "step_drafts_max",
]

# Left to activations, the allocator and everything else the process holds.
RESERVE_SIZE_BYTES = 256 << 20
# Of what remains beside the weights, so that the machine's other work keeps room.
POOL_FRACTION = 0.5
# More pool than this many full contexts serves no one on one machine by default.
POOL_CONTEXTS_MAX = 32

# Beyond some guesses for each of a few requests more cost more than they bring; and logits of each
# take up to a megabyte.
STEP_DRAFTS_MAX = 64
# A chain of guesses of a model is hardly ever right for longer; with the token before it, it is a
# row as long as those that GPUs have captured steps for.
PROPOSAL_LENGTH_MAX = 7
# Tokens of a request that a draft model reads before it proposes. What comes next mostly follows
# from what stands close by, and where it is quoted from farther off drafts out of text know it.
PROPOSAL_WINDOW = 512
# Of what the KV cache may take, what a draft model's own may take beside it.
SEATS_SHARE = 1 / 8


def format_size(size_bytes: int) -> str:
    """A size for people: `1.5 GiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def available_memory_size_bytes() -> int:
    """Memory a new process may take: the machine's available memory within its cgroup's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def memory_share_size_bytes(config: EngineConfig, place: "Place") -> int:
    """Memory that a rank may take, of what all engines and ranks on its host share."""
    return available_memory_size_bytes() // (config.dp * place.local_ranks)


def pages_that_fit(
    config: EngineConfig,
    specs: tuple[KVSpec, ...],
    *,
    weights_size_bytes: int,
    context_max: int,
    available_size_bytes: int,
) -> int:
    """Pages of the KV pool.

    Args:
        config: gives the page size, and the pool's size where the user set it.
        specs: what a token costs in each cache group.
        weights_size_bytes: what the weights will take.
        context_max: tokens of the longest request; the pool must hold one such.
        available_size_bytes: memory at hand before the weights are loaded.

    Raises:
        InsufficientMemory: the weights, or one whole context beside them, do not fit; says how
            much is needed and which flag shrinks it.
    """
    page_size_bytes = sum(spec.token_size_bytes for spec in specs) * config.page_size
    # Ranks that share a context have each a part of every page.
    page_size = config.page_size * config.cp
    context_pages = -(-context_max // page_size)
    context_size_bytes = context_pages * page_size_bytes
    room = available_size_bytes - weights_size_bytes - RESERVE_SIZE_BYTES
    asked = config.kv_cache_size_bytes
    if asked is None:
        wanted = min(int(room * POOL_FRACTION), context_size_bytes * POOL_CONTEXTS_MAX)
        # One whole context may take more than the usual share.
        wanted = max(wanted, context_size_bytes)
    else:
        wanted = asked
    # Whole pages are had, so one that is larger than a context makes that as large as itself.
    large = page_size > context_max
    if wanted > room:
        if asked is not None:
            smaller = "--kv-cache-memory"
        else:
            smaller = f"--page-size to {context_max} or less" if large else "--max-context"
        raise InsufficientMemory(
            f"this needs {format_size(weights_size_bytes)} for weights, {format_size(wanted)} for "
            f"the KV cache and {format_size(RESERVE_SIZE_BYTES)} beside them, but "
            f"{format_size(available_size_bytes)} of memory is available. Lower {smaller}, or "
            "choose a smaller model, --dtype bfloat16 or --kv-dtype int8."
        )
    if wanted < context_size_bytes:
        fitting = wanted // page_size_bytes * page_size
        ways_out = "Raise --kv-cache-memory"
        if large:
            ways_out += f", or lower --page-size to {context_max} or less"
        elif fitting:
            ways_out += f", or lower --max-context to {fitting} or less"
        raise InsufficientMemory(
            f"a context of {context_max} tokens needs {format_size(context_size_bytes)} of KV "
            f"cache, but --kv-cache-memory gives {format_size(wanted)}, which holds {fitting} "
            f"tokens. {ways_out}."
        )
    return wanted // page_size_bytes


def draft_seats(config: EngineConfig, *, seat_size_bytes: int, room_size_bytes: int) -> int:
    """How many requests at once a draft model has KV for.

    Args:
        config: gives the requests that run at once, and the KV cache where the user set it.
        seat_size_bytes: what the KV of one take.
        room_size_bytes: memory at hand beside all weights.
    """
    cache = config.kv_cache_size_bytes
    if cache is None:
        cache = int((room_size_bytes - RESERVE_SIZE_BYTES) * POOL_FRACTION)
    return max(1, min(config.max_running, int(cache * SEATS_SHARE) // seat_size_bytes))


def step_drafts_max(config: EngineConfig) -> int:
    """The most drafted tokens of a step; 0 where there are to be none."""
    if config.speculate == "off":
        return 0
    return min(STEP_DRAFTS_MAX, config.max_step_tokens - 1)
