"""A device that can tell whose KV it reads: runs plans against a pool of (token, position, salt).

What a row sees is gathered through page tables built from the plans' deltas, as on a real device,
and compared with what its request should see. The sampled token is a function of what was
gathered, so a page reused wrongly shows twice.
"""

import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenspeed.control import Scheduler
from tokenspeed.core.step import FinishReason, Int32Array, StepPlan

__all__ = ["Client", "Simulation", "i32", "sample"]

NOTHING = -1  # An entry of the pool or of a page table that was never written.


def i32(*values: int) -> Int32Array:
    return np.array(values, dtype=np.int32)


def sample(history: Int32Array, vocabulary: int) -> int:
    """The one token that follows a history."""
    return zlib.crc32(history.astype(np.int32).tobytes()) % vocabulary


@dataclass(kw_only=True)
class Client:
    """What a client asked for and what it got."""

    prompt: Int32Array
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    salt: int = 0
    priority: int = 0
    expected: list[int] = field(default_factory=list)
    reason: FinishReason = FinishReason.LENGTH
    output: list[int] = field(default_factory=list)
    cached: int | None = None
    aborted: bool = False
    finished: FinishReason | None = None
    stays: list[int] = field(default_factory=list)  # tokens known at each admission

    def run_alone(self, vocabulary: int, context_max: int) -> None:
        """Fills in what the request gives when nothing else runs."""
        history = self.prompt.tolist()
        while True:
            token = sample(np.array(history), vocabulary)
            history.append(token)
            self.expected.append(token)
            if len(self.expected) > self.min_new_tokens and token in self.stop_token_ids:
                self.reason = FinishReason.STOP
                return
            if len(self.expected) == self.max_new_tokens or len(history) == context_max:
                return


@dataclass
class Flight:
    plan: StepPlan
    tokens: Int32Array
    reads: dict[int, set[int]]  # page to requests


