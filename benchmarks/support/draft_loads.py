"""Turns of coding agents for a real engine in this process: as they were recorded, with the
model's own answers, or random; and what came of them, token by token.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tokenspeed import SamplingParams, loader
from tokenspeed.core.samples import Samples
from tokenspeed.core.step import StepPlan
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.wire import Submit

__all__ = [
    "Asked",
    "Forcing",
    "Own",
    "Turn",
    "bounded",
    "drive",
    "own_turns",
    "random_turns",
    "recorded_turns",
]

# An answer quotes if so much of it, by runs of this many tokens, stands in its prompt.
QUOTED_RUN = 8
QUOTED_SHARE = 0.5


@dataclass(frozen=True)
class Asked:
    """A prompt, and the most tokens of its answer; or the very answer, where it is forced."""

    prompt: list[int]
    output_max: int
    answer: list[int] | None = None


@dataclass
class Turn:
    """What came of a prompt.

    Attributes:
        prompt, tokens: of the turn, and its answer.
        times_s: when each token came.
        steps: that gave it one or more.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    steps: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """What the user saw after the first step; None for less than some tokens."""
        later = sum(at_s > self.times_s[0] for at_s in self.times_s)
        if later < 8:
            return None
        return later / (self.times_s[-1] - self.times_s[0])

    @property
    def quotes(self) -> bool:
        """Whether it mostly repeats what its prompt says."""
        runs = list(_runs(self.tokens))
        if not runs:
            return False
        known = set(_runs(self.prompt))
        return sum(run in known for run in runs) >= QUOTED_SHARE * len(runs)


