"""Ranks that find each other over TCP, and bytes between them."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tokenspeed.core.errors import EngineError
from tokenspeed.distributed import ByteGroup, address_towards, leave_failure, meet, tcp_store

LOOPBACK = "127.0.0.1"


def served() -> tuple[Any, int]:
    return tcp_store(LOOPBACK, 0, serve=True, timeout_s=10, prefix="test")


def joined(port: int) -> Any:
    return tcp_store(LOOPBACK, port, serve=False, timeout_s=10, prefix="test")[0]


def test_ranks_of_one_host_learn_of_each_other_and_share_it() -> None:
    store, port = served()
    stores = [store, joined(port), joined(port)]
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(
                lambda rank: meet(stores[rank], rank, 3, address=LOOPBACK, timeout_s=30), range(3)
            )
        )
    assert [place.local_rank for place, _ in found] == [0, 1, 2]
    assert {place.local_ranks for place, _ in found} == {3}
    assert all(names == found[0][1] for _, names in found)
    assert str(found[0][1][2]).startswith(f"rank 2 (process {os.getpid()} on ")


def test_a_rank_that_does_not_come_is_named() -> None:
    store, _ = served()
    with pytest.raises(EngineError, match=r"rank 0 waited 0.2 s for ranks 1, 2 of 3: start them"):
        meet(store, 0, 3, address=LOOPBACK, timeout_s=0.2)


def test_a_rank_that_cannot_come_says_why() -> None:
    store, port = served()
    leave_failure(joined(port), 1, "--tp 4 makes 4")
    with pytest.raises(EngineError, match="rank 1: --tp 4 makes 4"):
        meet(store, 0, 2, address=LOOPBACK, timeout_s=30)


def test_where_nobody_serves_the_store_the_error_says_where_it_looked() -> None:
    with pytest.raises(EngineError, match=r"cannot reach rank 0 at 127\.0\.0\.1:9: "):
        tcp_store(LOOPBACK, 9, serve=False, timeout_s=1, prefix="test")


def test_the_address_towards_this_host_is_loopback() -> None:
    assert address_towards("127.0.0.1", 80) == LOOPBACK


def echo(port: int) -> None:
    place, _ = meet(joined(port), 1, 2, address=LOOPBACK, timeout_s=60)
    group = ByteGroup(place, 2, timeout_s=30)
    while True:
        message = group.receive(0)
        if message == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        group.send(0, message)


@pytest.mark.slow
def test_messages_of_any_length_arrive_and_the_end_of_a_rank_is_noticed_at_once() -> None:
    store, port = served()
    process = multiprocessing.get_context("spawn").Process(target=echo, args=(port,), daemon=True)
    process.start()
    place, _ = meet(store, 0, 2, address=LOOPBACK, timeout_s=60)
    group = ByteGroup(place, 2, timeout_s=30)
    for size in (0, 1, 8183, 8184, 8185, 1_000_000):
        sent = os.urandom(size)
        group.send(1, sent)
        assert group.receive(1) == sent
    failures: list[str] = []

    def listen() -> None:
        with pytest.raises(EngineError, match="rank 1 is gone") as caught:
            group.receive(1)
        failures.append(str(caught.value))

    listener = threading.Thread(target=listen)
    listener.start()
    group.send(1, b"die")
    listener.join(30)
    assert len(failures) == 1
    process.join(30)
