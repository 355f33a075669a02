"""Owns the way from boundaries to collectives; never knows a model or a transport."""

from tokenspeed.modeling.compiler.install import install, modules_of
from tokenspeed.modeling.compiler.program import Program, Step, WeightPlacement, compile_module
from tokenspeed.modeling.compiler.trace import Tracer
from tokenspeed.modeling.compiler.transition import Transition

__all__ = [
    "Program",
    "Step",
    "Tracer",
    "Transition",
    "WeightPlacement",
    "compile_module",
    "install",
    "modules_of",
]
