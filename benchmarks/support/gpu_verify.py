"""Triton's kernels against their ops' formulas on a GPU, with nothing but the kernels imported.

As `tokenspeed kernels verify --device cuda --solution triton`, but for a time: most of it goes into
compiling, so cases are drawn from all kernels in turn until it is over. The seed is printed.
"""

import argparse
import random
import sys
import time

import torch

from tokenspeed.kernels import Platform, registry
from tokenspeed.kernels.cpu import CpuRuntime, start_runtime
from tokenspeed.kernels.verify import Outcome, Run, plan_runs, verify

__all__ = ["verify_for"]


def verify_for(
    runs: list[Run],
    runtime: CpuRuntime,
    device: torch.device,
    *,
    seconds: float,
    seed: int,
) -> list[tuple[Run, list[Outcome]]]:
    """Outcomes of each run's cases, in an order of chance, a case of each run in turn."""
    choose = random.Random(seed)
    left = [(run, choose.sample(run.cases, len(run.cases)), list[Outcome]()) for run in runs]
    choose.shuffle(left)
    deadline = time.monotonic() + seconds
    for turn in range(max((len(run.cases) for run in runs), default=0)):
        for run, cases, outcomes in left:
            if turn < len(cases) and time.monotonic() < deadline:
                outcomes.append(verify(run.kernel, cases[turn], runtime=runtime, device=device))
    return [(run, outcomes) for run, _, outcomes in left]


def main() -> int:
    """1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    device = torch.device("cuda")
    runs = plan_runs(registry, platform=Platform.of(device), solution="triton")
    print(f"--seed {options.seed}")
    failed = 0
    for run, outcomes in verify_for(
        runs, start_runtime(threads=1), device, seconds=options.seconds, seed=options.seed
    ):
        wrong = [outcome for outcome in outcomes if outcome.failure is not None]
        failed += len(wrong)
        name = f"{run.kernel.op} {run.kernel.name} {run.operand}"
        print(f"{name}: {len(outcomes)} of {len(run.cases)} cases, {len(wrong)} failed")
        for outcome in wrong[:3]:
            print(f"    {outcome.case.name}: {(outcome.failure or '')[:300]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
