"""Measures engines on the same sessions, one after the other in each round: A B A B.

Each run has a server started for it, as a user would start it, so nothing is cached at its start.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenspeed import __version__
from tokenspeed.bench import live
from tokenspeed.bench.peers.servers import ENGINES, Launch, Server, launch_of, unused_port
from tokenspeed.bench.sessions import Workload
from tokenspeed.core.errors import ConfigError, MeasurementError

__all__ = ["PeerComparison", "measure_peers"]

# Some say that they are ready before they know their tokenizer.
_WARM_UP_ATTEMPTS = 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerComparison:
    """What is compared.

    Attributes:
        model: a name of the catalogue.
        engines: of `ENGINES`; the first is what others are compared with.
        levels: numbers of users.
        repeats: rounds over all levels and engines.
        each: how a run goes.
        threads: of each server.
        context: tokens that a session of each server has room for.
        floor_tps, ttft_max_s: of goodput.
    """

    model: str
    engines: tuple[str, ...]
    levels: tuple[int, ...]
    repeats: int
    each: live.Pass
    threads: int
    context: int
    floor_tps: float | None
    ttft_max_s: float | None

    def __post_init__(self) -> None:
        for engine in self.engines:
            if engine not in ENGINES:
                raise ConfigError(
                    f"--engines must be of {', '.join(ENGINES)}, but one is {engine!r}"
                )


def measure_peers(
    workload: Workload,
    asked: PeerComparison,
    folder: Path,
    *,
    settings: Mapping[str, str],
    watcher: live.Watcher | None = None,
) -> list[live.ReplayReport]:
    """A report for each engine, in their order, kept in a folder each with all finished runs.

    An engine that does not start, or dies, is measured no further; its report says why.

    Raises:
        ConfigError: the folder holds something else.
    """
    began_at = time.time()
    engines = {
        engine: _Engine(engine, workload, asked, folder / engine, dict(settings))
        for engine in asked.engines
    }
    for repeat in range(asked.repeats):
        for users in asked.levels:
            for engine in engines.values():
                each = dataclasses.replace(asked.each, users=users, repeat=repeat)
                engine.measure(each, watcher or live.Watcher())
    reports = [engine.report(began_at) for engine in engines.values()]
    for engine, report in zip(engines.values(), reports, strict=True):
        (engine.store.folder / "report.json").write_bytes(report.to_json())
    return reports


class _Engine:
    def __init__(
        self,
        name: str,
        workload: Workload,
        asked: PeerComparison,
        folder: Path,
        settings: dict[str, str],
    ) -> None:
        self._name = name
        self._workload = workload
        self._asked = asked
        self._plan = live.SweepPlan(
            label=name,
            url="",
            model=asked.model,
            workload=workload.source,
            workload_digest=live.digest(workload),
            sessions=len(workload.sessions),
            turns=workload.turns,
            concurrency=asked.levels,
            repeats=asked.repeats,
            settings={**settings, "threads": str(asked.threads), "context": str(asked.context)},
        )
        self.store = live.RunStore(folder, self._plan)
        self._runs: list[live.Run] = []
        self._failed: str | None = None
        self._forced = True

    def measure(self, each: live.Pass, watcher: live.Watcher) -> None:
        if self._failed is not None:
            return
        assert each.users is not None
        found = self.store.load(each.users, each.repeat)
        if found is None:
            try:
                found = self._run(each, watcher)
            except MeasurementError as error:
                self._failed = str(error)
                _log.warning("%s is measured no further: %s", self._name, error)
                return
            self.store.save(found)
            if found.stopped == live.INTERRUPTED:
                # Of everything, not of this engine alone.
                raise KeyboardInterrupt
        self._runs.append(found)
        self._failed = found.stopped
        watcher.ended(found)

    def _run(self, each: live.Pass, watcher: live.Watcher) -> live.Run:
        asked, port = self._asked, unused_port()
        assert each.users is not None
        launch = launch_of(
            self._name,
            asked.model,
            users=each.users,
            port=port,
            threads=asked.threads,
            context=asked.context,
        )
        _log.info("%s: %s", self._name, launch)
        with Server(launch, port=port, log=self.store.folder / "server.log") as server:
            run = asyncio.run(self._replay(server, each, watcher))
        return dataclasses.replace(run, launch=_without_port(launch, port))

    async def _replay(self, server: Server, each: live.Pass, watcher: live.Watcher) -> live.Run:
        async with live.ChatClient(server.url, model=self._asked.model) as client:
            await live.warm_up(client, attempts=_WARM_UP_ATTEMPTS)
            calibration = await live.calibrate(client)
            self._forced &= client.forces_lengths
            watcher.begins(each)
            return await live.replay(
                client,
                self._workload,
                each,
                meter=live.ProcessMeter([server.pid]),
                calibration=calibration,
                watch=watcher.answered,
            )

    def report(self, began_at: float) -> live.ReplayReport:
        asked = self._asked
        return live.report_of(
            self._plan,
            [
                live.summarise_run(run, floor_tps=asked.floor_tps, ttft_max_s=asked.ttft_max_s)
                for run in self._runs
            ],
            version=__version__,
            machine=live.machine(),
            began_at=began_at,
            forced_lengths=self._forced,
            incomplete=self._failed,
            launches=tuple(dict.fromkeys(run.launch for run in self._runs if run.launch)),
        )


def _without_port(launch: Launch, port: int) -> str:
    return str(launch).replace(str(port), "PORT")
