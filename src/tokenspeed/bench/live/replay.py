"""Plays sessions against a server: users in a closed loop, or requests at their recorded times.

In a closed loop each user takes up a session, sends a turn, waits for the whole answer, lets the
tool's time pass and sends the next, with the server's own answers as history, and so on to the
next session.
"""

import asyncio
import contextlib
import dataclasses
import math
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenspeed.bench.live.client import Answer, ChatClient
from tokenspeed.bench.live.processes import ProcessMeter
from tokenspeed.bench.live.records import AnswerRecord, Calibration, Run
from tokenspeed.bench.sessions import Message, Session, Workload
from tokenspeed.bench.sessions.words import words
from tokenspeed.core.errors import ConfigError, MeasurementError

__all__ = ["INTERRUPTED", "Pass", "calibrate", "replay", "warm_up"]

# Why a run ended that Ctrl-C ended.
INTERRUPTED = "interrupted"

_SAMPLE_S = 1.0
_PROMPT_TOKENS = (128, 1024)
_PROMPTS = 3

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """How the workload is gone through once.

    Attributes:
        users: sessions open at once; None for an open loop.
        repeat: which of the passes with so many users.
        duration_s: after this long no turn is sent any more, and until then sessions that are over
            begin anew, under another salt; None to play each session once.
        speed: how many times faster than recorded an open loop's requests come.
        errors_max: the run stops after so many failed answers in a row.
        salt: what to put at the head of each session; empty for nothing, None for something new.
    """

    users: int | None
    repeat: int = 0
    duration_s: float | None = None
    speed: float = 1.0
    errors_max: int = 10
    salt: str | None = None

    def __post_init__(self) -> None:
        if self.users is not None and not 1 <= self.users <= 100_000:
            raise ConfigError(f"--concurrency must be in [1, 100000], but is {self.users}")
        if self.duration_s is not None and not 0 < self.duration_s <= 1e7:
            raise ConfigError(f"--duration must be in (0, 1e7] seconds, but is {self.duration_s}")
        if not (math.isfinite(self.speed) and 1e-6 <= self.speed <= 1e6):
            raise ConfigError(f"--speed must be in [1e-6, 1e6], but is {self.speed}")
        if self.errors_max < 1:
            raise ConfigError(f"--errors-max must be at least 1, but is {self.errors_max}")


async def warm_up(client: ChatClient, *, attempts: int = 1) -> None:
    """Have one short answer, and learn whether the server takes what forces an answer's length.

    Args:
        attempts: for servers that say they are ready before they are; a second passes between two.

    Raises:
        MeasurementError: no attempt gave an answer.
    """
    for left in reversed(range(attempts)):
        answer = await _ask(client, words(secrets.token_hex(8), 32), 8)
        if answer.error is not None and answer.error.startswith(("HTTP 400", "HTTP 422")):
            client.forces_lengths = not client.forces_lengths
            answer = await _ask(client, words(secrets.token_hex(8), 32), 8)
        if answer.error is None:
            return
        if not left:
            raise MeasurementError(f"{client.url} gave no answer to a first prompt: {answer.error}")
        await asyncio.sleep(1)


async def calibrate(client: ChatClient) -> Calibration:
    """How long the first token of a new prompt takes on an idle server, by the prompt's length.

    Raises:
        MeasurementError: an answer failed.
    """
    points: list[tuple[int, float]] = []
    for tokens in _PROMPT_TOKENS:
        found = []
        for _ in range(_PROMPTS):
            answer = await _ask(client, words(secrets.token_hex(8), tokens), 2)
            if answer.error is not None or not answer.piece_s:
                raise MeasurementError(
                    f"{client.url} gave no answer to a prompt of {tokens} tokens: "
                    f"{answer.error or 'no text came'}"
                )
            waited_us = (answer.piece_s[0] - answer.sent_s) * 1e6
            counted = answer.prompt_tokens or tokens
            found.append((counted - (answer.cached_tokens or 0), waited_us))
        points.append((found[0][0], statistics.median(waited_us for _, waited_us in found)))
    (short, short_us), (long, long_us) = points
    token_us = max((long_us - short_us) / max(long - short, 1), 1e-3)
    return Calibration(base_us=max(short_us - token_us * short, 0.0), token_us=token_us)


async def replay(
    client: ChatClient,
    workload: Workload,
    asked: Pass,
    *,
    meter: ProcessMeter | None = None,
    calibration: Calibration | None = None,
    watch: Callable[[AnswerRecord], None] | None = None,
    clock: Clock = time.perf_counter,
) -> Run:
    """Go through the workload once. A server that goes away ends the run, and is told in it.

    Args:
        workload: every turn says how long its answer is; see `sessions.cut`.
        meter: of the server's processes.
        watch: told of every answer as it ends.

    Raises:
        ConfigError: an open loop over sessions without times.
    """
    if asked.users is None and not workload.has_arrivals:
        raise ConfigError(
            f"an open loop needs a trace, but {workload.source} does not say when its sessions "
            "begin; use --concurrency"
        )
    return await _Replay(
        client, workload, asked, meter=meter, calibration=calibration, watch=watch, clock=clock
    ).run()


