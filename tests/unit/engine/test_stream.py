"""Streams and text, without an engine."""

import asyncio

import numpy as np
import pytest

from tokenspeed.core.errors import EngineDead, Overloaded
from tokenspeed.core.step import CacheReport, FinishReason
from tokenspeed.engine.stream import StopStrings, StreamTable, TokenStream
from tokenspeed.engine.wire import LogprobColumns, StepOutputs


class Letters:
    """A detokenizer of a vocabulary of code points."""

    def push(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Aborts:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def stream_with(*stops: str) -> tuple[TokenStream, Aborts]:
    aborts = Aborts()
    strings = StopStrings(stops, Letters()) if stops else None
    return TokenStream(request=1, prompt_tokens=1, stop_strings=strings, abort=aborts), aborts


def step(
    tokens: list[tuple[int, int]],
    finished: list[tuple[int, FinishReason]] | None = None,
    logprobs: LogprobColumns | None = None,
    admitted: tuple[int, ...] = (),
    drafts: tuple[tuple[int, int, int], ...] = (),
) -> StepOutputs:
    ended = finished or []
    return StepOutputs(
        np.array([r for r, _ in tokens], dtype=np.int64).tobytes(),
        np.array([t for _, t in tokens], dtype=np.int32).tobytes(),
        np.array([7 for _ in tokens], dtype=np.int32).tobytes(),
        np.array([r for r, _ in ended], dtype=np.int64).tobytes(),
        np.array([r for _, r in ended], dtype=np.int32).tobytes(),
        np.array([2500 for _ in ended], dtype=np.int32).tobytes(),
        np.array([[9, r] for r, _ in ended], dtype=np.int32).tobytes(),
        np.array(admitted, dtype=np.int64).tobytes(),
        np.array([[r, 1, 2, 3, 4] for r in admitted], dtype=np.int32).tobytes(),
        np.array([[1, 2, 3, 4, 5, 6, 0, r] for r, _ in ended], dtype=np.int64).tobytes(),
        logprobs,
        np.array(drafts, dtype=np.int64).tobytes(),
    )


def test_a_stream_that_a_stop_string_ends_knows_its_guesses_up_to_there() -> None:
    table = StreamTable()
    stream, aborts = stream_with("d<")
    table.add(5, stream)
    table.take(step([(5, ord("a"))], admitted=(5,)))
    assert (stream.drafted_tokens, stream.accepted_tokens) == (0, 0)
    table.take(step([(5, ord(letter)) for letter in "bc"], drafts=((5, 4, 1),)))
    assert (stream.drafted_tokens, stream.accepted_tokens) == (4, 1)
    # Five guesses are right, of which two come before the string's end or are it.
    table.take(step([(5, ord(letter)) for letter in "d<efgh"], drafts=((5, 10, 6), (9, 1, 1))))
    delta = stream.take()
    assert delta is not None
    assert delta.stop_string == "d<"
    assert aborts.count == 1
    assert (stream.drafted_tokens, stream.accepted_tokens) == (10, 3)
    table.take(step([(5, ord("i"))], drafts=((5, 12, 8),)))
    assert (stream.drafted_tokens, stream.accepted_tokens) == (10, 3)


def test_a_stream_learns_once_where_its_prompt_came_from() -> None:
    table = StreamTable()
    streams = {request: stream_with()[0] for request in (5, 6)}
    for request, stream in streams.items():
        table.add(request, stream)
    table.take(step([(5, 1)], admitted=(6, 4)))
    assert streams[5].cache is None
    assert streams[6].cache == CacheReport(
        cached_tokens=6, evicted_tokens=1, unseen_tokens=2, tail_tokens=3, divergence=4
    )


def test_tokens_that_wait_are_merged_into_one_delta() -> None:
    stream, _ = stream_with()
    for token in (1, 2, 3):
        stream.push(token, 0)
    delta = stream.take()
    assert delta is not None
    assert delta.token_ids == [1, 2, 3]
    assert stream.take() is None


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_stop_string_is_found_across_tokens_and_ends_the_request_once(cut: int) -> None:
    text = "ab<END>cd"
    stream, aborts = stream_with("<END>", "zzzzzzzz")
    for character in text[: 2 + cut]:
        stream.push(ord(character), 0)
    early = stream.take()
    assert early is not None
    for character in text[2 + cut :]:
        stream.push(ord(character), 0)
    late = stream.take()
    ids = early.token_ids + (late.token_ids if late else [])
    end = late or early
    assert Letters().push(ids) == "ab<END>"
    assert end.finish_reason is FinishReason.STOP
    assert end.stop_string == "<END>"
    assert aborts.count == 1


def test_the_earliest_of_two_stop_strings_in_one_token_wins() -> None:
    class Words:
        def push(self, ids: list[int]) -> str:
            return "abcd" * len(ids)

    assert StopStrings(("cd", "bc"), Words()).push(0) == "bc"
    assert StopStrings(("bc", "cd"), Words()).push(0) == "bc"


def test_a_stop_tokens_own_text_is_no_stop_string() -> None:
    stream, _ = stream_with("x")
    stream.push(ord("x"), 0, is_stop=True)
    stream.push_end(FinishReason.STOP, stop_token_id=ord("x"))
    delta = stream.take()
    assert delta is not None
    assert delta.stop_string is None
    assert delta.stop_token_id == ord("x")


def test_iteration_ends_after_the_delta_with_a_finish_reason() -> None:
    async def run() -> list[list[int]]:
        stream, _ = stream_with()
        loop = asyncio.get_running_loop()
        loop.call_soon(stream.push, 5, 0)
        loop.call_soon(stream.push_end, FinishReason.LENGTH)
        return [delta.token_ids async for delta in stream]

    assert asyncio.run(run()) == [[5]]


def test_a_refused_request_raises_and_says_when_to_come_back() -> None:
    table, (stream, _) = StreamTable(), stream_with()
    table.add(1, stream)
    table.take(step([], [(1, FinishReason.REFUSED)]))
    with pytest.raises(Overloaded, match="--queue-timeout allows; retry after 3 s") as caught:
        stream.take()
    assert caught.value.retry_after_s == 2.5
    assert len(table) == 0


def test_a_failed_stream_gives_what_arrived_and_then_raises() -> None:
    async def run() -> list[int]:
        stream, _ = stream_with()
        stream.push(5, 0)
        stream.fail(EngineDead("gone"))
        seen = []
        with pytest.raises(EngineDead):
            async for delta in stream:
                seen += delta.token_ids
        return seen

    assert asyncio.run(run()) == [5]


def test_abort_ends_the_stream_and_tells_the_engine_once() -> None:
    stream, aborts = stream_with()
    stream.abort()
    stream.abort()
    stream.push(1, 0)
    delta = stream.take()
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason) == ([], FinishReason.ABORT)
    assert aborts.count == 1


