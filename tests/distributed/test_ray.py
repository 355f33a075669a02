"""Ranks as Ray's actors, on two nodes that `ray start` made of this host."""

import contextlib
import signal
import tempfile
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
    ray_nodes,
    texts,
    texts_of_one_rank,
)
from tests.e2e.serving import Serve, unused_port
from tokenspeed.loader import ModelFiles

pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenspeed[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        ray_nodes(Path(folder), count=2) as address,
    ):
        yield address


def backend(address: str) -> list[str]:
    return ["--distributed-executor-backend", "ray", "--ray-address", address]


def actors() -> list[psutil.Process]:
    """The ranks that Ray runs here now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ray::_Rank.follow" in process.cmdline():
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_on_another_node_is_a_rank_and_its_loss_ends_the_engine(
    smollm2: ModelFiles, cluster: str, tmp_path: Path, how: signal.Signals
) -> None:
    server = Serve(
        *(tmp_path / "log", "--tp", "2", *backend(cluster), *DENSE), model=str(smollm2.path)
    )
    with server:
        assert texts(server) == texts_of_one_rank(smollm2)
        (rank,) = actors()
        rank.send_signal(how)
        began_s = time.monotonic()
        if how is signal.SIGSTOP:
            with pytest.raises(openai.InternalServerError, match="rank 1"):
                texts(server)
            assert time.monotonic() - began_s < 11
        assert server.process.wait(30) == 1
    message = last_error(server.log.read_text())
    assert f"rank 1 (process {rank.pid} on " in message
    assert ("does not answer" if how is signal.SIGSTOP else "ended: ") in message
    psutil.wait_procs([rank], 20)
    assert not rank.is_running()


@pytest.mark.slow
def test_a_cluster_that_is_not_there_or_too_small_is_named_with_the_remedy(
    smollm2: ModelFiles, cluster: str
) -> None:
    serve = ["-m", "tokenspeed.cli", "serve", str(smollm2.path), "--port", str(unused_port())]
    nobody = f"127.0.0.1:{unused_port()}"
    message = last_error(failed([*serve, "--tp", "2", *backend(nobody)]))
    assert message.startswith(f"cannot reach the Ray cluster at {nobody}: ")
    assert "ray start --head" in message
    message = last_error(failed([*serve, "--tp", "3", *backend(cluster)]))
    assert message.startswith("Ray's 2 nodes have room for 2 ranks of 1 CPU each, but --tp 3 makes")
    message = last_error(failed([*serve, "--tp", "2", "--threads", "2", *backend(cluster)]))
    assert "room for 0 ranks of 2 CPU each" in message
    assert "lower --tp or --threads" in message
    message = last_error(failed([*serve, "--tp", "2", *backend("here")]))
    assert "--ray-address must be HOST:PORT, but is 'here'" in message
    message = last_error(failed([*serve, "--tp", "2", "--ray-address", cluster]))
    assert message == "--ray-address needs --distributed-executor-backend ray"