class _Replay:
    def __init__(
        self,
        client: ChatClient,
        workload: Workload,
        asked: Pass,
        *,
        meter: ProcessMeter | None,
        calibration: Calibration | None,
        watch: Callable[[AnswerRecord], None] | None,
        clock: Clock,
    ) -> None:
        self._client = client
        self._workload = workload
        self._asked = asked
        self._meter = meter
        self._calibration = calibration
        self._watch = watch
        self._clock = clock
        self._salt = asked.salt if asked.salt is not None else secrets.token_hex(4)
        self._answers: list[AnswerRecord] = []
        self._errors_in_row = 0
        self._stopped: str | None = None
        self._stop = asyncio.Event()
        self._full_load_us: int | None = None
        self._start_s = 0.0

    async def run(self) -> Run:
        began_at, cpu_s = time.time(), time.process_time()
        with contextlib.ExitStack() as stack:
            if self._meter is not None:
                stack.enter_context(self._meter)
            self._start_s = self._clock()
            try:
                async with asyncio.TaskGroup() as group:
                    metering = group.create_task(self._sample())
                    await self._play()
                    metering.cancel()
            except asyncio.CancelledError:
                # Ctrl-C: what was measured until now is kept.
                self._stopped = INTERRUPTED
            end_us = self._now_us()
            duration_s = self._asked.duration_s
            if duration_s is not None and self._stopped is None:
                end_us = round(duration_s * 1e6)
        return Run(
            users=self._asked.users,
            repeat=self._asked.repeat,
            salt=self._salt,
            began_at=began_at,
            window_us=end_us,
            full_load_us=min(end_us if self._full_load_us is None else self._full_load_us, end_us),
            client_cpu_s=time.process_time() - cpu_s,
            server=None if self._meter is None else self._meter.usage(),
            calibration=self._calibration,
            stopped=self._stopped,
            answers=tuple(sorted(self._answers, key=lambda answer: answer.sent_us)),
        )

    async def _play(self) -> None:
        async with asyncio.TaskGroup() as group:
            if self._asked.users is None:
                for session in self._workload.sessions:
                    group.create_task(self._arrive(session))
            else:
                queue = self._queue()
                for _ in range(self._asked.users):
                    group.create_task(self._use(queue))

    def _queue(self) -> Iterator[tuple[Session, str]]:
        """Sessions and their salts, in the order in which users take them up."""
        number = 0
        while True:
            for session in self._workload.sessions:
                if number == 0:
                    yield session, self._salt
                else:
                    name = f"{session.name}#{number}"
                    yield dataclasses.replace(session, name=name), f"{self._salt}-{number}"
            number += 1
            if self._asked.duration_s is None:
                return

    async def _use(self, queue: Iterator[tuple[Session, str]]) -> None:
        for session, salt in queue:
            await self._converse(session, salt)
            if self._is_over():
                break
        if self._full_load_us is None:
            self._full_load_us = self._now_us()

    async def _arrive(self, session: Session) -> None:
        assert session.start_s is not None
        await self._pause(session.start_s / self._asked.speed - self._now_us() / 1e6)
        if not self._is_over():
            await self._converse(session, self._salt)

    async def _converse(self, session: Session, salt: str) -> None:
        history: list[dict[str, str]] = []
        for index, turn in enumerate(session.turns):
            if index:
                await self._pause(turn.gap_s)
            if self._is_over():
                return
            history += [
                _sent(message, salt if index == 0 and number == 0 else None)
                for number, message in enumerate(turn.messages)
            ]
            assert turn.output_tokens is not None
            answer = await self._client.answer(history, output_tokens=turn.output_tokens)
            self._note(session.name, index, turn.output_tokens, answer)
            if answer.error is not None:
                await self._judge(answer)
                # Whatever comes next would go on from an answer that is not whole.
                return
            history.append({"role": "assistant", "content": answer.text})

    def _note(self, session: str, turn: int, asked_tokens: int, answer: Answer) -> None:
        record = AnswerRecord(
            session=session,
            turn=turn,
            sent_us=round((answer.sent_s - self._start_s) * 1e6),
            piece_us=tuple(round((piece_s - answer.sent_s) * 1e6) for piece_s in answer.piece_s),
            ended_us=round((answer.ended_s - answer.sent_s) * 1e6),
            asked_tokens=asked_tokens,
            output_tokens=answer.output_tokens,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            error=answer.error,
        )
        self._answers.append(record)
        if self._watch is not None:
            self._watch(record)

    async def _judge(self, answer: Answer) -> None:
        """Stop the run where going on can measure nothing."""
        self._errors_in_row += 1
        if answer.unreachable and not self._stop.is_set() and not await self._client.is_reachable():
            self._end(f"the server at {self._client.url} went away: {answer.error}")
        elif self._errors_in_row >= self._asked.errors_max:
            self._end(
                f"{self._errors_in_row} answers in a row failed, the last one with {answer.error}"
            )

    def _end(self, reason: str) -> None:
        if self._stopped is None:
            self._stopped = reason
        self._stop.set()

    async def _pause(self, seconds: float) -> None:
        """Let time pass, but not beyond the end of the run."""
        if self._asked.duration_s is not None:
            seconds = min(seconds, self._asked.duration_s - self._now_us() / 1e6)
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)

    async def _sample(self) -> None:
        while self._meter is not None:
            await asyncio.sleep(_SAMPLE_S)
            # In a thread: to look through all processes takes longer than a token does.
            await asyncio.to_thread(self._meter.sample)

    def _is_over(self) -> bool:
        duration_s = self._asked.duration_s
        return self._stop.is_set() or (
            duration_s is not None and self._now_us() >= round(duration_s * 1e6)
        )

    def _now_us(self) -> int:
        return round((self._clock() - self._start_s) * 1e6)


def _sent(message: Message, salt: str | None) -> dict[str, str]:
    content = f"[{salt}] {message.content}" if salt else message.content
    return {"role": message.role, "content": content}


async def _ask(client: ChatClient, prompt: str, output_tokens: int) -> Answer:
    message = {"role": "user", "content": prompt}
    return await client.answer([message], output_tokens=output_tokens)
