"""`make gpu-check` without a GPU: it says so, and what it would do is tried out on the CPU."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_check
from benchmarks.support import gpu_measure, gpu_rivals
from benchmarks.support.gpu_step import decode_plan, one_user
from benchmarks.support.gpu_transformers import one_user_of_transformers
from benchmarks.support.gpu_verify import verify_for

from tests.kernels.triton_cases import interpreting
from tests.support.triton_interpreter import needs_interpreter
from tests.unit.execution.tiny import SIZES
from tokenspeed.kernels import Platform, reference, registry
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.kernels.triton.measure import Ceilings
from tokenspeed.kernels.triton.workloads import Attended, Workload, workloads
from tokenspeed.kernels.verify import plan_runs

__all__ = ["interpreting"]
pytestmark = needs_interpreter

CPU = torch.device("cpu")
CEILINGS = Ceilings(read_bytes_per_s=4e12, bfloat16_ops_per_s=8e14)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    assert gpu_check.main(["--output", str(output)]) == gpu_check.NO_GPU
    assert "finds no GPU" in capsys.readouterr().out
    assert not output.exists()


def test_bytes_and_operations_are_those_of_the_sizes() -> None:
    by_name = {(work.op, work.name): work for work in workloads()}
    decode = by_name["attention.paged_mla", "64 x 8192, 128 heads, q_len 1"]
    assert decode.size_bytes == 2 * 64 * (8193 * 576 + 128 * (576 + 512))
    assert decode.operations == 2 * 64 * 8193 * 128 * (576 + 512)
    prefill = by_name["attention.paged_mha", "1 x 0, q_len 8192"]
    assert prefill.operations == 4 * 32 * 128 * (8192 * 8193 // 2)


def test_workloads_are_compared_and_timed() -> None:
    chosen = {"attention.paged_mla", "attention.paged_mha", "norm.rms_norm"}
    seen = set()
    for work in workloads(scale=256):
        if work.op not in chosen - seen:
            continue
        seen.add(work.op)
        figure = gpu_measure.measure(work, CPU, rotations_max=1)
        assert figure.failure is None, figure
        assert figure.microseconds
        assert figure.microseconds > 0
        if work.op.startswith("attention.paged"):
            assert figure.error is not None
            assert figure.error < 1e-2
    assert seen == chosen


def test_every_workload_makes_its_operands() -> None:
    """What runs for the first time on a GPU fails here where it is wrong on the host."""
    for work in workloads(scale=512):
        call = work.make(CPU, 0)
        assert (call.attended is not None) == work.op.startswith("attention.paged")


def test_ours_and_a_rivals_are_held_together_and_timed_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference in a rival's place: by the operands as rivals take them."""

    def reference_of(of: Attended) -> Callable[[], torch.Tensor]:
        rows = gpu_rivals.Uniform(of)
        assert rows.by_row.shape[:2] == (len(rows.lengths), rows.new)
        assert int(rows.page_starts[-1]) == len(rows.pages)
        assert bool((rows.last_pages <= of.rows.page_size).all())
        return lambda: reference.latent.paged_mla(
            of.q_TQD, *of.pools, of.rows, of.scale, value_dim=of.value_dim or 0
        )

    ops = ("attention.paged_mla",)
    rival = gpu_rivals.Rival(module="torch", ops=ops, make=reference_of)
    monkeypatch.setattr(gpu_measure, "RIVALS", {"theirs": rival})
    work = gpu_measure.of_kind("theirs", scale=256)[0]
    figure = gpu_measure.compare(work, "theirs", CPU, rotations_max=1)
    assert figure.failure is None, figure
    assert figure.rival_us
    report = gpu_check.Report(device="none", versions={}, figures=[figure])
    assert "theirs" in report.table()


