"""Sessions are inferred from growing prompts; their pages go by when they are expected back."""

import numpy as np
import pytest

from tests.scenario.simulation import Client, Simulation
from tests.unit.control.worlds import world
from tokenspeed.core.config import CacheGroup, CacheGroupKind, CachePolicy

SECOND_US = 1_000_000
STORED = 0
OURS, LRU = CachePolicy.SESSION, CachePolicy.LRU


class Agents:
    """Sessions that take turns; a world of 4-token pages in which nothing else happens."""

    def __init__(
        self,
        *,
        pages: int = 64,
        groups: tuple[CacheGroup, ...] | None = None,
        policy: CachePolicy = OURS,
        **changes: int,
    ) -> None:
        self.world: Simulation = world(
            groups=groups or (CacheGroup(pages=pages),),
            cache_policy=policy,
            context_max=4096,
            step_tokens_max=512,
            **changes,
        )
        self.history: dict[str, list[int]] = {}
        self.requests = 0
        self.stored: dict[tuple[int | None, tuple[int, ...]], int] = {}
        self.keys: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        self.world.scheduler.record_cache_events(True)

    def wait(self, seconds: float) -> None:
        self.world.now_us += round(seconds * SECOND_US)

    def ask(self, prompt: list[int], outputs: int) -> Client:
        """One request, run to its end."""
        self.requests += 1
        client = self.world.submit(self.requests, prompt, max_new_tokens=outputs)
        self.world.drain()
        return client

    def turn(self, name: str, *, news: int = 8, outputs: int = 4) -> Client:
        """The session's next turn: all it said so far, and some tokens more."""
        said = self.history.setdefault(name, [])
        salt = sum(name.encode()) * 7919
        said += [(salt + 31 * (len(said) + i)) % 50_000 for i in range(news)]
        client = self.ask(said, outputs)
        said += client.output
        return client

    def pages_of(self, name: str) -> int:
        """Pages of the session's latest state that the cache holds."""
        return self.cached_pages(self.history[name])

    def cached_pages(self, tokens: list[int]) -> int:
        """Looks without touching: by what the scheduler said that it stored and removed."""
        self._watch()
        before: int | None = None
        for count, start in enumerate(range(0, len(tokens) - 3, 4)):
            before = self.stored.get((before, tuple(tokens[start : start + 4])))
            if before is None:
                return count
        return len(tokens) // 4

    def _watch(self) -> None:
        events = self.world.scheduler.take_cache_events()
        if events is None:
            return
        tokens = iter(events.tokens.reshape(-1, 4).tolist())
        for kind, name, parent, has_parent in zip(
            events.kinds, events.hashes, events.parents, events.has_parent, strict=True
        ):
            if kind == STORED:
                key = (int(parent) if has_parent else None, tuple(next(tokens)))
                self.stored[key] = int(name)
                self.keys[int(name)] = key
            else:
                del self.stored[self.keys.pop(int(name))]


def taught(policy: CachePolicy) -> Agents:
    """Sessions of short answers came back after 2 s, those of long answers after 30 s."""
    agents = Agents(pages=96, policy=policy)
    for round_ in range(24):
        agents.history.clear()
        for turn in range(3):
            agents.turn(f"quick{round_}", outputs=16)
            if turn < 2:
                agents.wait(2)
        agents.wait(40)
        for turn in range(3):
            agents.turn(f"slow{round_}", outputs=64)
            if turn < 2:
                agents.wait(30)
        agents.wait(200)
    agents.history.clear()
    return agents


@pytest.mark.parametrize(("policy", "first"), [(OURS, "quick"), (LRU, "slow")])
def test_a_session_expected_later_outlives_one_that_should_have_been_back(
    policy: CachePolicy, first: str
) -> None:
    agents = taught(policy)
    agents.turn("slow", outputs=64)
    agents.wait(4)
    agents.turn("quick", news=64, outputs=16)
    agents.wait(16)
    held = {name: agents.pages_of(name) for name in ("slow", "quick")}
    assert held == {"slow": 17, "quick": 19}
    # 96 pages, 36 of them theirs: the rest goes to a prompt that wants ten more.
    agents.ask(list(range(4 * 69)), 1)
    left = {name: agents.pages_of(name) for name in ("slow", "quick")}
    other = "slow" if first == "quick" else "quick"
    assert left[first] < held[first]
    assert left[other] == held[other], "one session goes whole before the next loses a page"


def test_what_a_compacted_history_left_behind_goes_first() -> None:
    agents = Agents(pages=64)
    agents.turn("other")  # 3 pages
    agents.wait(1)
    first = agents.turn("session", news=16)
    for _ in range(4):
        agents.wait(1)
        agents.turn("session")
    old = list(agents.history["session"])
    kept = first.prompt.tolist()
    # The history is replaced by a summary; the session's first prompt stays.
    agents.history["session"] = [*kept, *range(40_000, 40_012)]
    agents.wait(1)
    agents.turn("session")
    summary = list(agents.history["session"])
    assert (agents.cached_pages(old), agents.cached_pages(summary)) == (16, 9)
    free = 64 - 2 - 16 - 9 + 4
    agents.ask(list(range(4 * (free + 5))), 1)
    assert agents.cached_pages(old) < 16
    assert agents.cached_pages(summary) == 9
    assert agents.pages_of("other") == 2, "it was used longest ago, but may come back"


