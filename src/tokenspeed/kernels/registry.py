"""Ops, the kernels that implement them, and the one registry that knows both."""

import enum
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast

import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.weights import PACKED, PACKED_GROUPS, Matrix, PackedGroups, PackedWeight

__all__ = [
    "ANY",
    "Kernel",
    "Op",
    "Priority",
    "Registry",
    "TraitValue",
    "declare_op",
    "kernel",
    "registry",
]

P = ParamSpec("P")
R = TypeVar("R")
TraitValue = bool | int | str


class _Any(enum.Enum):
    ANY = "any"

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = _Any.ANY
"""A trait or a set of formats of which a kernel takes every value."""

_RUNTIME = "runtime"
Admitted = Collection[TraitValue] | _Any


class Priority(enum.IntEnum):
    """Bands of preference between kernels that can all run."""

    REFERENCE = 0
    """Readable, and the oracle of numerics."""
    PORTABLE = 100
    """Fast on a whole kind of device."""
    NATIVE = 200
    """Written for an instruction set or a generation of devices."""
    SPECIAL = 300
    """Written for few shapes, and best there."""


class Op(Generic[P, R]):
    """One operation: a name, a signature, and the traits its callers state.

    Calling it runs the best kernel for the arguments' device and type, selected anew each time;
    a model selects once instead, with `KernelSelector`.

    Attributes:
        name: "family.op".
        traits: the facts about a call, beside format and device, that a kernel may depend on.
    """

    def __init__(
        self, name: str, call: Callable[P, R], *, traits: Collection[str], registry: "Registry"
    ) -> None:
        self.name = name
        self.traits = frozenset(traits)
        self.parameters = tuple(inspect.signature(call).parameters)
        self._call = call
        self._registry = registry
        self.__doc__ = call.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._call(*args, **kwargs)

    def best(
        self,
        operand: torch.Tensor,
        *,
        weight: Matrix | None = None,
        format_name: str | None = None,
        **traits: TraitValue,
    ) -> Callable[P, R]:
        """The best kernel for the operand's device and element type, and the weight's format.

        A format that is named counts instead of both.
        """
        from tokenspeed.kernels.selection import KernelSelector  # noqa: PLC0415

        selector = KernelSelector(
            device=operand.device, dtype=operand.dtype, registry=self._registry
        )
        if isinstance(weight, PackedWeight):
            format_name = PACKED
        elif isinstance(weight, PackedGroups):
            format_name = PACKED_GROUPS
        elif isinstance(weight, QuantisedWeight):
            format_name = weight.format_name
        return selector.select(self, format_name=format_name, traits=traits)

    def __repr__(self) -> str:
        return f"Op({self.name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        op: name of the op.
        solution: whose it is: "reference", "cpu", "triton", or a vendor's name.
        name: the function's own name.
        call: the implementation; parameters as in the op's declaration.
        requires: what the device must offer.
        formats: element types of the op's main operand that it reads ("float32", "bfloat16",
            packed formats by name), or ANY.
        traits: for each trait it knows, the values it handles, or ANY.
        priority: its band.
        takes_runtime: whether it wants a `CpuRuntime` under the keyword `runtime`.
        reads: formats that its activations may have beside tensors, best first.
        batch_dependent: whether a row's last bits depend on what shares its batch.
    """

    op: str
    solution: str
    name: str
    call: Callable[..., Any]
    requires: Capability
    formats: Collection[str] | _Any
    traits: Mapping[str, Admitted]
    priority: Priority
    takes_runtime: bool = False
    reads: tuple[str, ...] = ()
    batch_dependent: bool = False


@dataclass(slots=True)
class Registry:
    """All ops and kernels. One is filled at import; tests make their own."""

    ops: dict[str, Op[..., Any]] = field(default_factory=dict)
    kernels: dict[str, list[Kernel]] = field(default_factory=dict)

    def op(self, name: str) -> Op[..., Any]:
        """The op of that name.

        Raises:
            KernelError: there is none.
        """
        if name not in self.ops:
            raise KernelError(f"no op {name!r}; ops are {', '.join(sorted(self.ops))}")
        return self.ops[name]

    def candidates(self, op: str) -> Iterable[Kernel]:
        """Kernels of an op: higher bands first, then by solution and name."""
        found = self.kernels.get(op, ())
        return sorted(found, key=lambda kernel: (-kernel.priority, kernel.solution, kernel.name))

    def declare_op(
        self, name: str, *, traits: Collection[str] = ()
    ) -> Callable[[Callable[P, R]], Op[P, R]]:
        """Declare an op from a function whose signature is the op's and whose body, run on a
        direct call, picks a kernel from the arguments.

        Raises:
            KernelError: the name is taken, or is not of the form "family.op".
        """

        def declare(call: Callable[P, R]) -> Op[P, R]:
            if name.count(".") != 1:
                raise KernelError(f"an op is named family.op, not {name!r}")
            if name in self.ops:
                raise KernelError(f"op {name} is declared twice")
            op = Op(name, call, traits=traits, registry=self)
            self.ops[name] = op
            return op

        return declare

    def kernel(
        self,
        op: str,
        *,
        solution: str,
        requires: Capability = Capability(),  # noqa: B008 (frozen)
        formats: Collection[str] | _Any,
        traits: Mapping[str, Admitted] | None = None,
        priority: Priority,
        reads: Sequence[str] = (),
        batch_dependent: bool = False,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a function as a kernel. It stays an ordinary function.

        Beside the op's parameters it may have one keyword-only parameter, `runtime`: the threads
        and the memory of the engine, which selection binds.

        A request may only match a kernel that declares every trait the request states, and that
        is told every trait it restricts.

        Raises:
            KernelError: no such op or trait, other parameters than the op's, or registered twice.
        """

        def register(call: Callable[P, R]) -> Callable[P, R]:
            declared = self.op(op)
            name = getattr(call, "__name__", repr(call))
            what = f"kernel {solution}:{name} of {op}"
            signature = inspect.signature(call).parameters
            runtime = signature.get(_RUNTIME)
            takes_runtime = runtime is not None and runtime.kind is runtime.KEYWORD_ONLY
            parameters = tuple(
                name for name in signature if not (takes_runtime and name == _RUNTIME)
            )
            if parameters != declared.parameters:
                raise KernelError(
                    f"{what} takes ({', '.join(parameters)}), but the op is declared with "
                    f"({', '.join(declared.parameters)})"
                )
            unknown = sorted(set(traits or ()) - declared.traits)
            if unknown:
                raise KernelError(
                    f"{what} declares {', '.join(unknown)}; the op's traits are "
                    f"{', '.join(sorted(declared.traits)) or 'none'}"
                )
            rivals = self.kernels.setdefault(op, [])
            if any((rival.solution, rival.name) == (solution, name) for rival in rivals):
                raise KernelError(f"{what} is registered twice")
            rivals.append(
                Kernel(
                    op=op,
                    solution=solution,
                    name=name,
                    call=cast("Callable[..., Any]", call),
                    requires=requires,
                    formats=formats,
                    traits=dict(traits or {}),
                    priority=priority,
                    takes_runtime=takes_runtime,
                    reads=tuple(reads),
                    batch_dependent=batch_dependent,
                )
            )
            return call

        return register


registry = Registry()
"""The registry that models and plugins use."""

declare_op = registry.declare_op
kernel = registry.kernel
