"""Triton's kernels against their ops' formulas on a GPU, with nothing but the kernels imported.

As `tokenspeed kernels verify --device cuda --solution triton`, which needs what the command line
needs.
"""

import sys

import torch

from tokenspeed.kernels import Platform, registry
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.kernels.verify import plan_runs, verify_and_tell


def main() -> int:
    """The number of cases that failed, as far as an exit code goes."""
    device = torch.device("cuda")
    runs = plan_runs(registry, platform=Platform.of(device), solution="triton")
    return min(1, verify_and_tell(runs, start_runtime(threads=1), device, tell=print))


if __name__ == "__main__":
    sys.exit(main())
