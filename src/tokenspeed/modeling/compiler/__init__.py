"""Owns the way from boundaries to collectives; never knows a model or a transport."""

from tokenspeed.modeling.compiler.check import check_placements, groups_to_check
from tokenspeed.modeling.compiler.install import StepInProgress, install, modules_of
from tokenspeed.modeling.compiler.program import Program, Step, WeightPlacement, compile_module
from tokenspeed.modeling.compiler.trace import Tracer
from tokenspeed.modeling.compiler.transition import Transition

__all__ = [
    "Program",
    "Step",
    "StepInProgress",
    "Tracer",
    "Transition",
    "WeightPlacement",
    "check_placements",
    "compile_module",
    "groups_to_check",
    "install",
    "modules_of",
]
