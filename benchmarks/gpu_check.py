"""Tests and measures on a GPU, within nine minutes of when the build began: `make gpu-check`.

    python -m benchmarks.gpu_check --output build/gpu-check.json

Prints a table and writes one JSON file, anew after each part. Where there is no GPU it says so and
ends with 3; with 1 where a part failed. Every part runs in a process of its own: one that fails,
breaks the device's context or never ends takes no other with it. What the time does not suffice
for is listed as not measured, and what is compared with others' kernels says which are not here.
"""

import argparse
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.gpu_measure import Figure, of_kind
from benchmarks.support.gpu_rivals import RIVALS
from tokenspeed.kernels.triton.measure import Ceilings

NO_GPU = 3
LIMIT_S = 540
# Kept for writing.
RESERVE_S = 15
# A workload that compiles its kernels first takes no longer.
FIGURE_LIMIT_S = 60
_NOT_MEASURED = "not measured: the time was over"


def lacking(packages: Sequence[str]) -> tuple[str, ...]:
    """Those of some packages that are not installed."""
    return tuple(name for name in packages if importlib.util.find_spec(name) is None)


@dataclass(kw_only=True)
class Part:
    """A command that has to succeed.

    Attributes:
        name: for the table.
        command: what runs.
        limit_s: how long it may.
        needs: packages without which it is left out.
        seconds, passed, lacks, said: how it went.
        found: the JSON object that is the last line it printed, if it is one.
    """

    name: str
    command: list[str]
    limit_s: float
    needs: tuple[str, ...] = ()
    seconds: float = 0.0
    passed: bool = False
    lacks: tuple[str, ...] = ()
    said: str = ""
    found: dict[str, Any] | None = None

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
            self.found = _object(done.stdout)
        except subprocess.TimeoutExpired:
            self.said = f"took longer than {self.limit_s:.0f} s"
        except OSError as error:
            self.said = str(error)
        self.seconds = time.monotonic() - start


@dataclass(kw_only=True)
class Report:
    """Everything that is written."""

    device: str
    versions: dict[str, str]
    parts: list[Part] = field(default_factory=list)
    ceilings: Ceilings | None = None
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

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
            elif part.found is not None:
                lines.append(f"{'':12} {json.dumps(part.found)}{self._share(part.found)}")
        if self.ceilings is not None:
            lines.append(
                f"ceilings: {self.ceilings.read_bytes_per_s / 1e9:.0f} GB/s,"
                f" {self.ceilings.bfloat16_ops_per_s / 1e12:.0f} TFLOP/s bfloat16"
            )
        lines += [f"{each.op:22} {each.name:34} {self._words(each)}" for each in self.figures]
        return "\n".join([*lines, *self.left_out])

    def _share(self, found: dict[str, Any]) -> str:
        if self.ceilings is None or "size_bytes" not in found:
            return ""
        bytes_per_s = found["size_bytes"] / found["step_us"] * 1e6
        return f", {bytes_per_s / self.ceilings.read_bytes_per_s:.0%} of bandwidth"

    def _words(self, figure: Figure) -> str:
        if figure.failure is not None:
            beside = f"beside {figure.rival}: " if figure.rival else ""
            return f"FAIL {beside}{figure.failure}"
        if figure.microseconds is None:
            return _NOT_MEASURED
        words = f"{figure.microseconds:9.1f} us"
        if figure.rival_us is not None:
            ratio = figure.rival_us / figure.microseconds
            words += f", {figure.rival} {figure.rival_us:9.1f} us: {ratio:.2f}x"
        elif self.ceilings is not None:
            seconds = figure.microseconds / 1e6
            of_bandwidth = figure.size_bytes / seconds / self.ceilings.read_bytes_per_s
            of_peak = figure.operations / seconds / self.ceilings.bfloat16_ops_per_s
            words += f", {of_bandwidth:4.0%} of bandwidth, {of_peak:4.0%} of the peak"
        return words + (f", error {figure.error:.1e}" if figure.error is not None else "")


def parts_of() -> list[Part]:
    """What has to succeed before kernels are measured, in order of weight."""
    # The project's own options want plugins, and what all tests share reads models' files, which
    # takes packages: a GPU's machine may lack both.
    plain = ("-c", "tests/gpu/pytest.ini", "--noconftest", "-p", "no:cacheprovider")
    tests = [sys.executable, "-m", "pytest", "-q", *plain]
    support = [sys.executable, "-m"]
    kernels = [*support, "benchmarks.support.gpu_verify", "--seconds", "75"]
    step = [*support, "benchmarks.support.gpu_step"]
    return [
        Part(name="ceilings", command=_measuring("ceilings", 0), limit_s=60),
        Part(name="verify", command=kernels, limit_s=110),
        Part(name="tests", command=[*tests, "tests/gpu"], limit_s=80),
        Part(name="one user", command=step, limit_s=70),
    ]


