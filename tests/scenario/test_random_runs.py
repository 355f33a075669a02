"""Seeded random runs: whatever happens in whatever order, every request gets what it gets alone,
exactly one end, and not a page is lost. 42,000 events, and a million more with the slow ones."""

import random
from types import SimpleNamespace

import pytest

from tests.scenario.simulation import Simulation

# Tight pools, so that eviction, retraction and waiting are common rather than rare.
FIELDS = ("pages", "page_size", "slots_max", "step_tokens_max", "context_max")
WORLDS = {
    "roomy": (200, 4, 8, 32, 120),
    "tight": (24, 4, 6, 16, 120),
    "starved": (9, 4, 5, 8, 64),
    "single tokens": (30, 1, 3, 5, 40),
    "wide pages": (6, 16, 4, 7, 200),
}


def run(seed: int, world: str, *, depth: int, cache: bool, events: int) -> Simulation:
    rng = random.Random(f"{seed} {world} {depth} {cache}")
    sizes = dict(zip(FIELDS, WORLDS[world], strict=True))
    config = SimpleNamespace(**sizes, overlap_depth=depth, prefix_cache=cache)
    simulation = Simulation(config, vocabulary=rng.choice([3, 12, 60]))
    capacity = min(config.context_max - 1, config.pages * config.page_size + 2)
    next_id = 0
    for _ in range(events):
        draw = rng.random()
        if draw < 0.12 and len(simulation.live) < 14:
            simulation.submit(next_id, _prompt(rng, simulation, capacity), **_wishes(rng))
            next_id += 1
        elif draw < 0.15 and next_id:
            live = sorted(simulation.live)
            simulation.abort(rng.choice(live) if live else rng.randrange(next_id))
        elif draw < 0.155:
            simulation.scheduler.flush_cache()
            simulation.audit()
        elif draw < 0.58 and simulation.flights:
            simulation.commit()
        else:
            simulation.launch()
    simulation.drain()
    return simulation


def _prompt(rng: random.Random, simulation: Simulation, capacity: int) -> list[int]:
    """Often the beginning of an earlier conversation, so that pages are shared."""
    base: list[int] = []
    if simulation.clients and rng.random() < 0.7:
        client = rng.choice(list(simulation.clients.values())[-12:])
        base = client.prompt.tolist() + client.output
        base = base[: rng.randrange(len(base) + 1)] if rng.random() < 0.4 else base
    fresh = [rng.randrange(simulation.vocabulary) for _ in range(rng.choice([0, 1, 3, 8, 30]))]
    return (base + fresh)[: rng.choice([capacity, capacity // 2])] or [0]


def _wishes(rng: random.Random) -> dict[str, object]:
    return {
        "max_new_tokens": rng.choice([1, 2, 5, 20, 1000]),
        "min_new_tokens": rng.choice([0, 0, 2]),
        "stop_token_ids": tuple(rng.sample(range(60), rng.choice([0, 1, 4]))),
        "salt": rng.choice([0, 0, 0, 7]),
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
    for seed in range(100, 112):
        print(f"seed {seed}, world {world}, depth {depth}, cache {cache}")
        run(seed, world, depth=depth, cache=cache, events=3000)


def test_tight_worlds_retract_and_evict() -> None:
    """The random runs mean nothing if they never come to the hard places."""
    stats = [
        run(seed, world, depth=1, cache=True, events=1000).scheduler.stats()
        for seed in range(2)
        for world in ("tight", "starved", "wide pages")
    ]
    assert sum(s.retractions for s in stats) > 10
    assert sum(s.evictions for s in stats) > 200
    assert sum(s.cached_tokens for s in stats) > 100
