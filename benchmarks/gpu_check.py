"""Tests and measures on a GPU, within nine minutes of when the build began: `make gpu-check`.

    python -m benchmarks.gpu_check --output build/gpu-check.json

Prints a table and writes one JSON file. Where there is no GPU it says so and ends with 3; with 1
where a part failed. What the time does not suffice for is listed as not measured.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenspeed.kernels.triton.measure import Ceilings, time_us
from tokenspeed.kernels.triton.workloads import Workload, workloads

NO_GPU = 3
LIMIT_S = 540
# Kept for writing, and for a workload that takes longer than others.
RESERVE_S = 25
# The cache of an H200 is 50 MB; operands rotate over several times as much.
ROTATED_BYTES = 256 << 20
ROTATIONS_MAX = 8
TOLERANCE = 1e-2
# The runner takes these from the engine; kernels do without.
_RUNNER_NEEDS = ("llguidance", "msgspec")


def lacking(packages: Sequence[str]) -> tuple[str, ...]:
    """Those of some packages that are not installed."""
    return tuple(name for name in packages if importlib.util.find_spec(name) is None)


@dataclass(kw_only=True)
class Part:
    """A command that has to succeed."""

    name: str
    command: list[str]
    limit_s: float
    needs: tuple[str, ...] = ()
    seconds: float = 0.0
    passed: bool = False
    lacks: tuple[str, ...] = ()
    said: str = ""

    def run(self) -> None:
        """Run it, for as long as it may, unless packages are missing that it needs."""
        self.lacks = lacking(self.needs)
        if self.lacks:
            return
        start = time.monotonic()
        environment = {**os.environ, "TOKENSPEED_TEST_DEVICE": "cuda"}
        try:
            done = subprocess.run(
                self.command,
                capture_output=True,
                text=True,
                check=False,
                timeout=self.limit_s,
                env=environment,
            )
            self.passed = done.returncode == 0
            self.said = (done.stdout + done.stderr)[-4000:]
        except subprocess.TimeoutExpired:
            self.said = f"took longer than {self.limit_s:.0f} s"
        self.seconds = time.monotonic() - start


@dataclass(kw_only=True)
class Figure:
    """What one workload came to."""

    op: str
    name: str
    microseconds: float | None = None
    of_bandwidth: float | None = None
    of_peak: float | None = None
    error: float | None = None
    failure: str | None = None


@dataclass(kw_only=True)
class Report:
    """Everything that is written."""

    device: str
    versions: dict[str, str]
    parts: list[Part] = field(default_factory=list)
    ceilings: Ceilings | None = None
    figures: list[Figure] = field(default_factory=list)
    step: dict[str, Any] | None = None

    @property
    def failed(self) -> bool:
        """Whether anything did not pass."""
        parts = any(not part.passed and not part.lacks for part in self.parts)
        return parts or any(figure.failure for figure in self.figures)

    def table(self) -> str:
        """As text."""
        lines = [self.device]
        for part in self.parts:
            if part.lacks:
                lines.append(f"{part.name:12} not run: there is no {', '.join(part.lacks)} here")
                continue
            word = "pass" if part.passed else "FAIL"
            lines.append(f"{part.name:12} {word} {part.seconds:6.1f} s")
            if not part.passed:
                lines.append(part.said)
        if self.ceilings is not None:
            lines.append(
                f"ceilings: {self.ceilings.read_bytes_per_s / 1e9:.0f} GB/s,"
                f" {self.ceilings.bfloat16_ops_per_s / 1e12:.0f} TFLOP/s bfloat16"
            )
        for figure in self.figures:
            lines.append(f"{figure.op:22} {figure.name:34} {_words(figure)}")
        if self.step is not None:
            lines.append(f"one user: {json.dumps(self.step)}")
        return "\n".join(lines)


def _words(figure: Figure) -> str:
    if figure.failure is not None:
        return f"FAIL {figure.failure}"
    if figure.microseconds is None:
        return "not measured: the time was over"
    return (
        f"{figure.microseconds:9.1f} us, {figure.of_bandwidth:4.0%} of bandwidth,"
        f" {figure.of_peak:4.0%} of the peak"
        + (f", error {figure.error:.1e}" if figure.error is not None else "")
    )


def measure(
    workload: Workload,
    ceilings: Ceilings,
    device: torch.device,
    *,
    rotations_max: int = ROTATIONS_MAX,
) -> Figure:
    """Compare a workload's first row with the reference, then time it on rotating operands."""
    figure = Figure(op=workload.op, name=workload.name)
    count = max(1, min(rotations_max, ROTATED_BYTES // max(1, workload.size_bytes)))
    try:
        calls = [workload.make(device, seed) for seed in range(count)]
        wanted = calls[0].wanted
        if wanted is not None:
            exact = wanted().float()
            found = calls[0].run()[: len(exact)].float()
            figure.error = float((found - exact).norm() / exact.norm())
            # No comparison with NaN is true.
            if not figure.error <= TOLERANCE:
                figure.failure = f"error {figure.error:.1e}"
        figure.microseconds = time_us([call.run for call in calls], device)
    # A kernel may run out of anything, and the others are to be measured all the same.
    except Exception as error:
        figure.failure = f"{type(error).__name__}: {error}"[:500]
        return figure
    seconds = figure.microseconds / 1e6
    figure.of_bandwidth = workload.size_bytes / seconds / ceilings.read_bytes_per_s
    figure.of_peak = workload.operations / seconds / ceilings.bfloat16_ops_per_s
    return figure


def parts_of() -> list[Part]:
    """What runs before anything is measured."""
    # What all tests share reads models' files, which takes packages that a GPU's machine may lack.
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    kernels = [sys.executable, "-m", "benchmarks.support.gpu_verify"]
    return [
        Part(name="verify", command=kernels, limit_s=150),
        Part(name="tests", command=[*tests, "tests/gpu"], limit_s=100, needs=_RUNNER_NEEDS),
    ]


def run(device: torch.device, parts: Sequence[Part], *, deadline: float, scale: int = 1) -> Report:
    """All parts, then as many workloads as there is time for.

    Args:
        device: what is measured.
        parts: what has to succeed first.
        deadline: of `time.monotonic`.
        scale: see `workloads`.
    """
    on_gpu = device.type == "cuda"
    report = Report(
        device=torch.cuda.get_device_name(device) if on_gpu else str(device),
        versions={"python": sys.version.split()[0], "torch": torch.__version__},
    )
    for part in parts:
        part.limit_s = min(part.limit_s, max(1.0, deadline - time.monotonic()))
        part.run()
        report.parts.append(part)
    sizes = {} if on_gpu else {"size_bytes": 1 << 20, "side": 64}
    report.ceilings = Ceilings.measure(device, **sizes)
    if lacking(_RUNNER_NEEDS):
        report.step = {"not measured": f"there is no {', '.join(lacking(_RUNNER_NEEDS))} here"}
    elif on_gpu and time.monotonic() < deadline - RESERVE_S:
        step = importlib.import_module("benchmarks.support.gpu_step")
        report.step = step.one_user(device, report.ceilings.read_bytes_per_s)
    for workload in workloads(scale=scale):
        if time.monotonic() > deadline - RESERVE_S:
            report.figures.append(Figure(op=workload.op, name=workload.name))
            continue
        report.figures.append(measure(workload, report.ceilings, device))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/gpu-check.json"))
    parser.add_argument(
        "--started", type=float, default=time.time(), help="when the build began, in Unix seconds"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch finds no GPU here, so nothing was tested or measured")
        return NO_GPU
    deadline = time.monotonic() + LIMIT_S - (time.time() - options.started)
    report = run(torch.device("cuda"), parts_of(), deadline=deadline)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(asdict(report), indent=1))
    print(report.table())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
