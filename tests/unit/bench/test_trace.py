"""Traces: what is read, and what is refused with its place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.bench.traces import DJANGO, MOONCAKE, sessions, trace_of
from tokenspeed.bench import TraceRequest, read_trace
from tokenspeed.bench.tokens import assign_tokens
from tokenspeed.core.errors import WorkloadError

GOOD: dict[str, Any] = {
    "timestamp": 5,
    "input_length": 1200,
    "output_length": 7,
    "hash_ids": [1, 2],
}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_a_line_is_read_into_a_request(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, GOOD | {"session": "a", "turn": 3}))
    assert trace.name == "trace"
    assert trace.requests == (
        TraceRequest(
            sent_us=5000, input_tokens=1200, output_tokens=7, blocks=(1, 2), session="a", turn=3
        ),
    )


def test_requests_come_in_order_of_time_and_equal_times_in_order_of_lines(tmp_path: Path) -> None:
    lines = [GOOD | {"timestamp": at, "output_length": n} for n, at in enumerate([9, 4, 9, 4], 1)]
    trace = read_trace(written(tmp_path, *lines))
    assert [entry.output_tokens for entry in trace.requests] == [2, 4, 1, 3]


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 3]])
def test_a_partial_block_may_have_an_id_or_none(tmp_path: Path, ids: list[int]) -> None:
    (request,) = read_trace(written(tmp_path, GOOD | {"hash_ids": ids})).requests
    assert request.full_blocks == (1, 2)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "truncated"),
        ("[]", "object"),
        ("\udcff", "malformed"),
        (GOOD | {"colour": "red"}, "colour"),
        (GOOD | {"timestamp": -1}, "timestamp"),
        (GOOD | {"timestamp": 1e300}, "timestamp"),
        (GOOD | {"timestamp": "now"}, "timestamp"),
        (GOOD | {"input_length": 0}, "input_length"),
        (GOOD | {"input_length": 2**40}, "input_length"),
        (GOOD | {"input_length": 1200.5}, "input_length"),
        (GOOD | {"output_length": 0}, "output_length"),
        (GOOD | {"output_length": -3}, "output_length"),
        (GOOD | {"hash_ids": [1]}, "hash_ids"),
        (GOOD | {"hash_ids": [1, 2, 3, 4]}, "hash_ids"),
        (GOOD | {"hash_ids": [1, -2]}, "hash_ids"),
        (GOOD | {"hash_ids": [1, 2**70]}, "hash_ids"),
        (GOOD | {"turn": 1}, "session"),
        (GOOD | {"session": "a", "turn": -1}, "turn"),
        ({"timestamp": 1}, "input_length"),
    ],
    ids=str,
)
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: Any, named: str) -> None:
    path = tmp_path / "trace.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_bytes(
        (json.dumps(GOOD) + "\n\n" + text + "\n").encode("utf-8", errors="surrogateescape")
    )
    with pytest.raises(WorkloadError, match="line 3") as caught:
        read_trace(path)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("second", "third"),
    [
        ({"turn": 1, "timestamp": 9}, {"turn": 1, "timestamp": 10}),
        ({"turn": 1, "timestamp": 9}, {"turn": 2, "timestamp": 8}),
    ],
)
def test_turns_of_a_session_must_ascend_with_time(
    tmp_path: Path, second: dict[str, int], third: dict[str, int]
) -> None:
    lines = [GOOD | {"session": "a"} | turn for turn in ({"turn": 0}, second, third)]
    with pytest.raises(WorkloadError, match="line 3: turn"):
        read_trace(written(tmp_path, *lines))


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no-such"):
        read_trace(tmp_path / "no-such")
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(tmp_path)
    with pytest.raises(WorkloadError, match="no request"):
        read_trace(written(tmp_path))


def test_equal_blocks_have_equal_tokens_and_others_differ() -> None:
    def request(at: int, *blocks: int) -> TraceRequest:
        return TraceRequest(sent_us=at, input_tokens=1024, output_tokens=4, blocks=blocks)

    trace = trace_of(request(0, 1, 2), request(1, 1, 3))
    tokens = assign_tokens(trace)
    first, second = (tokens.flat[start : start + 1024] for start in tokens.prompt_starts)
    assert (first[:512] == second[:512]).all()
    assert (first[512:] != second[512:]).mean() > 0.99
    again = assign_tokens(trace)
    assert (again.flat == tokens.flat).all()


def test_a_turn_repeats_the_prompt_and_the_answer_before_it() -> None:
    trace = sessions(2, 3)
    tokens = assign_tokens(trace)
    for number, request in enumerate(trace.requests):
        for earlier, before in enumerate(trace.requests[:number]):
            if (before.session, before.turn + 1) != (request.session, request.turn):
                continue
            prompt = tokens.flat[tokens.prompt_starts[number] :][: request.input_tokens]
            start = tokens.output_starts[earlier]
            history = np.concatenate(
                [
                    tokens.flat[tokens.prompt_starts[earlier] :][: before.input_tokens],
                    tokens.flat[start : start + before.output_tokens],
                ]
            )
            assert (prompt[: len(history)] == history).all()
    assert sorted(set(tokens.chains.tolist())) == [0, 1]


def test_an_answer_that_the_next_prompt_cuts_goes_its_own_way_from_there() -> None:
    trace = trace_of(
        TraceRequest(
            sent_us=0, input_tokens=600, output_tokens=100, blocks=(1,), session="a", turn=0
        ),
        TraceRequest(
            sent_us=9, input_tokens=650, output_tokens=100, blocks=(1,), session="a", turn=1
        ),
    )
    tokens = assign_tokens(trace)
    first = tokens.flat[tokens.output_starts[0] :][:100]
    second = tokens.flat[tokens.output_starts[1] :][:100]
    prompt = tokens.flat[tokens.prompt_starts[1] :][:650]
    assert (first[:50] == prompt[600:]).all()
    assert (first[50:] != second[:50]).mean() > 0.9


def test_without_sessions_a_conversation_is_seen_by_its_growth() -> None:
    def request(at: int, tokens: int, *blocks: int) -> TraceRequest:
        return TraceRequest(sent_us=at, input_tokens=tokens, output_tokens=100, blocks=blocks)

    # The second and third share only the first's system prompt; the fourth continues the second.
    trace = trace_of(
        request(0, 700, 0, 1),
        request(1, 1100, 0, 2, 3),
        request(2, 1300, 0, 4, 5),
        request(3, 1600, 0, 2, 6, 7),
    )
    tokens = assign_tokens(trace)
    assert tokens.chains[3] == tokens.chains[1]
    assert tokens.chains[2] not in (tokens.chains[1], tokens.chains[3])
    later = tokens.flat[tokens.prompt_starts[3] :][:1600]
    answer = tokens.flat[tokens.output_starts[1] :][:100]
    assert (later[1100:1200] == answer).all()


def test_a_prompt_that_only_repeats_another_is_not_taken_for_the_conversation() -> None:
    def request(at: int, tokens: int, *blocks: int) -> TraceRequest:
        return TraceRequest(sent_us=at, input_tokens=tokens, output_tokens=100, blocks=blocks)

    # The second has the blocks of the first, who brought them; the third goes on from the first.
    trace = trace_of(
        request(0, 1100, 0, 1, 7), request(1, 1100, 0, 1, 8), request(2, 1600, 0, 1, 2)
    )
    chains = assign_tokens(trace).chains
    assert chains[2] == chains[0] != chains[1]


@pytest.mark.parametrize("path", [DJANGO, MOONCAKE], ids=lambda path: path.stem)
def test_the_public_traces_are_read(path: Path) -> None:
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    trace = read_trace(path)
    assert len(trace.requests) == {"swe": 7509, "mooncake": 4000}[path.stem.split("_")[0]]
    assert trace.has_sessions == (path == DJANGO)
