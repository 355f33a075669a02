"""A device that can tell whose KV it reads: runs plans against pools of (token, position, salt).

What a row sees is gathered through page tables built from the plans' deltas, as on a real device,
and compared with what its request should see. The sampled token is a function of what was
gathered, so a page reused wrongly shows twice.
"""

import random
import zlib
from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from tests.scenario.storage import NOTHING, GroupStorage, Row
from tokenspeed.control import Scheduler
from tokenspeed.core.step import (
    CacheReport,
    FinishReason,
    GroupPlan,
    Handover,
    Int32Array,
    StepPlan,
    StepResult,
    TransferKind,
)

__all__ = ["Client", "Simulation", "i32", "sample"]

REPORT_FIELDS = tuple(field.name for field in fields(CacheReport))


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
    tenant: int = 0
    priority: int = 0
    handover: Handover = Handover.NONE
    expected: list[int] = field(default_factory=list)
    reason: FinishReason = FinishReason.LENGTH
    output: list[int] = field(default_factory=list)
    cached: int | None = None
    report: CacheReport | None = None
    aborted: bool = False
    finished: FinishReason | None = None
    sent: bool = False
    failed: bool = False  # a transfer of it
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
            most = 1 if self.handover is Handover.SEND else self.max_new_tokens
            if len(self.expected) == most or len(history) == context_max:
                return


