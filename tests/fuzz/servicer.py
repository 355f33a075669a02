"""Random calls to the servicer of a served model: `python -m tests.fuzz.servicer --requests 10000`.

Each call is answered or refused as it should be; afterwards the engine is the one that was started,
every page is back, and memory is what it was when the first third was done.
"""

import argparse
import collections
import itertools
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tests.e2e.serving import Serve
from tests.fuzz.requests import Call, asides, calls

__all__ = ["Report", "fuzz", "memory"]

# A machine may be held for minutes; the test suite has limits of its own for what hangs.
ANSWER_TIMEOUT_S = 3600
# What bytes mean that were changed by chance nobody knows: they may ask for all of the context.
BROKEN_TIMEOUT_S = 600
AT_ONCE = 12
BATCH = 24
# Of each process, after the first third. The servicer's allocator keeps what remembered texts had
# when the cache was flushed, some 12 MiB. In 10,000 calls a leak of 4 KiB a call is more than this.
GROWTH_MAX_BYTES = 24 << 20
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
METHOD = "/tokenspeed.grpc.scheduler.TokenSpeedScheduler/Generate"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of a run.

    Attributes:
        honest, hostile, broken: how often calls of that kind ended with each finish reason or
            status; those that their client left end with "left".
        memory: bytes by process, at the start and after each tenth of the calls; see `memory`.
        counters: the scheduler's, at the end.
        seconds: how long it took.
    """

    honest: dict[str, int]
    hostile: dict[str, int]
    broken: dict[str, int]
    memory: list[dict[str, int]]
    counters: dict[str, float]
    seconds: float

    @property
    def calls(self) -> int:
        """All of them."""
        return sum(sum(kind.values()) for kind in (self.honest, self.hostile, self.broken))

    @property
    def admitted(self) -> int:
        """Those that were not refused."""
        ends = itertools.chain.from_iterable(
            kind.items() for kind in (self.honest, self.hostile, self.broken)
        )
        return sum(count for end, count in ends if end in ("stop", "length", "abort", "left"))


def fuzz(server: Serve, *, requests: int, first_seed: int) -> Report:
    """Make calls, some at once, until there were as many as asked for.

    Raises:
        AssertionError: a call ended as it should not, or the engine is not as it was.
    """
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    numbers = itertools.count()
    engine = server.engine()
    began_s = time.monotonic()
    with server.servicer() as channel, ThreadPoolExecutor(AT_ONCE) as clients:
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)
        bytes_stub = channel.unary_stream(METHOD)

        sizes: list[dict[str, int]] = []

        @seed(first_seed)
        @settings(
            max_examples=-(-requests // BATCH),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(calls(), min_size=BATCH, max_size=BATCH), asides())
        def together(batch: list[Call], beside: list[tuple[str, Any]]) -> None:
            ended = clients.map(
                lambda call: outcome(stub, bytes_stub, call, f"fuzz-{next(numbers)}"), batch
            )
            for name, request in beside:
                ask(stub, name, request)
            for call, end in zip(batch, ended, strict=True):
                ends[kind(call)][end] += 1
            if sum(counter.total() for counter in ends.values()) >= requests * len(sizes) / 10:
                sizes.append(memory(server, server.wait_until_idle(channel)))

        together()
        counters = server.wait_until_idle(channel)
        sizes.append(memory(server, counters))
    assert server.engine() == engine, "the engine died"
    assert counters["pages_active"] == 0
    assert counters["pages_free"] + counters["pages_cached"] == counters["pages_total"]
    report = Report(
        **{name: dict(ends[name]) for name in ("honest", "hostile", "broken")},
        memory=sizes,
        counters=counters,
        seconds=time.monotonic() - began_s,
    )
    for process, size in sizes[-1].items():
        growth = size - sizes[len(sizes) // 3].get(process, size)
        assert growth < GROWTH_MAX_BYTES, f"{process} grew by {growth >> 20} MiB: {report}"
    return report


def kind(call: Call) -> str:
    """By which name its end is counted."""
    return "broken" if call.raw is not None else "hostile" if call.hostile else "honest"


def outcome(stub: Any, bytes_stub: Any, call: Call, request_id: str) -> str:
    """How a call ended; fails where it ended as it should not."""
    call.request.request_id = request_id
    if call.raw is not None:
        answer = bytes_stub(call.raw, timeout=BROKEN_TIMEOUT_S)
    else:
        answer = stub.Generate(call.request, timeout=ANSWER_TIMEOUT_S)
    reasons = []
    try:
        for count, message in enumerate(answer):
            if call.raw is None and message.HasField("complete"):
                reasons.append(message.complete.finish_reason)
            if count == call.leaves_after:
                if not call.aborts:
                    answer.cancel()
                    return "left"
                stub.Abort(pb.AbortRequest(request_id=request_id))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        if call.raw is not None:
            # What is no message is answered by gRPC itself.
            assert code in (*REFUSALS, grpc.StatusCode.UNKNOWN), (error, call)
        else:
            assert code in REFUSALS, (error, call)
            # Nothing is wrong with the call, but constraints may all be waiting to be tried.
            assert call.hostile or code is grpc.StatusCode.RESOURCE_EXHAUSTED, (error, call)
        return code.name
    if call.raw is not None:
        return "left"
    samples = call.request.sampling_params.n or 1
    assert len(reasons) == samples, (reasons, call)
    assert set(reasons) <= {"stop", "length", "abort"}, (reasons, call)
    assert "abort" not in reasons or call.aborts, (reasons, call)
    return str(reasons[0])


def ask(stub: Any, name: str, request: Any) -> None:
    """Call another method while requests run."""
    try:
        answer = getattr(stub, name)(request, timeout=ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (name, request, error)  # type: ignore[attr-defined]
    else:
        assert name != "HealthCheck" or answer.healthy, answer


def memory(server: Serve, counters: dict[str, float]) -> dict[str, int]:
    """Resident bytes of each of the server's processes.

    What the servicer remembers of texts it served is known, bounded and not counted.
    """
    sizes = {}
    for process in server.family():
        command = " ".join(process.cmdline())
        roles = {"engine": "tokenspeed.engine", "grammar": "tokenspeed.grammar", "gateway": "smg"}
        role = next((role for role, word in roles.items() if word in command), "servicer")
        sizes[role] = sizes.get(role, 0) + process.memory_info().rss
    sizes["servicer"] -= int(counters.get("history_size_bytes", 0))
    return sizes


def main() -> None:
    """Fuzz a server of its own, and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.servicer", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Serve(Path(folder) / "log") as server:
        report = fuzz(server, requests=arguments.requests, first_seed=arguments.seed)
    print(
        f"{report.calls} calls from seed {arguments.seed} in {report.seconds:.0f} s, "
        f"{report.admitted} of them admitted"
    )
    for name in ("honest", "hostile", "broken"):
        print(f"  {name}: {dict(sorted(getattr(report, name).items()))}")
    for process in report.memory[-1]:
        sizes = ", ".join(f"{tenth.get(process, 0) >> 20}" for tenth in report.memory)
        print(f"  MiB of {process} at the start and after each tenth: {sizes}")
    counters = {name: value for name, value in report.counters.items() if name != "timing"}
    print(f"  counters: {counters}")


if __name__ == "__main__":
    main()
