"""Random calls to the servicer of a served model: `python -m tests.fuzz.servicer --requests 10000`.

Each call is answered or refused as it should be; afterwards the engine is the one that was started,
every page is back, and memory is what it was after the first tenth.
"""

import argparse
import collections
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tests.e2e.serving import Serve
from tests.fuzz.requests import Call, calls

__all__ = ["Report", "fuzz"]

ANSWER_TIMEOUT_S = 300
AT_ONCE = 8
GROWTH_MAX_BYTES = 128 << 20
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of a run.

    Attributes:
        outcomes: how often calls ended with each finish reason or status.
        rss_bytes: memory of engine and servicer after the first tenth, and at the end.
    """

    outcomes: dict[str, int]
    rss_bytes: tuple[int, int]


def fuzz(server: Serve, *, requests: int, first_seed: int) -> Report:
    """Make calls, some at once, until there were as many as asked for.

    Raises:
        AssertionError: a call ended as it should not, or the engine is not as it was.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    numbers = itertools.count()
    engine = server.engine()
    with server.servicer() as channel, ThreadPoolExecutor(AT_ONCE) as clients:
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)

        def make(round_seed: int, count: int) -> None:
            # One round of the library's draws larger and stranger values as it goes.
            @seed(round_seed)
            @settings(
                max_examples=count,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(st.lists(calls(), min_size=AT_ONCE, max_size=AT_ONCE))
            def together(batch: list[Call]) -> None:
                outcomes.update(
                    clients.map(lambda call: outcome(stub, call, f"fuzz-{next(numbers)}"), batch)
                )

            together()

        make(first_seed, max(1, requests // (10 * AT_ONCE)))
        server.wait_until_idle(channel)
        before_bytes = memory(server)
        rounds = itertools.count(first_seed + 1)
        while (left := requests - outcomes.total()) > 0:
            make(next(rounds), min(200, -(-left // AT_ONCE)))
        counters = server.wait_until_idle(channel)
        after_bytes = memory(server)
    assert server.engine() == engine, "the engine died"
    assert counters["pages_active"] == 0
    assert counters["pages_free"] + counters["pages_cached"] == counters["pages_total"]
    growth = after_bytes - before_bytes
    assert growth < GROWTH_MAX_BYTES, f"memory grew by {growth >> 20} MiB"
    return Report(outcomes=dict(outcomes), rss_bytes=(before_bytes, after_bytes))


def outcome(stub: Any, call: Call, request_id: str) -> str:
    """How a call ended; fails where it ended as it should not."""
    call.request.request_id = request_id
    answer = stub.Generate(call.request, timeout=ANSWER_TIMEOUT_S)
    reason = "without a word"
    try:
        for count, message in enumerate(answer):
            if message.HasField("complete"):
                reason = message.complete.finish_reason
            if count == call.leaves_after:
                if not call.aborts:
                    answer.cancel()
                    return "left"
                stub.Abort(pb.AbortRequest(request_id=request_id))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        assert code in REFUSALS, (code, error, call)
        return code.name
    assert reason in ("stop", "length", "abort"), (reason, call)
    return str(reason)


def memory(server: Serve) -> int:
    """Bytes of all the server's processes."""
    return sum(process.memory_info().rss for process in server.family())


def main() -> None:
    """Fuzz a server of its own, and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.servicer", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Serve(Path(folder) / "log") as server:
        report = fuzz(server, requests=arguments.requests, first_seed=arguments.seed)
    print(f"{sum(report.outcomes.values())} calls from seed {arguments.seed}: {report.outcomes}")
    before, after = (size / 2**20 for size in report.rss_bytes)
    print(f"memory of all processes: {before:.0f} MiB after a tenth, {after:.0f} MiB at the end")


if __name__ == "__main__":
    main()