class Simulation:
    """Drives a scheduler; every method checks what it sees."""

    def __init__(self, config: Any, *, vocabulary: int = 64, audited: bool = True) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.audited = audited
        self.scheduler = Scheduler(config)
        self.clients: dict[int, Client] = {}
        self.live: set[int] = set()
        self.flights: deque[Flight] = deque()
        self.plans: list[StepPlan] = []
        self.keep_plans = False
        cells = config.pages * config.page_size
        self.pool = np.full((3, cells), NOTHING, dtype=np.int64)  # token, position, salt
        width = -(-config.context_max // config.page_size)
        self.table = np.full((config.slots_max, width), NOTHING, dtype=np.int64)
        self.last = np.full(config.slots_max, NOTHING, dtype=np.int64)
        self.bound = np.full(config.slots_max, NOTHING, dtype=np.int64)

    # --- what a client does ---

    def submit(self, request: int, prompt: Any, **wishes: Any) -> Client:
        client = Client(prompt=np.asarray(prompt, dtype=np.int32), **wishes)
        client.run_alone(self.vocabulary, self.config.context_max)
        self.scheduler.submit(
            request,
            client.prompt,
            max_new_tokens=client.max_new_tokens,
            min_new_tokens=client.min_new_tokens,
            stop_token_ids=i32(*client.stop_token_ids),
            salt=client.salt,
            priority=client.priority,
        )
        self.clients[request] = client
        self.live.add(request)
        self.audit()
        return client

    def abort(self, request: int) -> None:
        self.scheduler.abort(request)
        if request in self.live:
            self.clients[request].aborted = True
        self.audit()

    # --- what the engine does ---

    def launch(self) -> StepPlan | None:
        """Plans a step and runs it on the device; its tokens wait to be committed."""
        plan = self.scheduler.plan()
        self.audit()
        self.collect()
        if plan is not None:
            self.flights.append(self._run(plan))
            if self.keep_plans:
                self.plans.append(plan)
        return plan

    def commit(self) -> None:
        flight = self.flights.popleft()
        self.scheduler.commit(flight.plan.step, flight.tokens)
        self.audit()
        self.collect(flight)

    def step(self) -> StepPlan | None:
        """One turn of the engine loop at overlap depth 0."""
        plan = self.launch()
        if plan is not None:
            self.commit()
        return plan

    def drain(self, *, turns_max: int = 100_000) -> None:
        """Runs until nothing is left to run, at the depth of the configuration."""
        for _ in range(turns_max):
            planned = self.launch() is not None
            if self.flights and (not planned or len(self.flights) > self.config.overlap_depth):
                self.commit()
            elif not planned:
                break
        else:
            raise AssertionError("the scheduler does not come to rest")
        assert not self.live, f"requests {sorted(self.live)} never ended"
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_active) == (0, 0, 0)

    def collect(self, flight: Flight | None = None) -> None:
        """Takes the outcome and checks it against what each client should get."""
        outcome = self.scheduler.take_outcome()
        for request, token, index, cached in zip(
            outcome.requests.tolist(),
            outcome.tokens.tolist(),
            outcome.sample_indices.tolist(),
            outcome.cached_counts.tolist(),
            strict=True,
        ):
            assert request in self.live
            client = self.clients[request]
            assert flight is not None and flight.tokens[index] == token
            assert token == client.expected[len(client.output)]
            client.output.append(token)
            assert client.cached in (None, cached)
            client.cached = cached
            assert cached < len(client.prompt)
        for request, number in zip(
            outcome.finished.tolist(), outcome.reasons.tolist(), strict=True
        ):
            self.live.remove(request)  # Raises at a second terminal event.
            client = self.clients[request]
            client.finished = FinishReason(number)
            self._check_end(client)

    def audit(self) -> None:
        if self.audited:
            self.scheduler.audit()

    def _check_end(self, client: Client) -> None:
        capacity = self.config.pages * self.config.page_size
        if client.finished is FinishReason.ABORT:
            assert client.aborted
        elif client.finished is FinishReason.REJECTED:
            assert len(client.prompt) + 1 > capacity
        elif len(client.output) < len(client.expected):
            assert client.finished is FinishReason.LENGTH
            assert len(client.prompt) + len(client.output) - 1 == capacity
        else:
            assert client.finished is client.reason

    # --- the device ---

    def _history(self, request: int) -> Int32Array:
        client = self.clients[request]
        return np.concatenate([client.prompt, np.array(client.expected, dtype=np.int32)])

    def _run(self, plan: StepPlan) -> Flight:
        (group,) = plan.groups
        size = self.config.page_size
        assert len(plan.token_ids) == len(group.kv_slots) <= self.config.step_tokens_max
        for slot, request in zip(plan.bound_slots, plan.bound_requests, strict=True):
            stays = self.clients[int(request)].stays
            stays.append(len(self.clients[int(request)].output))
            assert len(stays) < 3 or stays[-1] > stays[-2], "retracted again without progress"
            self.bound[slot] = request
            self.last[slot] = NOTHING
            self.table[slot] = NOTHING
        for slot, index, page in zip(
            group.table_slots, group.table_indices, group.table_pages, strict=True
        ):
            self.table[slot, index] = page
        assert len(set(plan.row_slots.tolist())) == len(plan.row_slots)

        reads: dict[int, set[int]] = {}
        spans = list(zip(plan.query_starts[:-1], plan.query_starts[1:], strict=True))
        for row, (slot, start) in enumerate(zip(plan.row_slots, plan.context_lens, strict=True)):
            request = int(self.bound[slot])
            first, last = spans[row]
            count = int(last - first)
            tokens = plan.token_ids[first:last].astype(np.int64)
            if row < plan.decode_count:
                assert count == 1
                tokens = self.last[[slot]]
            cells = group.kv_slots[first:last].astype(np.int64)
            positions = np.arange(start, start + count)
            assert (cells == self.table[slot, positions // size] * size + positions % size).all()
            for flight in self.flights:
                for page in set((cells // size).tolist()):
                    others = flight.reads.get(page, set()) - {request}
                    assert not others, f"page {page} is rewritten while {others} read it"
            self.pool[0, cells] = tokens
            self.pool[1, cells] = positions
            self.pool[2, cells] = self.clients[request].salt % 2**63
            pages = self.table[slot, : -(-(start + count) // size)].tolist()
            for page in pages:
                reads.setdefault(page, set()).add(request)

        tokens_S = []
        samples = plan.sample_rows.tolist()
        for row, (slot, start) in enumerate(zip(plan.row_slots, plan.context_lens, strict=True)):
            request = int(self.bound[slot])
            end = int(start + spans[row][1] - spans[row][0])
            positions = np.arange(end)
            cells = self.table[slot, positions // size] * size + positions % size
            seen = self.pool[:, cells]
            expected = self._history(request)
            assert (seen[1] == positions).all(), f"request {request} sees wrong positions"
            salt = self.clients[request].salt % 2**63
            assert (seen[2] == salt).all(), f"request {request} sees another salt"
            # A doomed row runs past the end of its request; nobody will see its token.
            shown = min(end, len(expected))
            assert (seen[0, :shown] == expected[:shown]).all(), (
                f"request {request} sees other tokens"
            )
            if row in samples:
                position = plan.sample_positions[samples.index(row)]
                assert position == end - len(self.clients[request].prompt)
                self.last[slot] = sample(seen[0], self.vocabulary)
                tokens_S.append(int(self.last[slot]))
            else:
                assert row >= plan.decode_count
        assert plan.sample_rows.tolist() == sorted(samples)
        return Flight(plan, np.array(tokens_S, dtype=np.int32), reads)
