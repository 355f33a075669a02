"""The numbers of a run; each is defined in docs/bench.md, in the same words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenspeed.bench.live.records import AnswerRecord, Calibration, Run

__all__ = ["Goodput", "Spread", "Summary", "TurnWait", "summarise_run"]

# Turns whose first-token times are told apart: the first computes its prompt, later ones have more
# and more of it in cache.
_TURNS = ((0, 0), (1, 4), (5, 19), (20, 49), (50, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Values that so many percent of all stay under."""

    p1: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnWait:
    """Time to the first token of answers at such a place in their session."""

    turns: str
    answers: int
    ttft_s: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """What came at the floor or faster.

    Attributes:
        floor_tps: the least TPS of a good answer.
        ttft_max_s: the longest time to its first token; None for any.
        answers_part: good ones of all that were sent, failed ones included.
        output_tpm: tokens of good answers a minute.
    """

    floor_tps: float
    ttft_max_s: float | None
    answers_part: float
    output_tpm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers. None where nothing was measured that tells.

    Attributes:
        users, repeat, stopped: as in `Run`.
        answers, errors: that were sent, and of them the failed ones; `error_kinds` counts by text.
        wrong_lengths: whole answers that have not as many tokens as were asked for.
        uncounted: whole answers whose tokens the server did not count: a piece is taken for one.
        window_s, full_load_part: what rates are over, and its part in which all users were at it.
        output_tokens: of whole answers.
        prompt_tokens: of answers whose prompt the server counted; `cached_tokens` of them from
            cache, by its word, None if it gave none.
        cached_part_by_usage, cached_part_by_ttft: of `prompt_tokens`; the second by time to the
            first token, and at least so much.
        output_tpm: output tokens a minute: those that came within the window.
        prompt_tpm, computed_prompt_tpm: prompt tokens a minute, all and those not from cache.
        tps: an answer's tokens a second from its first piece to its last.
        ttft_s, ttft_by_turn: from sending to the first piece.
        interval_ms: between two pieces of an answer; `tokens_per_piece` tells how many they carry.
        goodput: None without a floor.
        server_cpu_s, server_rss_max_bytes, server_cpu_s_per_1k_tokens: None where processes are not
            known.
    """

    users: int | None
    repeat: int
    stopped: str | None
    answers: int
    errors: int
    error_kinds: dict[str, int]
    wrong_lengths: int
    uncounted: int
    window_s: float
    full_load_part: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int | None
    cached_part_by_usage: float | None
    cached_part_by_ttft: float | None
    output_tpm: float
    prompt_tpm: float
    computed_prompt_tpm: float | None
    tps: Spread | None
    ttft_s: Spread | None
    ttft_by_turn: tuple[TurnWait, ...]
    interval_ms: Spread | None
    tokens_per_piece: float | None
    goodput: Goodput | None
    client_cpu_s: float
    server_cpu_s: float | None
    server_rss_max_bytes: int | None
    server_cpu_s_per_1k_tokens: float | None


def summarise_run(
    run: Run, *, floor_tps: float | None = None, ttft_max_s: float | None = None
) -> Summary:
    """Sum up a run."""
    whole = [answer for answer in run.answers if answer.error is None]
    minutes = max(run.window_us, 1) / 60e6
    output_tokens = sum(answer.tokens for answer in whole)
    counted = [answer for answer in whole if answer.prompt_tokens is not None]
    prompt_tokens = sum(answer.prompt_tokens or 0 for answer in counted)
    told = [answer for answer in counted if answer.cached_tokens is not None]
    cached_tokens = sum(answer.cached_tokens or 0 for answer in told) if told else None
    pieces = sum(len(answer.piece_us) for answer in whole)
    server = run.server
    return Summary(
        users=run.users,
        repeat=run.repeat,
        stopped=run.stopped,
        answers=len(run.answers),
        errors=len(run.answers) - len(whole),
        error_kinds=_kinds(run.answers),
        wrong_lengths=sum(
            answer.output_tokens is not None and answer.output_tokens != answer.asked_tokens
            for answer in whole
        ),
        uncounted=sum(answer.output_tokens is None for answer in whole),
        window_s=run.window_us / 1e6,
        full_load_part=run.full_load_us / max(run.window_us, 1),
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        cached_part_by_usage=(
            None if cached_tokens is None or not prompt_tokens else cached_tokens / prompt_tokens
        ),
        cached_part_by_ttft=_cached_by_ttft(counted, run.calibration),
        output_tpm=sum(_tokens_within(answer, run.window_us) for answer in whole) / minutes,
        prompt_tpm=prompt_tokens / minutes,
        computed_prompt_tpm=(
            None if cached_tokens is None else (prompt_tokens - cached_tokens) / minutes
        ),
        tps=_spread(filter(None, map(_tps, whole))),
        ttft_s=_spread(answer.piece_us[0] / 1e6 for answer in whole if answer.piece_us),
        ttft_by_turn=_by_turn(whole),
        interval_ms=_spread(
            interval_us / 1000
            for answer in whole
            for interval_us in np.diff(np.array(answer.piece_us, dtype=np.int64)).tolist()
        ),
        tokens_per_piece=output_tokens / pieces if pieces else None,
        goodput=None if floor_tps is None else _goodput(run, floor_tps, ttft_max_s),
        client_cpu_s=run.client_cpu_s,
        server_cpu_s=None if server is None else server.cpu_s,
        server_rss_max_bytes=None if server is None else server.rss_max_bytes,
        server_cpu_s_per_1k_tokens=(
            None if server is None or not output_tokens else server.cpu_s / output_tokens * 1000
        ),
    )


def _kinds(answers: Sequence[AnswerRecord]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            kinds[answer.error] = kinds.get(answer.error, 0) + 1
    return kinds


def _tps(answer: AnswerRecord) -> float | None:
    """None of an answer that came at once: it has no span to be fast or slow over."""
    if answer.tokens < 2 or len(answer.piece_us) < 2:
        return None
    span_us = answer.piece_us[-1] - answer.piece_us[0]
    return (answer.tokens - 1) * 1e6 / span_us if span_us > 0 else None


def _tokens_within(answer: AnswerRecord, window_us: int) -> float:
    """Of an answer's tokens, spread evenly over its pieces, those that came within the window."""
    if not answer.piece_us:
        return 0.0
    within = sum(answer.sent_us + piece_us <= window_us for piece_us in answer.piece_us)
    return answer.tokens * within / len(answer.piece_us)


