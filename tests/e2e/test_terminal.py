"""`tokenspeed generate` and `tokenspeed chat` on real weights, through pipes."""

import json

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
    lines = "What is the capital of France?\n/reset\n/what\n/exit\nnever read\n"
    result = run_cli("chat", "--max-tokens", "24", *FLAGS, stdin=lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Paris") == 1
    assert "tokens/s" in result.stderr
    assert "no command /what" in result.stderr