def test_a_step_reaches_the_streams_it_names() -> None:
    table = StreamTable()
    streams = {request: stream_with()[0] for request in (1, 2, 3)}
    for request, stream in streams.items():
        table.add(request, stream)
    table.take(step([(1, 10), (3, 30)], [(3, FinishReason.STOP)]))
    table.take(step([(1, 11), (9, 90)], [(2, FinishReason.ABORT), (9, FinishReason.LENGTH)]))
    deltas = {request: stream.take() for request, stream in streams.items()}
    assert [d.token_ids if d else None for d in deltas.values()] == [[10, 11], [], [30]]
    assert deltas[3] is not None
    assert deltas[3].stop_token_id == 30
    assert deltas[3].cached_tokens == 7
    assert len(table) == 1


def test_of_several_tokens_of_a_step_only_the_last_is_the_stop_token() -> None:
    table = StreamTable()
    stream, aborts = stream_with("<END>")
    plain, _ = stream_with()
    table.add(1, stream)
    table.add(2, plain)
    # The stop token's own text would complete the string; before it the string is one.
    table.take(
        step(
            [*((1, ord(character)) for character in "a<END"), (2, 5), (1, ord(">"))],
            finished=[(1, FinishReason.STOP)],
        )
    )
    delta = stream.take()
    assert delta is not None
    assert delta.stop_token_id == ord(">")
    assert delta.stop_string is None
    assert aborts.count == 0
    assert (stream.drafted_tokens, stream.accepted_tokens) == (9, int(FinishReason.STOP))
    other, _ = stream_with("<END>")
    table.add(3, other)
    table.take(step([(3, ord(character)) for character in "a<END>b"], [(3, FinishReason.STOP)]))
    delta = other.take()
    assert delta is not None
    assert delta.stop_string == "<END>"
    assert len(delta.token_ids) == 6


def test_behind_a_stop_string_no_log_probability_is_left() -> None:
    table = StreamTable()
    stream, _ = stream_with("b")
    table.add(1, stream)
    columns = LogprobColumns(
        entries=np.arange(3, dtype=np.int32).tobytes(),
        chosen=np.array([-1, -2, -3], dtype=np.float32).tobytes(),
        top_token_ids=b"",
        top_values=b"",
        top_counts=np.zeros(3, dtype=np.int32).tobytes(),
        width=0,
    )
    table.take(step([(1, ord(character)) for character in "abc"], logprobs=columns))
    delta = stream.take()
    assert delta is not None
    assert delta.token_ids == [ord("a"), ord("b")]
    assert delta.logprobs is not None
    assert [entry.logprob for entry in delta.logprobs] == [-1, -2]


def test_logprobs_go_to_their_tokens() -> None:
    table = StreamTable()
    streams = {request: stream_with()[0] for request in (1, 2)}
    for request, stream in streams.items():
        table.add(request, stream)
    columns = LogprobColumns(
        entries=np.array([1], dtype=np.int32).tobytes(),
        chosen=np.array([-0.5], dtype=np.float32).tobytes(),
        top_token_ids=np.array([[4, 5]], dtype=np.int32).tobytes(),
        top_values=np.array([[-0.5, -2.0]], dtype=np.float32).tobytes(),
        top_counts=np.array([1], dtype=np.int32).tobytes(),
        width=2,
    )
    table.take(step([(1, 3), (2, 4)], None, columns))
    first, second = streams[1].take(), streams[2].take()
    assert first is not None
    assert second is not None
    assert first.logprobs is None
    assert second.logprobs is not None
    assert second.logprobs[0].logprob == -0.5
    assert second.logprobs[0].top_token_ids == [4]


def test_a_rest_lets_tokens_gather_and_ends_when_the_stream_does() -> None:
    async def run() -> list[list[int]]:
        stream, _ = stream_with()
        loop = asyncio.get_running_loop()
        loop.call_soon(stream.push, 1, 0)
        loop.call_soon(stream.push, 2, 0)
        loop.call_soon(stream.push_end, FinishReason.LENGTH)
        # A rest that the end of the stream did not cut short would outlast the test.
        await stream.rest()
        await stream.rest()
        return [delta.token_ids async for delta in stream]

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [[1, 2]]


def test_a_rest_ends_when_it_is_told_to() -> None:
    async def run() -> bool:
        stream, _ = stream_with()
        stream.end_rest()
        asyncio.get_running_loop().call_soon(stream.end_rest)
        await stream.rest()
        return stream.done

    assert asyncio.run(run()) is False
