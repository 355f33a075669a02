"""`tokenspeed generate` and `tokenspeed chat` on real weights, through pipes."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from tokenspeed.loader import ModelFiles

from .serving import run_cli

FLAGS = ("--temperature", "0", "--max-context", "512")


@pytest.mark.slow
def test_generate_prints_the_completion(smollm2: ModelFiles) -> None:
    result = run_cli("generate", "The capital of France is", "--max-tokens", "6", "--json", *FLAGS)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "Paris" in answer["text"]
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 6)


@pytest.mark.slow
def test_chat_answers_each_line_of_a_pipe(smollm2: ModelFiles) -> None:
    lines = "Name the capital of France.\n/reset\n/what\n/exit\nnever read\n"
    result = run_cli("chat", "--max-tokens", "24", *FLAGS, stdin=lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Paris") == 1
    assert "tokens/s" in result.stderr
    assert "no command /what" in result.stderr


class Terminal:
    """`tokenspeed chat` on a terminal of its own."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tokenspeed.cli", "chat", *FLAGS],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._unread = b""

    def read_until(self, text: bytes) -> None:
        while text not in self._unread:
            self._unread += os.read(self._ours, 4096)
        self._unread = self._unread.partition(text)[2]

    def write(self, text: bytes) -> None:
        os.write(self._ours, text)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ctrl_c_ends_an_answer_and_then_the_conversation(smollm2: ModelFiles) -> None:
    terminal = Terminal()
    try:
        terminal.read_until(b"> ")
        terminal.write(b"Tell a very long story about a dragon.\n")
        terminal.read_until(b"dragon.\r\n")
        terminal.read_until(b" ")
        terminal.interrupt()
        terminal.read_until(b"> ")
        terminal.write(b"Name the capital of France.\n")
        terminal.read_until(b"Paris")
        terminal.read_until(b"tokens/s]")
        terminal.read_until(b"> ")
        terminal.interrupt()
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
