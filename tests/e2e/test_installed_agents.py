"""Coding agents themselves, where they are installed, set as `docs/agents.md` says."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenspeed.loader import ModelFiles

from .serving import Serve

MODEL = "qwen2.5-coder-0.5b"
ASKED = "Say in one sentence what a.py does. Call no tools."
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def server(qwen_coder: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    log = tmp_path_factory.mktemp("agents") / "log"
    # The last of a flag counts.
    flags = ("--max-context", "32768", "--kv-cache-memory", "1GiB", "--queue-timeout", "900")
    with Serve(log, *flags, model=MODEL) as running:
        yield running


def answer(home: Path, command: list[str], **environment: str) -> str:
    """What an agent says to `ASKED` in a folder of its own; skips where it is not installed."""
    program = shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    folder = home / "work"
    folder.mkdir()
    (folder / "a.py").write_text("print(1)\n")
    done = subprocess.run(
        [program, *command[1:], ASKED],
        cwd=folder,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_claude_code_gets_an_answer(server: Serve, tmp_path: Path) -> None:
    assert answer(
        tmp_path,
        ["claude", "-p"],
        ANTHROPIC_BASE_URL=server.url,
        ANTHROPIC_API_KEY="none",
        ANTHROPIC_MODEL=MODEL,
        ANTHROPIC_SMALL_FAST_MODEL=MODEL,
        CLAUDE_CODE_MAX_OUTPUT_TOKENS="256",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        API_TIMEOUT_MS=str(1000 * TIMEOUT_S),
    )


def test_codex_gets_an_answer(server: Serve, tmp_path: Path) -> None:
    config = tmp_path / ".codex" / "config.toml"
    config.parent.mkdir()
    config.write_text(
        f"""
model = "{MODEL}"
model_provider = "tokenspeed"

[model_providers.tokenspeed]
name = "TokenSpeed"
base_url = "{server.url}/v1"
wire_api = "responses"
env_key = "TOKENSPEED_API_KEY"
stream_idle_timeout_ms = {1000 * TIMEOUT_S}
"""
    )
    command = ["codex", "exec", "--skip-git-repo-check", "--sandbox", "read-only"]
    assert answer(tmp_path, command, TOKENSPEED_API_KEY="none")


def test_opencode_gets_an_answer(server: Serve, tmp_path: Path) -> None:
    config = tmp_path / ".config" / "opencode" / "opencode.json"
    config.parent.mkdir(parents=True)
    limit = {"context": 32768, "output": 256}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "TokenSpeed",
        "options": {
            "baseURL": f"{server.url}/v1",
            "apiKey": "none",
            "timeout": 1000 * TIMEOUT_S,
        },
        "models": {MODEL: {"name": "Qwen", "limit": limit}},
    }
    config.write_text(
        json.dumps(
            {
                "autoupdate": False,
                "share": "disabled",
                "permission": {"edit": "deny", "bash": "deny", "webfetch": "deny"},
                "provider": {"tokenspeed": provider},
            }
        )
    )
    assert answer(tmp_path, ["opencode", "run", "-m", f"tokenspeed/{MODEL}"])
