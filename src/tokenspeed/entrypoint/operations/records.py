"""What became of requests: those that run, and the last that ended."""

import contextlib
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tokenspeed.core.errors import EngineDead, Overloaded, RequestError
from tokenspeed.entrypoint.operations.sessions import SessionIndex

if TYPE_CHECKING:
    from tokenspeed.core.step import CacheReport
    from tokenspeed.engine.facts import RequestTimes
    from tokenspeed.engine.stream import TokenStream
    from tokenspeed.entrypoint.history import TokenIds

__all__ = ["EndedRequest", "RequestBook", "RequestRecord", "SampleRecord", "SessionView"]

ENDED_MAX = 1000
SESSIONS_MAX = 256
ID_CHARS_MAX = 256
ERROR_CHARS_MAX = 400
# The engine's account of a request that was ended on this side comes a step later; where it has
# not come by then, the engine is gone.
_ACCOUNT_TIMEOUT_S = 30.0
# A client that says when it sent a request may be wrong about the time.
_GATEWAY_MAX_S = 3600.0
_START = re.compile(r"(?:\A|/)start=(\d{12,14})(?=[/-])")
# The ending that the gateway gives an id.
_ENDING = re.compile(r"-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """One sample of a request.

    Attributes:
        tokens: how many it had.
        outcome: "stop", "length", "abort", "rejected"; None where an error ended it.
        first_token_s: monotonic time of its first token here; None without one.
        ended_s: monotonic time of its end here.
        times: where its time went in the engine; None where the engine never told.
        drafted_tokens, accepted_tokens: guesses that steps verified for it, and those that were
            right.
    """

    tokens: int
    drafted_tokens: int
    accepted_tokens: int
    outcome: str | None
    first_token_s: float | None
    ended_s: float
    times: "RequestTimes | None"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """A request that runs, or whose account has not come yet.

    Attributes:
        number: counts requests up.
        id: the gateway's.
        tenant: whom the client named; None for nobody.
        sent_unix_s: when the client sent it, where its `x-request-id` says so.
        arrived_s, arrived_unix_s: when it came here, by the monotonic clock and by the wall's.
        prompt_tokens: its length; 0 before it was read.
        streams: one for each sample.
        session: the conversation it belongs to; None before that was found out.
        ended_s: when its call ended.
        error: what ended it, where an error did; `outcome` is its kind then.
    """

    number: int
    id: str
    tenant: str | None
    sent_unix_s: float | None
    arrived_s: float
    arrived_unix_s: float
    prompt_tokens: int = 0
    streams: "tuple[TokenStream, ...]" = ()
    session: int | None = None
    ended_s: float | None = None
    outcome: str | None = None
    error: str | None = None
    _prompt: "TokenIds | None" = field(default=None, repr=False)

    def begin(self, prompt: "TokenIds", streams: "Sequence[TokenStream]") -> None:
        """The request was taken, and runs."""
        self.prompt_tokens = len(prompt)
        self.streams = tuple(streams)
        self._prompt = prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """A request that ended; fields as of `RequestRecord`."""

    number: int
    id: str
    tenant: str | None
    session: int | None
    sent_unix_s: float | None
    arrived_s: float
    arrived_unix_s: float
    ended_s: float
    prompt_tokens: int
    cached_tokens: int
    cache: "CacheReport | None"
    outcome: str
    error: str | None
    samples: tuple[SampleRecord, ...]

    @property
    def output_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(sample.tokens for sample in self.samples)

    @property
    def drafted_tokens(self) -> int:
        """Guesses that steps verified, for all samples."""
        return sum(sample.drafted_tokens for sample in self.samples)

    @property
    def accepted_tokens(self) -> int:
        """Those of them that were right."""
        return sum(sample.accepted_tokens for sample in self.samples)

    @property
    def first_token_s(self) -> float | None:
        """From its arrival to the first token of any sample, in seconds."""
        firsts = [s.first_token_s for s in self.samples if s.first_token_s is not None]
        return min(firsts) - self.arrived_s if firsts else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second that its user saw after the first; None below two tokens."""
        rates = []
        for sample in self.samples:
            times = sample.times
            if sample.tokens < 2 or times is None or times.first_token_at_us is None:
                continue
            assert times.ended_at_us is not None
            span_us = times.ended_at_us - times.first_token_at_us
            if span_us > 0:
                rates.append((sample.tokens - 1) * 1e6 / span_us)
        return min(rates) if rates else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """One conversation.

    Attributes:
        session: its number.
        tenant: whose it is.
        requests, prompt_tokens, cached_tokens, output_tokens: sums over its requests that ended.
        context_tokens: length of its last prompt and the answer.
        tokens_per_s: of its last request that had a rate.
        spoke_unix_s: when its last request came.
    """

    session: int
    tenant: str | None
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    context_tokens: int = 0
    tokens_per_s: float | None = None
    spoke_unix_s: float


class RequestBook:
    """Keeps account of requests. The servicer writes it; any thread may read it."""

    def __init__(self) -> None:
        self._on_end: Callable[[EndedRequest], None] | None = None
        self._lock = threading.Lock()
        self._numbers = 0
        self._live: dict[int, RequestRecord] = {}
        # Ended here, and the engine's account is still to come.
        self._ending: deque[RequestRecord] = deque()
        self._ended: OrderedDict[int, EndedRequest] = OrderedDict()
        self._index = SessionIndex(SESSIONS_MAX)
        self._sessions: dict[int, SessionView] = {}

    def watch(self, on_end: Callable[[EndedRequest], None]) -> None:
        """Keep requests that end from now on, and have `settle` call this for each, once its
        account is complete. Before, only those that run are known."""
        self._on_end = on_end

    @contextlib.contextmanager
    def observed(self, request_id: str, tenant: str | None) -> Iterator[RequestRecord]:
        """A record for the time a request's call runs. Errors pass through and are noted."""
        now_s, now_unix_s = time.monotonic(), time.time()
        with self._lock:
            self._numbers += 1
            record = RequestRecord(
                number=self._numbers,
                id=request_id[:ID_CHARS_MAX],
                tenant=None if tenant is None else tenant[:ID_CHARS_MAX],
                sent_unix_s=_sent_unix_s(request_id, now_unix_s),
                arrived_s=now_s,
                arrived_unix_s=now_unix_s,
            )
            self._live[record.number] = record
        try:
            yield record
        except BaseException as error:
            record.outcome = _kind(error)
            record.error = str(error)[:ERROR_CHARS_MAX] or type(error).__name__
            raise
        finally:
            record.ended_s = time.monotonic()
            with self._lock:
                del self._live[record.number]
                # Unwatched, nobody would ever take it from there.
                if self._on_end is not None:
                    self._ending.append(record)

    def settle(self) -> None:
        """Take up what happened since the last call: sessions of new requests, accounts of ended
        ones. Cheap when nothing did; not on the way of any token."""
        now_s = time.monotonic()
        ended: list[EndedRequest] = []
        with self._lock:
            for record in sorted((*self._live.values(), *self._ending), key=_number):
                if record._prompt is not None:
                    self._find_session(record)
            waiting = len(self._ending)
            for _ in range(waiting):
                record = self._ending.popleft()
                if _is_settled(record, now_s):
                    ended.append(self._end(record))
                else:
                    self._ending.append(record)
        for request in ended:
            assert self._on_end is not None
            self._on_end(request)

    def live(self) -> list[RequestRecord]:
        """Requests that have not ended, in order of arrival."""
        with self._lock:
            return [*self._live.values()]

    def ended(self) -> list[EndedRequest]:
        """The last requests that ended, the latest first."""
        with self._lock:
            return [*reversed(self._ended.values())]

    def find(self, request_id: str) -> RequestRecord | EndedRequest | None:
        """The latest request with this id, with or without the ending the gateway gave it."""
        wanted = request_id[:ID_CHARS_MAX]
        with self._lock:
            pools: tuple[list[RequestRecord | EndedRequest], ...] = (
                [*self._live.values()],
                [*self._ending],
                [*self._ended.values()],
            )
        for pool in pools:
            for record in reversed(pool):
                if wanted in (record.id, _ENDING.sub("", record.id)):
                    return record
        return None

    def sessions(self) -> list[SessionView]:
        """The conversations of late, whoever spoke last first."""
        with self._lock:
            views = [*self._sessions.values()]
        return sorted(views, key=lambda view: -view.spoke_unix_s)

    def _find_session(self, record: RequestRecord) -> None:
        assert record._prompt is not None
        session, forgotten = self._index.take(record._prompt, record.tenant)
        record._prompt = None
        record.session = session
        if forgotten is not None:
            self._sessions.pop(forgotten, None)
        view = self._sessions.get(session)
        if view is None:
            view = SessionView(
                session=session, tenant=record.tenant, spoke_unix_s=record.arrived_unix_s
            )
        self._sessions[session] = replace(
            view, context_tokens=record.prompt_tokens, spoke_unix_s=record.arrived_unix_s
        )

    def _end(self, record: RequestRecord) -> EndedRequest:
        ended = _ended(record)
        self._ended[ended.number] = ended
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        view = None if ended.session is None else self._sessions.get(ended.session)
        if view is not None:
            rate = ended.tokens_per_s
            self._sessions[view.session] = replace(
                view,
                requests=view.requests + 1,
                prompt_tokens=view.prompt_tokens + ended.prompt_tokens,
                cached_tokens=view.cached_tokens + ended.cached_tokens,
                output_tokens=view.output_tokens + ended.output_tokens,
                context_tokens=max(view.context_tokens, ended.prompt_tokens + ended.output_tokens),
                tokens_per_s=view.tokens_per_s if rate is None else rate,
            )
        return ended


def _number(record: RequestRecord) -> int:
    return record.number


def _is_settled(record: RequestRecord, now_s: float) -> bool:
    assert record.ended_s is not None
    complete = all(stream.times is not None for stream in record.streams)
    return complete or now_s - record.ended_s > _ACCOUNT_TIMEOUT_S


def _ended(record: RequestRecord) -> EndedRequest:
    assert record.ended_s is not None
    samples = tuple(
        SampleRecord(
            tokens=stream.tokens,
            drafted_tokens=stream.drafted_tokens,
            accepted_tokens=stream.accepted_tokens,
            outcome=None if stream.finish_reason is None else stream.finish_reason.name.lower(),
            first_token_s=stream.first_token_s,
            ended_s=record.ended_s if stream.ended_s is None else stream.ended_s,
            times=stream.times,
        )
        for stream in record.streams
    )
    outcomes = [sample.outcome for sample in samples if sample.outcome is not None]
    reports = [stream.cache for stream in record.streams if stream.cache is not None]
    return EndedRequest(
        number=record.number,
        id=record.id,
        tenant=record.tenant,
        session=record.session,
        sent_unix_s=record.sent_unix_s,
        arrived_s=record.arrived_s,
        arrived_unix_s=record.arrived_unix_s,
        ended_s=record.ended_s,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=reports[0].cached_tokens if reports else 0,
        cache=reports[0] if reports else None,
        outcome=record.outcome or (outcomes[0] if outcomes else "error"),
        error=record.error,
        samples=samples,
    )


def _kind(error: BaseException) -> str:
    """What to call the end of a request that an error ended."""
    if isinstance(error, Overloaded):
        return "refused"
    if isinstance(error, RequestError):
        return "invalid"
    if isinstance(error, EngineDead):
        return "unavailable"
    return "error" if isinstance(error, Exception) else "abort"


def _sent_unix_s(request_id: str, arrived_unix_s: float) -> float | None:
    """When a client says it sent a request: `x-request-id: start=UNIX_MS` or `.../start=UNIX_MS`.

    None where it says nothing, or what cannot be.
    """
    told = _START.search(request_id)
    if told is None:
        return None
    sent_unix_s = int(told[1]) / 1000
    return sent_unix_s if 0.0 <= arrived_unix_s - sent_unix_s <= _GATEWAY_MAX_S else None
