"""`make gpu-check` without a GPU: it says so, and what it would do is tried out on the CPU."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_check
from benchmarks.support.gpu_step import decode_plan, one_user
from benchmarks.support.gpu_verify import verify_for

from tests.kernels.triton_cases import interpreting
from tests.support.triton_interpreter import needs_interpreter
from tests.unit.execution.tiny import SIZES
from tokenspeed.kernels import Platform, registry
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.kernels.triton.measure import Ceilings
from tokenspeed.kernels.triton.workloads import workloads
from tokenspeed.kernels.verify import plan_runs

__all__ = ["interpreting"]

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


@needs_interpreter
def test_workloads_are_compared_and_timed() -> None:
    chosen = {"attention.paged_mla", "attention.paged_mha", "norm.rms_norm"}
    seen = set()
    for work in workloads(scale=256):
        if work.op not in chosen - seen:
            continue
        seen.add(work.op)
        figure = gpu_check.measure(work, CEILINGS, CPU, rotations_max=1)
        assert figure.failure is None, figure
        assert figure.microseconds
        assert figure.microseconds > 0
        if work.op.startswith("attention"):
            assert figure.error is not None
            assert figure.error < 1e-2
    assert seen == chosen


def test_a_report_says_what_failed_and_what_was_not_measured() -> None:
    passed = gpu_check.Part(name="ours", command=["true"], limit_s=9)
    slow = gpu_check.Part(name="slow", command=["sleep", "60"], limit_s=0.1)
    bare = gpu_check.Part(name="bare", command=["false"], limit_s=9, needs=("no_such_package",))
    report = gpu_check.run(CPU, [passed, slow, bare], deadline=time.monotonic() + 5)
    assert [part.passed for part in report.parts] == [True, False, False]
    assert report.failed
    text = report.table()
    assert "bare         not run: there is no no_such_package here" in text
    assert "slow         FAIL" in text
    assert text.count("not measured: the time was over") == len(list(workloads()))
    json.dumps(asdict(report))


def test_what_is_measured_of_kernels_needs_no_package_of_the_engines() -> None:
    """A machine that is lent with a GPU has PyTorch, Triton, numpy, and little else."""
    program = (
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'msgspec', 'llguidance', 'typer', 'rich', 'zmq'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "import benchmarks.gpu_check, benchmarks.support.gpu_verify, tokenspeed.modeling\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


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
    found = one_user(CPU, 1e10, sizes=SIZES, depth=130)
    assert found["tokens_per_s"] > 0
    assert decode_plan(1, 130, 0).groups[0].kv_slots.tolist() == [130]
