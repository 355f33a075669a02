"""Session files are read as they are, and wrong ones say where."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokenspeed.bench.sessions import (
    SWE,
    Session,
    Workload,
    cut,
    generate_sessions,
    read_sessions,
)
from tokenspeed.core.errors import ConfigError, WorkloadError

TOOL = {"type": "function", "function": {"name": "bash"}}
CALL = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
CONVERSATION = {
    "id": "one",
    "tools": [TOOL],
    "messages": [
        {"role": "system", "content": "You fix bugs."},
        {"role": "user", "content": "Fix this."},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "a.py", "tool_call_id": "c"},
        {"role": "tool", "content": [{"type": "text", "text": "b.py"}], "tool_call_id": "d"},
        {"role": "assistant", "content": "x" * 340},
        {"role": "user", "content": "nothing answers this"},
    ],
    "meta": {"turns": [{"completion_tokens": 42, "tool_latency_s": 0.25}]},
}
ABENCH = {
    "session_id": "one",
    "source": {"dataset": "d"},
    "system_prompt": "You fix bugs.",
    "turns": [
        {"index": 0, "input_delta": [{"role": "user", "content": "Fix this."}], "output_tokens": 7},
        {
            "index": 1,
            "input_delta": [{"role": "user", "content": "a.py"}],
            "output_tokens": 8,
            "pre_gap_ms": 118.0,
        },
    ],
}
SWE_SMITH = {
    "metadata": {"min_turns": 1},
    "conversations": [
        [
            {"messages": [{"role": "user", "content": "Fix this."}], "prompt_tokens": 9},
            {"messages": [{"role": "user", "content": "a.py"}], "prompt_tokens": 40},
        ]
    ],
}


def file(folder: Path, text: str) -> Path:
    path = folder / "sessions"
    path.write_text(text)
    return path


def only(workload: Workload) -> Session:
    (session,) = workload.sessions
    return session


def test_a_conversation_becomes_turns_with_recorded_lengths_and_tool_times(tmp_path: Path) -> None:
    session = only(read_sessions(file(tmp_path, json.dumps(CONVERSATION) + "\n\n")))
    first, second = session.turns
    assert session.name == "one"
    assert [message.role for message in first.messages] == ["system", "user"]
    assert first.messages[0].content == f"You fix bugs.\n\n# Tools\n\n{json.dumps(TOOL)}"
    assert (first.output_tokens, first.gap_s) == (42, 0.0)
    # Nobody counted the second answer: 340 characters are some 100 tokens.
    assert (second.output_tokens, second.gap_s) == (100, 0.25)
    assert [(m.role, m.content) for m in second.messages] == [("user", "a.py"), ("user", "b.py")]


def test_a_file_of_agentic_bench_becomes_turns(tmp_path: Path) -> None:
    first, second = only(read_sessions(file(tmp_path, json.dumps(ABENCH)))).turns
    assert [message.content for message in first.messages] == ["You fix bugs.", "Fix this."]
    assert (first.output_tokens, first.gap_s) == (7, 0.0)
    assert [message.content for message in second.messages] == ["a.py"]
    assert (second.output_tokens, second.gap_s) == (8, 0.118)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_document_of_evalscope_has_no_lengths_of_answers(
    tmp_path: Path, indent: int | None
) -> None:
    workload = read_sessions(file(tmp_path, json.dumps(SWE_SMITH, indent=indent)))
    assert [turn.output_tokens for turn in only(workload).turns] == [None, None]
    with pytest.raises(ConfigError, match="--output-tokens"):
        cut(workload)
    asked = cut(workload, output_tokens=9)
    assert [turn.output_tokens for turn in only(asked).turns] == [9, 9]


def test_a_trace_becomes_prompts_that_share_what_its_blocks_share(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [1, 2, 3]},
        {"timestamp": 500, "input_length": 1030, "output_length": 4, "hash_ids": [1, 2, 9]},
        {"timestamp": 900, "input_length": 600, "output_length": 5, "hash_ids": [8]},
    ]
    workload = read_sessions(file(tmp_path, "\n".join(map(json.dumps, lines))))
    assert workload.has_arrivals
    assert [session.start_s for session in workload.sessions] == [0.0, 0.5, 0.9]
    prompts = [only_prompt(session).split() for session in workload.sessions]
    assert [len(prompt) for prompt in prompts] == [1100, 1030, 600]
    assert prompts[0][:1024] == prompts[1][:1024]
    assert prompts[0][1024:1030] != prompts[1][1024:1030]
    assert prompts[2][:512] != prompts[0][:512]


def only_prompt(session: Session) -> str:
    (turn,) = session.turns
    (message,) = turn.messages
    return message.content


def changed(change: Callable[[dict[str, object]], object], whole: dict[str, object]) -> str:
    copy = json.loads(json.dumps(whole))
    change(copy)
    return json.dumps(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the file is empty"),
        ('{"name": 1}', "line 1: no known format has the fields name"),
        ("[1, 2]", "line 1: no known format"),
        (json.dumps(CONVERSATION) + "\n{", "line 2: "),
        (json.dumps(CONVERSATION) + '\n{"id": "two", "messages": []}', "line 2: .*messages"),
        (json.dumps(CONVERSATION) + "\n" + json.dumps(CONVERSATION), "two sessions are named"),
        (json.dumps(ABENCH) + '\n{"session_id": "two"}', "line 2: .*turns"),
        (changed(lambda x: x["turns"][0].update(output_tokens=-1), ABENCH), "line 1: .*output"),
        (changed(lambda x: x["turns"][0].update(pre_gap_ms=-1), ABENCH), "line 1: .*pre_gap"),
        (
            changed(
                lambda x: x["messages"].pop(2) and x["messages"][0].update(role="x"), CONVERSATION
            ),
            "line 1: the role 'x'",
        ),
        (
            changed(lambda x: x.update(messages=x["messages"][2:3]), CONVERSATION),
            "line 1: answer 1 follows an answer",
        ),
        (
            changed(lambda x: x.update(messages=x["messages"][:2]), CONVERSATION),
            "line 1: the conversation holds no message of the role",
        ),
        (
            '{"conversations": [\n[{"messages": [{"role": "user", "content": "[]"}]}],\n[]\n]}',
            "line 3, conv.* 1",
        ),
        ('{"conversations": [\n[{"messages": 3}]]}', "line 2, conversation 0: .*messages"),
        ('{"conversations": [\n[},\n[]\n]}', "line 2: "),
    ],
)
def test_a_wrong_file_says_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(WorkloadError, match=message) as raised:
        read_sessions(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        read_sessions(tmp_path / "none")


def test_a_cut_ends_sessions_by_turns_and_context_and_scales_gaps(tmp_path: Path) -> None:
    turns = [
        {"input_delta": [{"role": "user", "content": "x" * 340}], "output_tokens": 50,
         "pre_gap_ms": 4000.0}
        for _ in range(5)
    ]  # fmt: skip
    lines = [json.dumps({"session_id": name, "turns": turns}) for name in "abc"]
    workload = read_sessions(file(tmp_path, "\n".join(lines)))
    # A turn is 100 + 50 tokens and 5 for the template of each of its two messages.
    kept = cut(workload, sessions_max=2, context_max=480)
    assert [len(session.turns) for session in kept.sessions] == [3, 3]
    assert cut(workload, context_max=479).turns == 6
    assert cut(workload, turns_max=2, context_max=479).turns == 6
    assert cut(workload, turns_max=1).turns == 3
    gaps = [turn.gap_s for turn in cut(workload, gap_scale=0.5, gap_max_s=1.5).sessions[0].turns]
    assert gaps == [1.5] * 5
    assert cut(workload, gap_scale=0.25).sessions[0].turns[0].gap_s == 1.0
    with pytest.raises(ConfigError, match="--max-context 159"):
        cut(workload, context_max=159)


def test_drawn_sessions_have_the_statistics_of_recorded_ones() -> None:
    workload = generate_sessions(SWE, count=300, seed=5)
    turns = [turn for session in workload.sessions for turn in session.turns]
    later = [turn for session in workload.sessions for turn in session.turns[1:]]
    firsts = [session.turns[0].new_tokens for session in workload.sessions]
    assert min(firsts) >= 1500 and max(firsts) <= 5000
    assert all(1 <= len(session.turns) <= 90 for session in workload.sessions)
    assert np.median([len(session.turns) for session in workload.sessions]) > 30

    def quantiles(values: list[float], parts: list[int]) -> list[float]:
        return np.percentile(values, parts).tolist()

    new = quantiles([turn.new_tokens for turn in later], [50, 90, 99])
    assert new == pytest.approx([120, 720, 2000], rel=0.1)
    output = quantiles([float(turn.output_tokens or 0) for turn in turns], [50, 90])
    assert output == pytest.approx([65, 560], rel=0.1)
    tool_s = quantiles([turn.gap_s for turn in later], [50, 99])
    assert tool_s[0] == pytest.approx(0.26, rel=0.1)
    assert 5 <= tool_s[1] <= 17
    contexts = [
        sum(turn.new_tokens + (turn.output_tokens or 0) for turn in session.turns)
        for session in workload.sessions
    ]
    assert 45_000 < max(contexts) <= 70_000


def test_a_drawn_session_ends_before_its_context_does() -> None:
    profile = dataclasses.replace(SWE, context_max=9000)
    contexts = [
        sum(turn.new_tokens + (turn.output_tokens or 0) for turn in session.turns)
        for session in generate_sessions(profile, count=50, seed=5).sessions
    ]
    assert 8000 < max(contexts) <= 9000


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    few, many = (generate_sessions(SWE, count=count, seed=3) for count in (2, 4))
    assert few.sessions == many.sessions[:2]
    other = generate_sessions(SWE, count=2, seed=4)
    assert other.sessions != few.sessions
    system, asked = few.sessions[0].turns[0].messages
    assert system == few.sessions[1].turns[0].messages[0]
    assert asked != few.sessions[1].turns[0].messages[1]
    with pytest.raises(ConfigError, match="--sessions-max"):
        generate_sessions(SWE, count=0, seed=3)


def test_drawn_text_has_the_tokens_it_should(tmp_path: Path) -> None:
    (turn, *_) = generate_sessions(SWE, count=1, seed=1).sessions[0].turns
    assert sum(len(message.content.split()) for message in turn.messages) == turn.new_tokens
