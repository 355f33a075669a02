"""Ranks that torchrun starts, on one host and as if on two."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.distributed.support import (
    DENSE,
    failed,
    last_error,
    texts,
    texts_of_one_rank,
    torchrun,
    torchrun_ranks,
)
from tests.e2e.serving import Serve, unused_port
from tokenspeed.loader import ModelFiles

SMALL = ("--max-context", "512", "--max-running", "16", "--kv-cache-memory", "96MiB")


@contextlib.contextmanager
def second_host(log: Path, port: int, model: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """The second of two launches that are one engine."""
    command = [sys.executable, *torchrun(*hosts(1, port)), "serve", model, "--tp", "2"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *SMALL, *flags], stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.kill()
        process.wait()


def hosts(index: int, port: int) -> list[str]:
    return [
        *("--nnodes", "2", "--node-rank", str(index), "--nproc-per-node", "1"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port)),
    ]


@pytest.mark.slow
def test_torchrun_on_one_host_gives_one_ranks_text_and_ends_with_a_rank(
    smollm2: ModelFiles, tmp_path: Path
) -> None:
    alone = texts_of_one_rank(smollm2)
    launcher = torchrun("--nproc-per-node", "2", "--master-port", str(unused_port()))
    server = Serve(
        tmp_path / "log", "--tp", "2", *DENSE, model=str(smollm2.path), launcher=launcher
    )
    with server:
        assert texts(server) == alone
        _, follower = torchrun_ranks(server.process)
        follower.kill()
        began_s = time.monotonic()
        assert server.process.wait(30) == 1
        assert time.monotonic() - began_s < 10
    log = server.log.read_text()
    # torchrun says which of its processes failed, and how.
    assert "rank      : 1 (local_rank: 1)" in log and "Signal 9 (SIGKILL)" in log


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_two_launches_are_one_engine_which_ends_when_a_rank_is_lost(
    smollm2: ModelFiles, tmp_path: Path, how: signal.Signals
) -> None:
    port = unused_port()
    model = str(smollm2.path)
    with second_host(tmp_path / "second", port, model, *DENSE) as second:
        server = Serve(
            tmp_path / "log", "--tp", "2", *DENSE, model=model, launcher=torchrun(*hosts(0, port))
        )
        with server:
            assert texts(server) == texts_of_one_rank(smollm2)
            (follower,) = torchrun_ranks(second)
            follower.send_signal(how)
            began_s = time.monotonic()
            if how is signal.SIGSTOP:
                # Nobody waits for a rank while nothing is to do.
                with pytest.raises(openai.InternalServerError, match="rank 1"):
                    texts(server)
                assert time.monotonic() - began_s < 11
            server.process.wait(30)
    words = "does not answer" if how is signal.SIGSTOP else "is gone"
    assert f"rank 1 (process {follower.pid} on " in last_error(server.log.read_text())
    assert words in last_error(server.log.read_text())


@pytest.mark.slow
def test_torchruns_ranks_and_tp_must_agree(smollm2: ModelFiles) -> None:
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(unused_port()),
    }
    serve = ["-m", "tokenspeed.cli", "serve", str(smollm2.path), "--port", str(unused_port())]
    wanted = r"torchrun started 4 ranks (WORLD_SIZE), but --tp 2 makes 2: give --tp 4, or start 2"
    assert wanted in failed([*serve, "--tp", "2"], variables=variables)
    assert wanted in failed([*serve, "--tp", "2"], variables={**variables, "RANK": "3"})
    wanted = "RANK must be a whole number, but is 'two'"
    assert wanted in failed([*serve, "--tp", "2"], variables={**variables, "RANK": "two"})
    wanted = "--restart cannot start ranks that torchrun started"
    assert wanted in failed([*serve, "--tp", "4", "--restart"], variables=variables)
    wanted = "--distributed-executor-backend torchrun needs RANK, WORLD_SIZE"
    assert wanted in failed([*serve, "--tp", "2", "--distributed-executor-backend", "torchrun"])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "flags"])
def test_a_rank_with_another_model_or_other_flags_is_named(
    smollm2: ModelFiles, qwen_coder: ModelFiles, tmp_path: Path, what: str
) -> None:
    port = unused_port()
    theirs = str(qwen_coder.path if what == "model" else smollm2.path)
    flags = () if what == "model" else ("--dtype", "float32", "--page-size", "16")
    with second_host(tmp_path / "second", port, theirs, *flags):
        command = [*torchrun(*hosts(0, port)), "serve", str(smollm2.path), "--tp", "2", *SMALL]
        done = subprocess.run(
            [sys.executable, *command, "--port", str(unused_port())],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 1
    message = last_error(done.stderr)
    assert message.startswith("rank 1 (process ")
    if what == "model":
        assert f"opened another model as '{theirs}'" in message
        assert "Give all ranks the same MODEL" in message
    else:
        assert "another page_size: 16, where rank 0 has 32" in message
        assert "the same --page-size" in message
