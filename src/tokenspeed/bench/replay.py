"""Runs a whole simulation: every group of replicas, over as many processes as asked for."""

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.results import Results, merge_results
from tokenspeed.bench.simulation import Watch, simulate_group
from tokenspeed.bench.trace import Trace, read_trace
from tokenspeed.bench.workload import Workload
from tokenspeed.core.errors import ConfigError, EngineError

__all__ = ["Share", "simulate", "simulate_file"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The groups that one worker process runs; it reads the trace itself."""

    path: str
    limit: int | None
    config: SimulationConfig
    groups: tuple[int, ...]


def simulate(
    trace: Trace,
    config: SimulationConfig,
    *,
    groups: tuple[int, ...] | None = None,
    watch: Watch | None = None,
) -> Results:
    """Simulate in this process.

    Args:
        groups: which groups of replicas; None for all.
        watch: told of every token; requests are numbered within their group by time.

    Raises:
        ConfigError: the trace does not suit the configuration.
        EngineError: the control plane lost a request or a page.
    """
    workload = Workload(trace, config)
    chosen = range(config.groups) if groups is None else groups
    return merge_results([simulate_group(trace, workload, group, watch=watch) for group in chosen])


def simulate_file(
    path: Path, config: SimulationConfig, *, limit: int | None = None, jobs: int = 1
) -> Results:
    """Simulate a trace from a file; the result does not depend on `jobs`.

    Args:
        limit: take only the first so many requests.
        jobs: processes, of which no more run than there are groups.

    Raises:
        WorkloadError: the trace cannot be read.
        ConfigError: the trace does not suit the configuration.
        EngineError: the control plane lost a request or a page, or a worker failed.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, but is {jobs}")
    trace = read_trace(path, limit=limit)
    jobs = min(jobs, config.groups)
    if jobs == 1:
        return simulate(trace, config)
    # Wrong input is reported here, once, and not by every worker.
    Workload(trace, config)
    shares = [
        Share(
            path=str(path),
            limit=limit,
            config=config,
            groups=tuple(range(config.groups * job // jobs, config.groups * (job + 1) // jobs)),
        )
        for job in range(jobs)
    ]
    with contextlib.ExitStack() as stack:
        workers = [_start(share, stack) for share in shares]
        # Each writes its results only once it read all of its share, so none waits for another.
        return merge_results([_finish(worker) for worker in workers])


def _start(share: Share, stack: contextlib.ExitStack) -> "subprocess.Popen[bytes]":
    """A worker at its share; the stack ends it, should it still run."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tokenspeed.bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    stack.enter_context(worker)
    stack.callback(worker.kill)
    assert worker.stdin is not None
    worker.stdin.write(msgspec.json.encode(share))
    worker.stdin.close()
    return worker


def _finish(worker: "subprocess.Popen[bytes]") -> Results:
    assert worker.stdout is not None
    data = worker.stdout.read()
    code = worker.wait()
    if code:
        raise EngineError(f"a simulation's worker ended with exit code {code}; its words are above")
    return Results.from_bytes(data)