def _runs(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for start in range(len(tokens) - QUOTED_RUN + 1):
        yield tuple(tokens[start : start + QUOTED_RUN])


class Forcing:
    """A runner whose samples are replaced by recorded answers, which requests name by their seeds.

    The forward is what it would be: only what was sampled is another text, that of a model whose
    answers these are.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._answers: dict[int, np.ndarray] = {}
        self._of_slot: dict[int, np.ndarray] = {}
        if (draft_model := runner._draft_model) is not None:
            # What it proposes is to follow the answer, too.
            follow = partial(type(draft_model).follow, draft_model)

            def follow_answer(plan: StepPlan, tokens: np.ndarray, states: Any = None) -> Any:
                self._put(plan, tokens)
                return follow(plan, tokens, states)

            draft_model.follow = follow_answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def force(self, seed: int, answer: Sequence[int]) -> None:
        """Answer the request of this seed so, whenever it comes."""
        self._answers[seed] = np.array(answer, dtype=np.int32)

    def bind(self, slot: int, params: SamplingParams, *, seed: int, **request: Any) -> None:
        """Bind the slot to the request, and to its answer if it has one."""
        self._of_slot.pop(slot, None)
        if (answer := self._answers.get(seed)) is not None:
            self._of_slot[slot] = answer
        self._runner.bind(slot, params, seed=seed, **request)

    def launch(self, plan: StepPlan) -> Any:
        """Run the plan, then put the answers' tokens in the place of those sampled."""
        result = self._runner.launch(plan).result()
        slots = plan.row_slots[plan.sample_rows]
        if self._put(plan, result.tokens):
            lasts = Samples.of(plan).lasts(result.tokens)
            for sample in lasts.tolist():
                self._runner._steps.last_token_X[slots[sample]] = int(result.tokens[sample])
        return SimpleNamespace(result=lambda: result)

    def _put(self, plan: StepPlan, tokens: np.ndarray) -> bool:
        """Put the answers' tokens in the place of those sampled; whether there were any."""
        forced = False
        for sample, slot in enumerate(plan.row_slots[plan.sample_rows].tolist()):
            answer = self._of_slot.get(slot)
            # Drafts may reach beyond the answer; nothing counts there.
            if answer is not None and plan.sample_positions[sample] < len(answer):
                tokens[sample] = answer[plan.sample_positions[sample]]
                forced = True
        return forced


def drive(
    core: EngineCore,
    users: Sequence[Iterator[Asked]],
    *,
    params: SamplingParams,
    forcing: Forcing | None = None,
    answered: Callable[[int, Turn], None] = lambda user, turn: None,
) -> list[list[Turn]]:
    """Run all turns of all users, each user's one after the other; the turns of each."""
    done: list[list[Turn]] = [[] for _ in users]
    live: dict[int, tuple[int, Turn]] = {}
    numbers = iter(range(1, 1 << 30))

    def ask(user: int) -> None:
        asked = next(users[user], None)
        if asked is None:
            return
        number = next(numbers)
        own = params
        if asked.answer is not None:
            assert forcing is not None
            forcing.force(number, asked.answer)
            own = SamplingParams(temperature=0.0, ignore_eos=True)
        prompt = np.array(asked.prompt, dtype=np.int32).tobytes()
        live[number] = user, Turn(asked.prompt)
        core.submit(Submit(number, prompt, own, asked.output_max, number, 0, 0, None))

    for user in range(len(users)):
        ask(user)
    while live:
        outputs = core.step()
        if outputs is None:
            continue
        now_s = time.perf_counter()
        requests = np.frombuffer(outputs.requests, dtype=np.int64).tolist()
        tokens = np.frombuffer(outputs.tokens, dtype=np.int32).tolist()
        for request, token in zip(requests, tokens, strict=True):
            _, turn = live[request]
            turn.tokens.append(token)
            turn.times_s.append(now_s)
        for request in set(requests):
            live[request][1].steps += 1
        for request in np.frombuffer(outputs.finished, dtype=np.int64).tolist():
            user, turn = live.pop(request)
            done[user].append(turn)
            answered(user, turn)
            ask(user)
    return done


def _read(path: Path, sessions: int) -> list[list[dict[str, str]]]:
    """Conversations of `coding_agent_sessions.jsonl` as text of three roles."""
    found = []
    with path.open() as lines:
        for line, _ in zip(lines, range(sessions), strict=False):
            messages = []
            for message in json.loads(line)["messages"]:
                content = message.get("content") or ""
                if not isinstance(content, str):
                    content = "\n".join(part.get("text", "") for part in content)
                for call in message.get("tool_calls") or []:
                    content += f"\n<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"
                role = "user" if message["role"] == "tool" else message["role"]
                messages.append({"role": role, "content": content})
            found.append(messages)
    return found


def recorded_turns(
    path: Path,
    tokenizer: loader.Tokenizer,
    *,
    sessions: int,
    turns: int,
    context_max: int,
    output_max: int,
) -> list[list[Asked]]:
    """Of each session its turns: the recorded conversation so far, and the recorded answer."""
    found = []
    for messages in _read(path, sessions):
        asked: list[Asked] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0:
                continue
            prompt = tokenizer.encode(tokenizer.render_chat(messages[:index]))
            answer = tokenizer.encode(message["content"])[:output_max]
            if len(prompt) + len(answer) >= context_max or len(asked) == turns:
                break
            if answer:
                asked.append(Asked(prompt, len(answer), answer))
        found.append(asked)
    return found


def own_turns(
    path: Path, tokenizer: loader.Tokenizer, *, sessions: int, turns: int
) -> list[list[list[dict[str, str]]]]:
    """Of each session the messages that come before each answer since the one before."""
    found = []
    for messages in _read(path, sessions):
        waiting: list[dict[str, str]] = []
        asked = []
        for message in messages:
            if message["role"] != "assistant":
                waiting.append(message)
            elif waiting:
                asked.append(waiting)
                waiting = []
        found.append(asked[:turns])
    return found


def random_turns(
    vocabulary: int, *, users: int, turns: int, prompt_tokens: int, output_tokens: int
) -> list[list[Asked]]:
    """Prompts and answers of random tokens, which nothing foresees."""
    dice = np.random.Generator(np.random.Philox(0))

    def tokens(count: int) -> list[int]:
        return dice.integers(0, vocabulary, count).tolist()  # type: ignore[no-any-return]

    return [
        [Asked(tokens(prompt_tokens), output_tokens, tokens(output_tokens)) for _ in range(turns)]
        for _ in range(users)
    ]


class Own:
    """Sessions in which a model's own answers are the history, spread over users.

    Args:
        tokenizer: renders.
        sessions: of each the messages before each answer.
        users: how many take them, each one after the other.
        context_max, output_max: of a turn; a session ends before one that would not fit.
    """

    def __init__(
        self,
        tokenizer: loader.Tokenizer,
        sessions: list[list[list[dict[str, str]]]],
        users: int,
        *,
        context_max: int,
        output_max: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._context_max = context_max
        self._output_max = output_max
        self._answers: list[list[int]] = [[] for _ in range(users)]
        self.users = [self._turns(user, users) for user in range(users)]

    def answered(self, user: int, turn: Turn) -> None:
        """The next turn's history ends with this."""
        self._answers[user] = turn.tokens

    def _turns(self, user: int, users: int) -> Iterator[Asked]:
        tokenizer = self._tokenizer
        for session in self._sessions[user::users]:
            messages: list[dict[str, str]] = []
            for new in session:
                messages += new
                prompt = tokenizer.encode(tokenizer.render_chat(messages))
                if len(prompt) + self._output_max >= self._context_max:
                    break
                yield Asked(prompt, self._output_max)
                text = tokenizer.decode(self._answers[user], skip_special=True)
                messages.append({"role": "assistant", "content": text})


def bounded(
    users: list[Iterator[Asked]], ends_s: float | None, counts: list[int] | None
) -> list[Iterator[Asked]]:
    """Users who stop at a time, or after so many turns each."""

    def until(turns: Iterator[Asked]) -> Iterator[Asked]:
        # Everybody has one turn, however slow the machine is.
        for index, asked in enumerate(turns):
            if index and ends_s is not None and time.perf_counter() >= ends_s:
                return
            yield asked

    if counts is None:
        return [until(turns) for turns in users]
    return [itertools.islice(turns, count) for turns, count in zip(users, counts, strict=True)]