def test_a_fork_does_not_leave_its_parent_behind() -> None:
    agents = Agents(pages=64)
    agents.turn("other")
    agents.wait(20)
    parent = agents.turn("parent", news=16)
    agents.wait(1)
    parent = agents.turn("parent", news=16, outputs=12)
    whole = list(agents.history["parent"])
    prompt = parent.prompt.tolist()
    agents.wait(1)
    # The sub-agent starts from the parent's prompt, not from its answer.
    agents.history["child"] = [*prompt, *range(30_000, 30_008)]
    child = agents.turn("child")
    assert child.cached == len(prompt) // 4 * 4, "it shares the parent's pages"
    held = agents.cached_pages(whole)
    assert held == 11
    own = agents.pages_of("child") - len(prompt) // 4
    free = 64 - 2 - held - own
    agents.ask(list(range(4 * (free + 1))), 1)
    assert agents.cached_pages(whole) == held
    assert agents.pages_of("other") < 2, "it was away for longest"


def test_a_waiting_request_keeps_the_pages_it_will_find() -> None:
    agents = Agents(pages=48, slots_max=1)
    agents.turn("session", news=40)
    agents.wait(500)
    agents.turn("other", news=40)
    agents.wait(1)
    world_ = agents.world
    # The session returns, and waits for a prompt that needs more than is free.
    world_.submit(100, range(4 * 30), max_new_tokens=8)
    back = world_.submit(101, [*agents.history["session"], 7], max_new_tokens=1)
    world_.drain()
    assert back.cached == 40
    assert agents.pages_of("other") < 10


@pytest.mark.parametrize("policy", [OURS, LRU])
def test_a_prompt_asked_again_stays_though_it_adds_no_page(policy: CachePolicy) -> None:
    agents = Agents(pages=64, policy=policy)
    asked = list(range(20_000, 20_017))
    agents.ask(asked, 8)
    agents.wait(300)
    agents.turn("other", news=40)
    agents.wait(300)
    assert agents.ask(asked, 8).cached == 16
    # Its answer is the same too, so the branch is left on its way and nothing is added.
    agents.ask(list(range(4 * 51)), 1)
    assert agents.cached_pages(asked) == 4
    assert agents.pages_of("other") < 10


def test_pages_shared_by_many_go_after_those_of_each() -> None:
    agents = Agents(pages=64)
    system = list(range(20_000, 20_016))
    for number in range(6):
        agents.history[f"s{number}"] = list(system)
        agents.turn(f"s{number}")
        agents.wait(1)
    agents.ask(list(range(4 * 62)), 1)
    assert agents.cached_pages(system) == 2


@pytest.mark.parametrize("policy", [OURS, LRU])
def test_what_sessions_share_is_as_young_as_the_last_that_used_it(policy: CachePolicy) -> None:
    # States of a recurrence may go in any order, where of whole prefixes what is shared goes last:
    # one at the end of what is shared, one at the end of each session.
    states = CacheGroup(kind=CacheGroupKind.RECURRENT, pages=5, checkpoint_pages=64)
    agents = Agents(groups=(states,), policy=policy)

    def ask(*prompt: int) -> int:
        cached = agents.ask([*prompt, 1], 1).cached
        agents.wait(300)
        return cached

    shared, first, second = range(16), range(100, 108), range(200, 208)
    ask(*shared)
    ask(*shared, *first)
    ask(*range(300, 316))
    assert ask(*shared, *second) == 16
    # One must go: the first session's end, which nobody has used for longest.
    ask(*range(400, 416))
    assert ask(*shared, *first) == 16


@pytest.mark.parametrize("policy", [OURS, LRU])
def test_equal_calls_drop_equal_pages(policy: CachePolicy) -> None:
    def run() -> dict[tuple[int | None, tuple[int, ...]], int]:
        agents = taught(policy)
        agents.cached_pages([])
        return agents.stored

    assert run() == run()


def test_more_sessions_than_move_on_at_once_are_all_counted() -> None:
    agents = Agents(pages=2048)
    for number in range(600):
        agents.turn(f"s{number}", outputs=1)
    for _ in range(12):
        agents.wait(100)
        agents.ask([1], 1)
    agents.world.scheduler.audit()


@pytest.mark.slow
def test_a_million_pages_fill_and_make_room() -> None:
    pages = 1_000_000
    w = world(
        groups=(CacheGroup(pages=pages),), context_max=400_000, step_tokens_max=400_000, slots_max=1
    )
    w.audited = False
    scheduler = w.scheduler
    for request in range(14):
        w.now_us += SECOND_US
        scheduler.submit(
            request,
            np.arange(390_000, dtype=np.int32) * 31 + request,
            max_new_tokens=1,
            stop_token_ids=np.array([], dtype=np.int32),
        )
        plan = scheduler.plan(w.now_us)
        assert plan is not None
        scheduler.commit(plan.step, np.array([1], dtype=np.int32), w.now_us)
    stats = scheduler.stats()
    assert stats.evictions == 14 * 97_500 - pages + stats.pages_free
    scheduler.audit()