@dataclass
class Flight:
    plan: StepPlan
    result: StepResult
    reads: list[dict[int, set[int]]]  # of each group, page to requests


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
        self.groups = [
            GroupStorage(group, config) for group in sorted(config.groups, key=lambda g: g.kind)
        ]
        self.transfers: dict[int, tuple[StepPlan, int]] = {}  # under way: its plan, and which
        self.now_us = 0
        self.draft_model = random.Random(0)
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
            tenant=client.tenant,
            priority=client.priority,
            handover=client.handover,
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
        self.now_us += 1000
        plan = self.scheduler.plan(self.now_us)
        self.audit()
        self.collect()
        if plan is not None:
            self.flights.append(self._run(plan))
            if self.keep_plans:
                self.plans.append(plan)
        return plan

    def commit(self) -> None:
        flight = self.flights.popleft()
        self.now_us += 300 + 50 * len(flight.plan.token_ids)
        tokens = flight.result.tokens
        self.scheduler.commit(flight.plan.step, tokens, self.now_us, result=flight.result)
        self.audit()
        self.collect(flight)

    def transfer(self, transfer: int, *, complete: bool = True) -> None:
        """Ends a transfer under way; it did what it should, or failed."""
        plan, which = self.transfers.pop(transfer)
        request = int(plan.transfers.requests[which])
        client = self.clients[request]
        kind = TransferKind(plan.transfers.kinds[which])
        if complete and kind is not TransferKind.LOAD:
            known = client.prompt if kind is TransferKind.SEND else client.prompt[:-1]
            for index, group in enumerate(self.groups):
                if kind is TransferKind.SEND:
                    group.check_sent(plan, index, which, known, self._salt(request))
                else:
                    group.receive(plan, index, which, known, self._salt(request))
        client.sent = complete and kind is TransferKind.SEND
        client.failed = client.failed or not complete
        self.scheduler.transferred(transfer, complete=complete)
        self.audit()

    def step(self) -> StepPlan | None:
        """One turn of the engine loop at overlap depth 0."""
        plan = self.launch()
        if plan is not None:
            self.commit()
        return plan

    def drain(self, *, turns_max: int = 100_000) -> None:
        """Runs until nothing is left to run, at the depth of the configuration."""
        for _ in range(turns_max):
            for transfer in list(self.transfers):
                self.transfer(transfer)
            planned = self.launch() is not None
            if self.flights and (not planned or len(self.flights) > self.config.overlap_depth):
                self.commit()
            elif not planned and not self.transfers:
                break
        else:
            raise AssertionError("the scheduler does not come to rest")
        assert not self.live, f"requests {sorted(self.live)} never ended"
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_active) == (0, 0, 0)
        assert (stats.parked, stats.transferring) == (0, 0)

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
            assert flight is not None and flight.result.tokens[index] == token
            assert token == client.expected[len(client.output)]
            client.output.append(token)
            assert client.cached in (None, cached) or client.failed
            client.cached = cached
            assert cached < len(client.prompt)
        for request, report in zip(
            outcome.admitted.tolist(), outcome.cache_reports.tolist(), strict=True
        ):
            client = self.clients[request]
            assert client.report is None, "a request is admitted for the first time twice"
            client.report = CacheReport(**dict(zip(REPORT_FIELDS, report, strict=True)))
            assert sum(report[:4]) == len(client.prompt)
            assert min(report) >= 0
            assert report[0] <= report[4] <= len(client.prompt)
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
        whole = [g.group.pages for g in self.groups if g.group.kind in (0, 2)]
        capacity = min(whole, default=2**31) * self.config.page_size
        if client.finished is FinishReason.ABORT:
            assert client.aborted or (client.handover is Handover.SEND and not client.sent)
        elif client.finished is FinishReason.REJECTED:
            assert len(client.prompt) + 1 > capacity
        elif client.finished is FinishReason.REFUSED:
            assert self.config.queue_timeout_us is not None
            assert client.cached is None, "who has had a token is not refused"
        elif len(client.output) < len(client.expected):
            assert client.finished is FinishReason.LENGTH
            assert len(client.prompt) + len(client.output) - 1 == capacity
        else:
            assert client.finished is client.reason
            at_stop = client.reason is FinishReason.STOP
            assert client.sent or at_stop or client.handover is not Handover.SEND

    # --- the device ---

    def _history(self, request: int) -> Int32Array:
        client = self.clients[request]
        return np.concatenate([client.prompt, np.array(client.expected, dtype=np.int32)])

    def _salt(self, request: int) -> int:
        return self.clients[request].salt % 2**63

    def _run(self, plan: StepPlan) -> Flight:
        assert len(plan.token_ids) <= self.config.step_tokens_max
        assert [group.kind for group in plan.groups] == [g.group.kind for g in self.groups]
        for slot, request in zip(plan.bound_slots, plan.bound_requests, strict=True):
            client = self.clients[int(request)]
            client.stays.append(len(client.output))
            again = len(client.stays) > 2 and client.stays[-1] == client.stays[-2]
            assert client.failed or not again, "retracted again without progress"
            self.bound[slot] = request
            self.last[slot] = NOTHING
            for group in self.groups:
                group.bind(slot)
        for which, transfer in enumerate(plan.transfers.ids.tolist()):
            self.transfers[transfer] = (plan, which)
        for storage, part in zip(self.groups, plan.groups, strict=True):
            storage.begin(part)

        rows = self._rows(plan)
        reads = [
            self._feed(g, part, rows) for g, part in zip(self.groups, plan.groups, strict=True)
        ]
        tokens_S = []
        positions = iter(
            zip(plan.sample_rows.tolist(), plan.sample_positions.tolist(), strict=True)
        )
        wanted = next(positions, None)
        for index, row in enumerate(rows):
            for group in self.groups:
                group.check(row)
            decodes = index < plan.decode_count
            last = row.start + len(row.tokens)
            for end in range(row.start + 1 if decodes else last, last + 1):
                if not decodes and (wanted is None or wanted[0] != index):
                    break
                # What follows a wrong guess is nothing; it repeats the draft, so as to mislead.
                sure = end <= last - row.doubtful
                token = (
                    sample(row.history[:end], self.vocabulary)
                    if sure or end == last
                    else int(row.tokens[end - row.start])
                )
                if sure:
                    self.last[row.slot] = token
                assert wanted == (index, end - len(self.clients[row.request].prompt))
                tokens_S.append(token)
                wanted = next(positions, None)
        assert wanted is None
        for group, part in zip(self.groups, plan.groups, strict=True):
            group.end(part)
        result = StepResult(
            tokens=np.array(tokens_S, dtype=np.int32), logprobs=None, **self._proposals(plan, rows)
        )
        return Flight(plan, result, reads)

    def _proposals(self, plan: StepPlan, rows: list[Row]) -> dict[str, Any]:
        """What a draft model says that knows some tokens and makes others up, surely or not."""
        counts, model = plan.propose_counts.tolist(), self.draft_model
        if not counts:
            return {}
        assert len(counts) == len(rows)
        assert min(counts) >= 0 and max(counts) <= self.config.proposal_length_max
        assert sum(counts) <= self.config.step_proposals_max
        starts, tokens, chances = [0], [], []
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            assert count == 0 or index in plan.sample_rows
            follows = row.start + len(row.tokens) - row.doubtful + 1
            for at in range(follows, follows + model.randrange(count + 1)):
                knows = at < len(row.history) and model.random() < 0.85
                made_up = model.choice([0, 1, model.randrange(self.vocabulary), 2**31 - 1])
                tokens.append(int(row.history[at]) if knows else made_up)
                chances.append(model.choice([0.1, 0.7, 0.9, 1.0, 1.5, -1.0, np.nan, np.inf]))
            starts.append(len(tokens))
        return {
            "proposed_starts": i32(*starts),
            "proposed_tokens": i32(*tokens),
            "proposed_chances": np.array(chances, dtype=np.float32),
            "caught_up_tokens": model.choice([0, 1, 70]),
        }

    def _rows(self, plan: StepPlan) -> list[Row]:
        assert len(set(plan.row_slots.tolist())) == len(plan.row_slots)
        rows, drafted = [], 0
        for index, (slot, start) in enumerate(
            zip(plan.row_slots.tolist(), plan.context_lens.tolist(), strict=True)
        ):
            tokens = plan.token_ids[plan.query_starts[index] : plan.query_starts[index + 1]]
            request = int(self.bound[slot])
            history, doubtful = self._history(request), 0
            if index < plan.decode_count:
                assert self.last[slot] != NOTHING
                assert tokens[0] == 0
                tokens = np.concatenate([self.last[[slot]], tokens[1:]]).astype(np.int32)
                shown = history[start : start + len(tokens)]
                right = int(np.argmin(np.append(tokens[: len(shown)] == shown, False)))
                doubtful = len(tokens) - max(right, 1)
                drafted += len(tokens) - 1
                for flight in self.flights:
                    speculates = np.flatnonzero(flight.plan.row_slots == slot)
                    starts = flight.plan.query_starts
                    for at in speculates[speculates < flight.plan.decode_count]:
                        assert starts[at + 1] - starts[at] == 1, "a row goes on from a draft"
                    if len(flight.plan.propose_counts):
                        asked = flight.plan.propose_counts[speculates]
                        assert not asked.any(), "a row goes on before its proposal is there"
            rows.append(
                Row(
                    slot=slot,
                    request=request,
                    start=start,
                    tokens=tokens,
                    salt=self._salt(request),
                    history=history,
                    doubtful=doubtful,
                )
            )
        assert drafted <= self.config.step_drafts_max
        return rows

    def _feed(self, group: GroupStorage, part: GroupPlan, rows: list[Row]) -> dict[int, set[int]]:
        """Writes every row's KV, then says which pages the step reads for whom."""
        index = self.groups.index(group)
        reads: dict[int, set[int]] = {}
        at = 0
        for row in rows:
            for page in group.written(row):
                for flight in self.flights:
                    others = flight.reads[index].get(page, set()) - {row.request}
                    assert not others, f"page {page} is rewritten while {others} read it"
            kv_slots = part.kv_slots[at : at + len(row.tokens)]
            at += len(row.tokens) if group.paged else 0
            for page in group.write(row, kv_slots):
                reads.setdefault(page, set()).add(row.request)
        assert at == len(part.kv_slots)
        return reads
