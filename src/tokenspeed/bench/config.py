"""What a simulation is asked for: the load, the replicas, the router and the step times."""

import math
from dataclasses import dataclass

from tokenspeed.bench.hardware import StepTime
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.errors import ConfigError

__all__ = ["LOOPS", "ROUTERS", "SimulationConfig"]

LOOPS = ("open", "closed")
ROUTERS = ("cache-aware", "least-loaded", "round-robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """Everything a simulation depends on beside its trace: equal ones give equal reports.

    Attributes:
        step_time: of one replica.
        jitter: standard deviation of the logarithm of a random factor on every step's time.
        scheduler: of every replica.
        replicas: engines that serve.
        group_replicas: how many of them stand behind one router; groups share no load.
        router: one of `ROUTERS`.
        load_bound: the cache-aware router sends nobody to a replica with more than this many
            times the mean number of requests.
        scale: copies of the trace; each has its own salt, so that copies share no page, and each
            but the first begins at a random time of the trace, which wraps around.
        speed: how many times faster than recorded requests come.
        loop: "open" sends every request at its time; "closed" sends a turn once the one before it
            ended and the tool gap passed.
        tool_gap_ms: between an answer and the next turn of a closed loop; None for the recorded
            time between the two turns less `recorded_token_ms` for every token of the answer.
        recorded_token_ms: how long the recorded provider took for a token.
        floor_tps: tokens a second below which a user's speed is a violation; None counts none.
        seed: of the copies' times and of jitter.
    """

    step_time: StepTime
    jitter: float = 0.0
    scheduler: SchedulerConfig
    replicas: int = 1
    group_replicas: int = 16
    router: str = "cache-aware"
    load_bound: float = 1.5
    scale: int = 1
    speed: float = 1.0
    loop: str = "open"
    tool_gap_ms: float | None = None
    recorded_token_ms: float = 20.0
    floor_tps: float | None = 70.0
    seed: int = 0

    def __post_init__(self) -> None:
        _within("--replicas", self.replicas, 1, 100_000)
        _within("--group-replicas", self.group_replicas, 1, 1024)
        _within("--scale", self.scale, 1, 100_000)
        _within("--speed", self.speed, 1e-6, 1e6)
        _within("--load-bound", self.load_bound, 1.0, 1e6)
        _within("--jitter", self.jitter, 0.0, 1.0)
        _within("--recorded-token-ms", self.recorded_token_ms, 0.0, 1e6)
        _within("--seed", self.seed, 0, 2**63 - 1)
        if self.tool_gap_ms is not None:
            _within("--tool-gap-ms", self.tool_gap_ms, 0.0, 1e9)
        if self.floor_tps is not None:
            _within("--tps-floor", self.floor_tps, 1e-3, 1e6)
        if self.router not in ROUTERS:
            raise ConfigError(f"--router must be one of {', '.join(ROUTERS)}, not {self.router!r}")
        if self.loop not in LOOPS:
            raise ConfigError(f"--loop must be one of {', '.join(LOOPS)}, not {self.loop!r}")

    @property
    def groups(self) -> int:
        """Routers there are."""
        return -(-self.replicas // self.group_replicas)

    def replicas_of(self, group: int) -> int:
        """Replicas behind a router: as even as can be."""
        return self.replicas // self.groups + (group < self.replicas % self.groups)


def _within(flag: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{flag} must be in [{low:g}, {high:g}], but is {value!r}")
