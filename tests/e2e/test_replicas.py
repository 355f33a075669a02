"""Several engines behind one gateway: `serve --dp`."""

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.serving import Serve, run_cli, unused_port, wait_for
from tokenspeed import LLM
from tokenspeed.core.errors import ConfigError
from tokenspeed.loader import ModelFiles

QUESTION = "Name the capital of France in one word."


class Replicas:
    """A server of two engines, and its operations port."""

    def __init__(self, server: Serve, operations: str) -> None:
        self.server = server
        self.operations = operations
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
        self.model = self.client.models.list().data[0].id

    def answer(self, messages: list[dict[str, str]], tokens: int = 8) -> Any:
        return self.client.chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=0.0,
            max_tokens=tokens,
        )

    def look(self, path: str) -> httpx.Response:
        return httpx.get(self.operations + path, timeout=30, trust_env=False)

    def engines(self) -> list[psutil.Process]:
        found = [p for p in self.server.family() if "tokenspeed.engine" in " ".join(p.cmdline())]
        return sorted(found, key=lambda process: process.pid)


@contextlib.contextmanager
def served(tmp: Path, *flags: str) -> Iterator[Replicas]:
    port = unused_port()
    flags = ("--dp", "2", "--threads", "1", "--operations-port", str(port), *flags)
    with Serve(tmp / "log", *flags) as server:
        yield Replicas(server, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def replicas(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    with served(tmp_path_factory.mktemp("replicas")) as running:
        yield running


@pytest.mark.slow
def test_both_engines_answer_alike_and_are_counted_together(replicas: Replicas) -> None:
    assert len(replicas.engines()) == 2
    before = [process.cpu_times().user for process in replicas.engines()]
    topics = ["rivers", "bridges", "islands", "deserts", "lakes", "forests", "harbours", "valleys"]
    conversations = [
        [{"role": "user", "content": f"Write a long list of {topic}, one in each line."}]
        for topic in topics
    ]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda messages: replicas.answer(messages, 48), conversations))
    after = [process.cpu_times().user for process in replicas.engines()]
    # Both had work: neither computed less than a tenth of what the other did.
    spent = [late - early for early, late in zip(before, after, strict=True)]
    assert min(spent) > 0.1 * max(spent), spent
    status = replicas.look("/status").json()
    assert status["stats"]["output_tokens"] >= sum(a.usage.completion_tokens for a in together)
    assert status["stats"]["pages_total"] == status["engine"]["pages"]
    assert replicas.look("/requests").json()["ended"]
    assert replicas.look("/health").json()["status"] == "healthy"
    # Whichever engine answers, the text is the same.
    for messages, answer in zip(conversations, together, strict=True):
        again = replicas.answer(messages, 48).choices[0].message.content
        assert again == answer.choices[0].message.content


@pytest.mark.slow
def test_turns_of_a_conversation_go_where_its_beginning_is_cached(replicas: Replicas) -> None:
    messages = [{"role": "user", "content": "Tell me of the sea. " * 20 + QUESTION}]
    for turn in range(4):
        answer = replicas.answer(messages, 24)
        cached = answer.usage.prompt_tokens_details
        if turn:
            assert cached is not None
            # All but the last page or two, of 32 tokens.
            assert cached.cached_tokens > answer.usage.prompt_tokens - 110
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": f"Go on, part {turn}."},
        ]


@pytest.mark.slow
def test_without_restart_the_death_of_one_engine_ends_the_server(replicas: Replicas) -> None:
    # The last test of the server that those above share.
    second = replicas.engines()[1]
    second.send_signal(signal.SIGKILL)
    assert replicas.server.process.wait(60) == 1
    log = replicas.server.log.read_text()
    assert "of 2: the engine process" in log and "ended: killed by SIGKILL" in log
    assert "Serve with --restart" in log


@pytest.mark.slow
def test_with_restart_one_engine_serves_while_the_other_comes_back(
    smollm2: ModelFiles, tmp_path: Path
) -> None:
    with served(tmp_path, "--restart") as replicas:
        question = [{"role": "user", "content": QUESTION}]
        assert replicas.answer(question).choices[0].message.content
        os.kill(replicas.engines()[0].pid, signal.SIGKILL)
        unwell = wait_for(lambda: replicas.look("/health"), lambda found: found.status_code == 503)
        assert "of 2: " in unwell.json()["reason"]
        assert replicas.look("/ready").status_code == 200
        # The gateway has noticed, or tries again elsewhere.
        assert replicas.answer(question).choices[0].message.content
        wait_for(lambda: replicas.look("/health").status_code, lambda code: code == 200, 120)
        assert len(replicas.engines()) == 2


def test_what_several_engines_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="dp is 2, but this is one engine"):
        LLM("smollm2-135m", dp=2)
    found = run_cli("serve", "--dp", "2", "--distributed-executor-backend", "torchrun")
    assert found.returncode == 1
    assert "--dp 2 starts engines by itself" in found.stderr
