"""Owns the check of kernels against their ops' formulas in float64; never chooses a kernel."""

from tokenspeed.kernels.verify.case import Case, Compared
from tokenspeed.kernels.verify.runs import CASES, Outcome, Run, plan_runs, verify, worst
from tokenspeed.kernels.verify.telling import verify_and_tell
from tokenspeed.kernels.verify.tolerances import TOLERANCES, Tolerance

__all__ = [
    "CASES",
    "TOLERANCES",
    "Case",
    "Compared",
    "Outcome",
    "Run",
    "Tolerance",
    "plan_runs",
    "verify",
    "verify_and_tell",
    "worst",
]
