"""What the tests of Triton's kernels share: cases of the op's grid, drawn anew in each run."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support.triton_interpreter import repair_interpreter
from tokenspeed.kernels import Kernel, Platform, registry
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.kernels.verify import Case, plan_runs, verify

__all__ = ["GPU", "SEED", "drawn_cases", "interpreting", "verify_interpreted"]

GPU = Platform(device="cuda", features=frozenset({"triton"}), arch=(9, 0))
"""What a GPU with Triton offers."""

SEED = int(os.environ.get("TOKENSPEED_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
"""Of this run's operands; every test that uses it prints it."""


@pytest.fixture(autouse=True)
def interpreting() -> Iterator[None]:
    """Run device code with numpy on one thread, silent about infinities as GPUs are."""
    repair_interpreter()
    print(f"TOKENSPEED_TEST_SEED={SEED}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
    torch.set_num_threads(before)


def drawn_cases(*ops: str, each: int) -> list[tuple[Kernel, Case]]:
    """For each format of each of the solution's kernels of some ops, `each` cases of its grid."""
    choose = random.Random(SEED)
    found = []
    for run in plan_runs(registry, platform=GPU, ops=ops, solution="triton"):
        assert run.unchecked is None, (run.kernel, run.unchecked)
        cases = choose.sample(run.cases, min(each, len(run.cases)))
        found += [(run.kernel, case) for case in cases]
    return found


def verify_interpreted(kernel: Kernel, case: Case) -> None:
    """Hold a kernel to the op's formula in one case."""
    outcome = verify(kernel, case, runtime=start_runtime(threads=1))
    assert outcome.failure is None, (kernel.name, case.operand, case.name, outcome)
