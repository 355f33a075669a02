"""Owns the client that measures a running server and the reports on it; never a server itself."""

from tokenspeed.bench.live.client import Answer, ChatClient
from tokenspeed.bench.live.compare import Comparison, compare
from tokenspeed.bench.live.frontier import draw_frontier, write_page
from tokenspeed.bench.live.metrics import Goodput, Spread, Summary, TurnWait, summarise_run
from tokenspeed.bench.live.processes import ProcessMeter, find_server
from tokenspeed.bench.live.records import AnswerRecord, Calibration, ProcessUsage, Run
from tokenspeed.bench.live.replay import INTERRUPTED, Pass, calibrate, replay, warm_up
from tokenspeed.bench.live.report import (
    FIGURES,
    Figure,
    Level,
    ReplayReport,
    SweepPlan,
    machine,
    read_report,
    report_of,
)
from tokenspeed.bench.live.statistics import Estimate, estimate, estimate_ratio
from tokenspeed.bench.live.store import RunStore
from tokenspeed.bench.live.sweep import Sweep, Watcher, digest, missing, sweep

__all__ = [
    "FIGURES",
    "INTERRUPTED",
    "Answer",
    "AnswerRecord",
    "Calibration",
    "ChatClient",
    "Comparison",
    "Estimate",
    "Figure",
    "Goodput",
    "Level",
    "Pass",
    "ProcessMeter",
    "ProcessUsage",
    "ReplayReport",
    "Run",
    "RunStore",
    "Spread",
    "Summary",
    "Sweep",
    "SweepPlan",
    "TurnWait",
    "Watcher",
    "calibrate",
    "compare",
    "digest",
    "draw_frontier",
    "estimate",
    "estimate_ratio",
    "find_server",
    "machine",
    "missing",
    "read_report",
    "replay",
    "report_of",
    "summarise_run",
    "sweep",
    "warm_up",
    "write_page",
]