@pytest.mark.parametrize("name", gpu_rivals.RIVALS)
def test_a_rival_that_is_not_here_fails_by_itself(name: str) -> None:
    if not gpu_check.lacking((gpu_rivals.RIVALS[name].module,)):
        pytest.skip(f"{name} is here")
    work = gpu_measure.of_kind(name, scale=512)[0]
    figure = gpu_measure.compare(work, name, CPU, rotations_max=1)
    assert "No module named" in (figure.failure or "")


@pytest.mark.parametrize("name", gpu_rivals.RIVALS)
def test_a_rivals_kernels_get_operands_in_its_own_terms(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls as the rivals' projects document them, taken by what stands for their modules."""
    calls = Recorder()
    monkeypatch.setitem(sys.modules, gpu_rivals.RIVALS[name].module, calls)
    for work in gpu_measure.of_kind(name, scale=512):
        attended = work.make(CPU, 0).attended
        assert attended is not None
        monkeypatch.setattr(gpu_rivals, "_WORKSPACE_SIZE_BYTES", 16)
        call = gpu_rivals.RIVALS[name].make(attended)
        with contextlib.suppress(TypeError, AttributeError, ValueError):
            # What it gives is no tensor.
            call()
    assert calls.made > 0


class Recorder:
    """Takes any call of any part of a module; gives itself, or itself twice."""

    def __init__(self) -> None:
        self.made = 0

    def __getattr__(self, name: str) -> "Recorder":
        return self

    def __call__(self, *args: object, **kwargs: object) -> "Recorder":
        self.made += 1
        return self

    def __iter__(self) -> Iterator["Recorder"]:
        return iter((self, self))


def test_a_report_says_what_failed_and_what_was_not_measured() -> None:
    passed = gpu_check.Part(name="ours", command=["true"], limit_s=9)
    slow = gpu_check.Part(name="slow", command=["sleep", "60"], limit_s=0.1)
    bare = gpu_check.Part(name="bare", command=["false"], limit_s=9, needs=("no_such_package",))
    none = gpu_check.Part(name="none", command=["/no/such/command"], limit_s=9)
    numbers = json.dumps({"read_bytes_per_s": 4e12, "bfloat16_ops_per_s": 8e14})
    ceilings = gpu_check.Part(name="ceilings", command=["echo", numbers], limit_s=9)
    kept: list[str] = []
    report = gpu_check.run(
        "none",
        [passed, slow, ceilings, none],
        [bare],
        deadline=time.monotonic() - 1,
        kept=lambda report: kept.append(json.dumps(asdict(report))),
    )
    assert [part.passed for part in report.parts] == [True, False, True, False, False]
    assert report.ceilings == CEILINGS
    assert report.failed
    assert len(kept) >= 5
    text = report.table()
    assert "bare         not run: there is no no_such_package here" in text
    assert "slow         FAIL" in text
    assert text.count("not measured: the time was over") == len(list(workloads()))
    assert "FlashMLA: not compared, there is no flash_mla here" in text


def test_a_workload_that_ends_its_process_or_never_ends_is_one_failure() -> None:
    program = (
        "import json, sys, time\n"
        "for number in range(int(sys.argv[1]), 5):\n"
        "    if number == 1: sys.exit('a broken context')\n"
        "    if number == 3: time.sleep(60)\n"
        "    print(json.dumps({'op': 'a', 'name': str(number), 'microseconds': 2.0}), flush=True)\n"
    )
    names = [("a", str(number)) for number in range(5)]

    def collected(seconds: float) -> list[gpu_measure.Figure]:
        return list(
            gpu_check.collect(
                names,
                lambda skip: [sys.executable, "-c", program, str(skip)],
                deadline=time.monotonic() + seconds,
                limit_s=8.0,
            )
        )

    figures = collected(120.0)
    assert [figure.name for figure in figures] == ["0", "1", "2", "3", "4"]
    failures = [figure.failure for figure in figures]
    assert "a broken context" in (failures[1] or "")
    assert failures[3] == "took longer than 8 s"
    assert [failures[number] for number in (0, 2, 4)] == [None] * 3
    late = collected(0.0)
    assert [figure.microseconds for figure in late] == [None] * 5
    assert not any(figure.failure for figure in late)


def test_the_measuring_process_prints_a_line_for_each_figure() -> None:
    assert gpu_measure.main(["ceilings", "--device", "cpu"]) == 0
    (line,) = gpu_measure.lines("ceilings", CPU, skip=0, scale=1)
    assert json.loads(line)["read_bytes_per_s"] > 0
    last = len(list(workloads())) - 1
    with noted_figures() as figures:
        (line,) = gpu_measure.lines("kernels", CPU, skip=last, scale=1)
        assert gpu_measure.Figure(**json.loads(line)) == figures[-1]


@contextlib.contextmanager
def noted_figures() -> Iterator[list[gpu_measure.Figure]]:
    """Nothing is measured, and figures are noted."""
    figures: list[gpu_measure.Figure] = []

    def noted(workload: Workload, device: torch.device) -> gpu_measure.Figure:
        figures.append(gpu_measure.Figure(op=workload.op, name=workload.name))
        return figures[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_measure, "measure", noted)
        yield figures


def test_one_user_of_transformers_decodes_at_depth() -> None:
    found = one_user_of_transformers(CPU, sizes=SIZES, depth=9, compiled=False, dtype=torch.float32)
    assert found["tokens_per_s"] > 0


@pytest.mark.slow
def test_what_runs_on_a_gpu_is_commands_that_there_are() -> None:
    """Each is imported and asked for its options, as its first run on a GPU begins."""
    modules = {part.command[2] for part in (*gpu_check.parts_of(), *gpu_check.peers_of())}
    assert len(modules) == 5
    for module in modules - {"pytest"}:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


def test_nothing_that_runs_on_a_gpu_needs_packages_of_the_entrypoint() -> None:
    """A machine that is lent with a GPU has PyTorch, Triton, numpy, and little else."""
    program = (
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'msgspec', 'llguidance', 'typer', 'rich', 'zmq'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "import benchmarks.gpu_check, benchmarks.support.gpu_verify, tokenspeed.modeling\n"
        "import benchmarks.support.gpu_transformers, benchmarks.support.gpu_step\n"
        "import tests.gpu.test_on_a_gpu\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_tests_on_a_gpu_need_no_plugin_of_pytests() -> None:
    (part,) = [part for part in gpu_check.parts_of() if part.name == "tests"]
    # Options of plugins that are not there are errors where the project's own settings are read.
    command = [*part.command, "-p", "no:timeout"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in done.stdout or torch.cuda.is_available()


def test_cases_of_all_kernels_are_taken_in_turn_until_the_time_is_over() -> None:
    ops = ("norm.rms_norm", "rope.rotate")
    platform = Platform.of(CPU)
    runs = plan_runs(registry, platform=platform, ops=ops, solution="reference")
    runtime = start_runtime(threads=1)
    some = verify_for(runs, runtime, CPU, seconds=0.0, seed=1)
    assert sum(len(outcomes) for _, outcomes in some) == 0
    every = verify_for(runs, runtime, CPU, seconds=60.0, seed=1)
    assert [len(outcomes) for _, outcomes in every] == [len(run.cases) for run, _ in every]
    assert all(outcome.failure is None for _, outcomes in every for outcome in outcomes)


def test_one_user_decodes_at_depth() -> None:
    found = one_user(CPU, sizes=SIZES, depth=130)
    assert found["tokens_per_s"] > 0
    assert found["size_bytes"] > 0
    assert found["drafted_step_us"] > 0
    assert found["drafted_step_through_python_us"] > 0
    assert decode_plan(1, 130, 0).groups[0].kv_slots.tolist() == [130]
    drafted = decode_plan(4, 130, 0, drafted=2)
    assert drafted.groups[0].kv_slots.tolist() == [130, 131, 132]
    assert drafted.sample_positions.tolist() == [4, 5, 6]