def peers_of() -> list[Part]:
    """What is measured of others, once ours is."""
    theirs = [sys.executable, "-m", "benchmarks.support.gpu_transformers"]
    return [Part(name="transformers", command=theirs, limit_s=100, needs=("transformers",))]


def collect(
    names: Sequence[tuple[str, str]],
    command: Callable[[int], list[str]],
    *,
    deadline: float,
    limit_s: float = FIGURE_LIMIT_S,
) -> Iterator[Figure]:
    """Figures of workloads, from processes that print one a line: where one ends early or is silent
    for too long, the workload it was at has failed, and another goes on behind it.

    Args:
        names: op and name of each workload.
        command: by how many of them are done.
        deadline: of `time.monotonic`; what is left then has no figure.
        limit_s: for one line.
    """
    done = 0
    while done < len(names):
        op, name = names[done]
        if time.monotonic() > deadline:
            yield Figure(op=op, name=name)
            done += 1
            continue
        failure = "its process ended"
        try:
            for line in _lines(command(done), deadline=deadline, limit_s=limit_s):
                yield Figure(**json.loads(line))
                done += 1
        except (OSError, TypeError, ValueError, _Ended) as error:
            failure = str(error) or type(error).__name__
        if done < len(names) and time.monotonic() < deadline:
            op, name = names[done]
            yield Figure(op=op, name=name, failure=failure)
            done += 1


class _Ended(Exception):
    """A process ended with an error, or was silent."""


def _lines(command: list[str], *, deadline: float, limit_s: float) -> Iterator[str]:
    """What a process prints, line by line, until the deadline."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        selector = selectors.DefaultSelector()
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        text, said, last = b"", b"", time.monotonic()
        try:
            while selector.get_map():
                until = min(last + limit_s, deadline)
                for key, _ in selector.select(max(0.0, until - time.monotonic())):
                    found = os.read(key.fd, 1 << 16)
                    if not found:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stderr:
                        said = (said + found)[-2000:]
                    else:
                        *whole, text = (text + found).split(b"\n")
                        for line in whole:
                            last = time.monotonic()
                            yield line.decode()
                if selector.get_map() and time.monotonic() >= until:
                    if until == deadline:
                        return
                    raise _Ended(f"took longer than {limit_s:.0f} s")
            if process.wait() != 0:
                words = said.decode(errors="replace")[-400:]
                raise _Ended(f"its process ended with {process.returncode}: {words}")
        finally:
            process.kill()


def run(
    device: str,
    parts: Sequence[Part],
    peers: Sequence[Part],
    *,
    deadline: float,
    kept: Callable[[Report], None],
    kinds: Sequence[str] = ("kernels", *RIVALS),
) -> Report:
    """All parts, then as many workloads as there is time for, then others.

    Args:
        device: what is measured, in words.
        parts: what comes first.
        peers: what comes behind our own workloads.
        deadline: of `time.monotonic`.
        kept: called after each part with what there is.
        kinds: whose kernels are measured, ours first.
    """
    report = Report(
        device=device,
        versions={"python": sys.version.split()[0], "torch": torch.__version__},
    )

    def run_part(part: Part) -> None:
        part.limit_s = min(part.limit_s, max(1.0, deadline - time.monotonic()))
        part.run()
        report.parts.append(part)
        if part.name == "ceilings" and part.found is not None:
            report.ceilings = Ceilings(**part.found)
        kept(report)

    for part in parts:
        run_part(part)
    for kind in kinds:
        if kind in RIVALS and lacking((RIVALS[kind].module,)):
            report.left_out.append(f"{kind}: not compared, there is no {RIVALS[kind].module} here")
            continue
        names = [(workload.op, workload.name) for workload in of_kind(kind)]
        for figure in collect(
            names, lambda skip, kind=kind: _measuring(kind, skip), deadline=deadline
        ):
            report.figures.append(figure)
            kept(report)
        if kind == "kernels":
            for part in peers:
                run_part(part)
    return report


def _measuring(kind: str, skip: int) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.support.gpu_measure", kind]
    return [*command, "--skip", str(skip)]


def _object(text: str) -> dict[str, Any] | None:
    last = text.strip().rpartition("\n")[2]
    try:
        found = json.loads(last)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


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
    limit_s = LIMIT_S - RESERVE_S - (time.time() - options.started)
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(report: Report) -> None:
        options.output.write_text(json.dumps(asdict(report), indent=1))

    deadline = time.monotonic() + limit_s
    name = torch.cuda.get_device_name()
    report = run(name, parts_of(), peers_of(), deadline=deadline, kept=keep)
    keep(report)
    print(report.table())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
