"""Several ranks over real Gloo on loopback: threads of this process, or processes of their own.

Ranks find each other by a file in a folder of the test's, so no two tests meet.
"""

import multiprocessing
import queue
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.distributed import FileStore, HashStore, Store

from tokenspeed.distributed import group

__all__ = ["in_processes", "in_threads"]

Result = TypeVar("Result")
TIMEOUT_S = 120.0


@contextmanager
def patient() -> Iterator[None]:
    """Ranks wait for each other as long as a test may: a busy machine holds one up for seconds."""
    with (
        mock.patch.object(group, "COLLECTIVE_TIMEOUT_S", TIMEOUT_S),
        mock.patch.dict(group.connect.__kwdefaults__, timeout_s=TIMEOUT_S),
    ):
        yield


def in_threads(ranks: int, run: Callable[[int, Store], Result]) -> list[Result]:
    """Run a function of (rank, store) on every rank at once; their results in order of rank."""
    store = HashStore()
    with patient(), ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank, store) for rank in range(ranks)]
        # The first to fail says why: the others merely miss it.
        for future in as_completed(futures, TIMEOUT_S):
            future.result()
        return [future.result() for future in futures]


def in_processes(ranks: int, folder: Path, run: Callable[..., Result], *args: Any) -> list[Result]:
    """Run a module's function of (rank, store, *args) in a process a rank."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    path = str(folder / "ranks")
    processes = [
        context.Process(target=_enter, args=(rank, ranks, path, results, run, args), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Result] = {}
    try:
        for _ in range(ranks):
            rank, failure, result = results.get(timeout=TIMEOUT_S)
            assert failure is None, f"rank {rank}: {failure}"
            found[rank] = result
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(found)} of {ranks} came to an end") from None
    finally:
        for process in processes:
            if len(found) < ranks:
                process.terminate()
            process.join(TIMEOUT_S)
    return [found[rank] for rank in range(ranks)]


def _enter(
    rank: int, ranks: int, path: str, results: Any, run: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        with patient():
            results.put((rank, None, run(rank, FileStore(path, ranks), *args)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
