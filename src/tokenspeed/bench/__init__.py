"""Owns workloads, replay in virtual time or against a server, and reports; never serves one."""

from tokenspeed.bench.baselines import Baselines, find_baselines
from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.experiments import FloorExperiment, Oversubscription, floor, oversubscription
from tokenspeed.bench.hardware import HARDWARE, Hardware, StepTime
from tokenspeed.bench.plots import check_plotting, draw
from tokenspeed.bench.replay import simulate, simulate_file
from tokenspeed.bench.report import Report, summarise
from tokenspeed.bench.results import Results
from tokenspeed.bench.trace import Trace, TraceRequest, read_trace

__all__ = [
    "HARDWARE",
    "Baselines",
    "FloorExperiment",
    "Hardware",
    "Oversubscription",
    "Report",
    "Results",
    "SimulationConfig",
    "StepTime",
    "Trace",
    "TraceRequest",
    "check_plotting",
    "draw",
    "find_baselines",
    "floor",
    "oversubscription",
    "read_trace",
    "simulate",
    "simulate_file",
    "summarise",
]
