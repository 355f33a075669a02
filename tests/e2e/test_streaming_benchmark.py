"""What benchmarks/overhead.py measures streams with keeps up with what it is made of."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenspeed.loader import ModelFiles

ROOT = Path(__file__).parents[2]


def overhead() -> Any:
    spec = importlib.util.spec_from_file_location("overhead", ROOT / "benchmarks" / "overhead.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_streams_of_a_paced_engine_get_their_tokens_through_the_gateway(
    smollm2: ModelFiles,
) -> None:
    script = ROOT / "benchmarks/support/paced_front.py"
    front = subprocess.Popen(
        [sys.executable, str(script), "smollm2-135m", "4", "1", "100"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert front.stdin is not None
    assert front.stdout is not None
    try:
        line = front.stdout.readline()
        assert line, "the paced server ended; its reason is above"
        ready = json.loads(line)
        measured = asyncio.run(
            overhead().streaming_cpu(ready["url"], ready["model"], ready["pids"], 4)
        )
    finally:
        front.stdin.close()
        front.wait()
        front.stdout.close()
    assert set(measured) == {"servicer", "gateway", "engine", "chunks_a_token"}
    assert 0 < measured["chunks_a_token"] <= 2


def test_accounts_are_a_part_of_a_step() -> None:
    module = overhead()
    module.STEPS, module.CONTEXT_TOKENS = 5, 100
    steps, accounts = module.engine_step_us(2)
    assert len(steps) == len(accounts) == 5
    assert all(0 < part < whole for part, whole in zip(accounts, steps, strict=True))