def _cached_by_ttft(
    answers: Sequence[AnswerRecord], calibration: Calibration | None
) -> float | None:
    """Prompt tokens that cannot have been computed in the time there was, as a part of all."""
    begun = [answer for answer in answers if answer.piece_us and answer.prompt_tokens]
    if calibration is None or not begun:
        return None
    cached = total = 0.0
    for answer in begun:
        prompt = answer.prompt_tokens or 0
        computed = max(answer.piece_us[0] - calibration.base_us, 0.0) / calibration.token_us
        cached += max(prompt - computed, 0.0)
        total += prompt
    return cached / total


def _by_turn(answers: Sequence[AnswerRecord]) -> tuple[TurnWait, ...]:
    found = []
    for first, last in _TURNS:
        waits = [
            answer.piece_us[0] / 1e6
            for answer in answers
            if answer.piece_us and first <= answer.turn and (last is None or answer.turn <= last)
        ]
        spread = _spread(waits)
        if spread is not None:
            name = (
                f"{first}+" if last is None else str(first) if last == first else f"{first}-{last}"
            )
            found.append(TurnWait(turns=name, answers=len(waits), ttft_s=spread))
    return tuple(found)


def _goodput(run: Run, floor_tps: float, ttft_max_s: float | None) -> Goodput:
    good = []
    for answer in run.answers:
        if answer.error is not None or not answer.piece_us:
            continue
        tps = _tps(answer)
        # What came at once was not slow.
        fast = tps is None or tps >= floor_tps
        soon = ttft_max_s is None or answer.piece_us[0] <= ttft_max_s * 1e6
        if fast and soon:
            good.append(answer)
    minutes = max(run.window_us, 1) / 60e6
    return Goodput(
        floor_tps=floor_tps,
        ttft_max_s=ttft_max_s,
        answers_part=len(good) / max(len(run.answers), 1),
        output_tpm=sum(_tokens_within(answer, run.window_us) for answer in good) / minutes,
    )


def _spread(values: Iterable[float]) -> Spread | None:
    found = np.array(list(values), dtype=np.float64)
    if not len(found):
        return None
    p1, p10, p50, p90, p99 = np.percentile(found, [1, 10, 50, 90, 99]).tolist()
    return Spread(p1=p1, p10=p10, p50=p50, p90=p90, p99=p99, max=float(found.max()))
