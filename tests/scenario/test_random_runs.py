"""Seeded random runs: whatever happens in whatever order, every request gets what it gets alone,
exactly one end, and not a page is lost. 100,000 events, and a million more with the slow ones."""

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.scenario.simulation import Simulation
from tokenspeed.core.config import CacheGroup, CacheGroupKind, CachePolicy
from tokenspeed.core.step import Handover

# Tight pools, so that eviction, retraction and waiting are common rather than rare.
FIELDS = ("page_size", "slots_max", "step_tokens_max", "context_max")
FULL, WINDOW, LATENT, RECURRENT = CacheGroupKind
WORLDS: dict[str, tuple[tuple[CacheGroup, ...], tuple[int, ...]]] = {
    "roomy": ((CacheGroup(pages=200),), (4, 8, 32, 120)),
    "tight": ((CacheGroup(pages=24),), (4, 6, 16, 120)),
    "starved": ((CacheGroup(pages=9),), (4, 5, 8, 64)),
    "single tokens": ((CacheGroup(pages=30),), (1, 3, 5, 40)),
    "wide pages": ((CacheGroup(pages=6),), (16, 4, 7, 200)),
    "host": ((CacheGroup(pages=14, host_pages=20),), (4, 5, 16, 100)),
    "crowded host": ((CacheGroup(pages=12, host_pages=3),), (2, 4, 8, 40)),
    "window": (
        (CacheGroup(pages=40), CacheGroup(kind=WINDOW, pages=24, window=10)),
        (4, 6, 12, 100),
    ),
    "window with hosts": (
        (
            CacheGroup(kind=LATENT, pages=22, host_pages=30),
            CacheGroup(kind=WINDOW, pages=20, host_pages=5, window=6),
        ),
        (3, 5, 8, 80),
    ),
    "window alone": ((CacheGroup(kind=WINDOW, pages=22, window=7),), (2, 4, 6, 60)),
    "recurrent": (
        (CacheGroup(kind=RECURRENT, pages=9, checkpoint_pages=2),),
        (4, 5, 16, 90),
    ),
    "hybrid": (
        (
            CacheGroup(pages=30, host_pages=16),
            CacheGroup(kind=WINDOW, pages=20, window=5),
            CacheGroup(kind=RECURRENT, pages=12, host_pages=6, checkpoint_pages=1),
        ),
        (4, 5, 10, 90),
    ),
}


def run(seed: int, world: str, *, depth: int, cache: bool, events: int) -> Simulation:
    rng = random.Random(f"{seed} {world} {depth} {cache}")
    groups, sizes = WORLDS[world]
    drafts_max = rng.choice([0, 3, 16])
    proposals_max = rng.choice([0, 4, 32]) if drafts_max else 0
    config = SimpleNamespace(
        groups=_with_room(groups, sizes, depth),
        overlap_depth=depth,
        prefix_cache=cache,
        cache_policy=CachePolicy.SESSION,
        tps_floor=rng.choice([None, 300.0, 900.0]),
        queue_timeout_us=rng.choice([None, None, 20_000]),
        step_drafts_max=drafts_max,
        step_proposals_max=proposals_max,
        proposal_length_max=rng.choice([1, 3, 8]) if proposals_max else 0,
        proposal_window=(0, 5, 64)[seed % 3],
        draft_memory_size_bytes=2**29,
        **dict(zip(FIELDS, sizes, strict=True)),
    )
    simulation = Simulation(config, vocabulary=rng.choice([3, 12, 60]))
    whole = [group.pages for group in groups if group.kind in (FULL, LATENT)]
    capacity = min(config.context_max - 1, min(whole, default=99) * config.page_size + 2)
    next_id = 0
    for _ in range(events):
        draw = rng.random()
        if draw < 0.12 and len(simulation.live) < 14:
            prompt = _prompt(rng, simulation, capacity)
            simulation.submit(next_id, prompt, **_wishes(rng, len(prompt)))
            next_id += 1
        elif draw < 0.15 and next_id:
            live = sorted(simulation.live)
            simulation.abort(rng.choice(live) if live else rng.randrange(next_id))
        elif draw < 0.155:
            simulation.scheduler.flush_cache()
            simulation.audit()
        elif draw < 0.25 and simulation.transfers:
            simulation.transfer(
                rng.choice(sorted(simulation.transfers)), complete=rng.random() < 0.8
            )
        elif draw < 0.58 and simulation.flights:
            simulation.commit()
        else:
            simulation.launch()
    simulation.drain()
    return simulation


def _with_room(
    groups: tuple[CacheGroup, ...], sizes: tuple[int, ...], depth: int
) -> tuple[CacheGroup, ...]:
    """A window group must hold the window and the chunks of all steps in flight."""
    page_size, _, step_tokens_max, _ = sizes
    return tuple(
        dataclasses.replace(
            group,
            pages=max(
                group.pages,
                (group.window + (depth + 1) * step_tokens_max - 1) // page_size + 2,
            ),
        )
        if group.window is not None
        else group
        for group in groups
    )


def _prompt(rng: random.Random, simulation: Simulation, capacity: int) -> list[int]:
    """Often the beginning of an earlier conversation, so that pages are shared."""
    base: list[int] = []
    if simulation.clients and rng.random() < 0.7:
        client = rng.choice(list(simulation.clients.values())[-12:])
        base = client.prompt.tolist() + client.output
        base = base[: rng.randrange(len(base) + 1)] if rng.random() < 0.4 else base
    fresh = [rng.randrange(simulation.vocabulary) for _ in range(rng.choice([0, 1, 3, 8, 30]))]
    return (base + fresh)[: rng.choice([capacity, capacity // 2])] or [0]


def _wishes(rng: random.Random, prompt_count: int) -> dict[str, Any]:
    handover = rng.choice([*[Handover.NONE] * 8, Handover.SEND, Handover.RECEIVE])
    if prompt_count < 2:
        handover = Handover.NONE
    return {
        "handover": handover,
        "max_new_tokens": rng.choice([1, 2, 5, 20, 1000]),
        "min_new_tokens": rng.choice([0, 0, 2]),
        "stop_token_ids": tuple(rng.sample(range(60), rng.choice([0, 1, 4]))),
        "salt": rng.choice([0, 0, 0, 7]),
        "tenant": rng.choice([0, 1, 2]),
        "priority": rng.choice([0, 0, 0, 1, -1]),
    }


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("world", WORLDS)
def test_any_order_of_events_keeps_pages_and_answers_whole(world: str, depth: int) -> None:
    for seed in range(4):
        print(f"seed {seed}, world {world}, depth {depth}")
        run(seed, world, depth=depth, cache=seed % 4 != 3, events=700)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_many_orders_of_events_keep_pages_and_answers_whole(
    world: str, depth: int, cache: bool
) -> None:
    for seed in range(100, 105):
        print(f"seed {seed}, world {world}, depth {depth}, cache {cache}")
        run(seed, world, depth=depth, cache=cache, events=3000)


def test_tight_worlds_retract_and_evict() -> None:
    """The random runs mean nothing if they never come to the hard places."""
    stats = [
        run(seed, world, depth=1, cache=True, events=1000).scheduler.stats()
        for seed in range(3)
        for world in ("tight", "starved", "wide pages")
    ]
    assert sum(s.retractions for s in stats) > 10
    assert sum(s.evictions for s in stats) > 200
    assert sum(s.cached_tokens for s in stats) > 100
