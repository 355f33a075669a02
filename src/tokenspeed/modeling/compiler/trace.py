"""Finding a model's dataflow: its forward is run once over symbols, on a twin without weights.

The twin is built by the model's own class with a selector that gives rules in place of kernels.
Every call of a module is taken down with what its boundary asks for and declares, every op with how
placements pass through it. Features, heads and the vocabulary are divided as boundaries say, so the
shapes that the forward sees are one rank's; what weights a rank holds follows from the ops that
read them. How tokens lie, and where sums over ranks are made whole, is left to the solver.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from tokenspeed.core.errors import ConfigError, PlacementError
from tokenspeed.distributed import Mesh, share
from tokenspeed.kernels import KernelSelector, Op
from tokenspeed.modeling.compiler.events import Crossing, Event, Layout, OpEvent, Unsaid
from tokenspeed.modeling.compiler.symbol import Dim, Flow, Symbol
from tokenspeed.modeling.cut import Division
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import Boundary, Placement, Replicate, Shard

__all__ = ["Tracer", "WeightSymbol"]


class WeightSymbol:
    """A weight while its division is found out: what `Weight.data` is on a twin.

    Attributes:
        weight: the twin's.
        name: ours.
        dtype: element type of what is read from it.
    """

    def __init__(self, weight: Weight, name: str, dtype: torch.dtype) -> None:
        self.weight = weight
        self.name = name
        self.dtype = dtype
        self.divided: dict[str, tuple[int, ...]] | None = None
        self.partial: frozenset[int] = frozenset()


class Tracer:
    """Runs the twin and takes down what happens.

    Args:
        mesh: its cells divide tensors.
        rank: whose shapes are seen.
        rules: by name of an op, what it does with symbols: a function of the tracer and the op's
            arguments.

    Attributes:
        events: ops and crossings in order.
        weights: by our name, how each is divided.
        given: numbers of the symbols that the model was called with.
    """

    def __init__(self, mesh: Mesh, rank: int, rules: Mapping[str, Callable[..., Any]]) -> None:
        self.mesh = mesh
        self.rank = rank
        self.rules = rules
        self.events: list[Event] = []
        self.weights: dict[str, WeightSymbol] = {}
        self.given: list[int] = []
        self._symbols = 0
        self._stack: list[tuple[str, Module]] = []
        self._adopted: list[Module] = []

    def kernels(self, kernels: KernelSelector) -> KernelSelector:
        """A selector whose kernels are rules, and which otherwise answers as the given one."""
        return _Rules(kernels, self)

    def input(self, symbol: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Symbol:
        """A tensor to call the model with: of tokens "T" or sampled ones "S", then fixed sizes."""
        made = self.symbol([Dim(size=1, symbol=symbol), *(Dim(size=n) for n in sizes)], dtype)
        self.given.append(made.number)
        return made

    def forget(self) -> None:
        """Let go of the twin: rings of objects are not freed where no collector runs."""
        self.events.clear()
        self.weights.clear()
        for module in self._adopted:
            del vars(module)["forward"]
        self._adopted.clear()

    def deliver(self, result: Any) -> None:
        """Take down that all ranks are to have the model's result."""
        if not isinstance(result, Symbol):
            self.fail(f"the model gives a {type(result).__name__}, not a tensor")
        everywhere = Boundary(inputs={"result": (Replicate("cp"),)}, outputs=())
        self._enter("", None, everywhere, "result", result)

    def symbol(self, dims: Sequence[Dim], dtype: torch.dtype) -> Symbol:
        """A new symbol, out of the module that is running."""
        self._symbols += 1
        return Symbol(self, dims, dtype, self._symbols, self.where)

    def record(
        self, flow: Flow, inputs: Sequence[Symbol], outputs: Iterable[tuple[Any, torch.dtype]]
    ) -> list[Symbol]:
        """An op over inputs; see `Recorder`."""
        made = [self.symbol(dims, dtype) for dims, dtype in outputs]
        self.events.append(
            OpEvent(module=self.where, flow=flow, inputs=tuple(inputs), outputs=tuple(made))
        )
        return made

    def fail(self, message: str) -> NoReturn:
        """Raise a PlacementError that says in which module."""
        raise PlacementError(f"{self.where}: {message}")

    @property
    def where(self) -> str:
        """Path and class of the module that is running."""
        return _title(*self._stack[-1]) if self._stack else "the model's input"

    def adopt(self, root: Module, dtype: torch.dtype) -> None:
        """Make ready a twin: its weights become symbols, and every call of a module is seen."""
        known: dict[int, WeightSymbol] = {}
        for name, weight in root.weights():
            symbol = known.setdefault(id(weight), WeightSymbol(weight, name, dtype))
            vars(weight)["data"] = symbol
            self.weights[symbol.name] = symbol
        for path, module in _modules("", root):
            self._adopted.append(module)
            vars(module)["forward"] = self._seen(path, module, module.forward)

    def wanted_output(self, cell: int) -> Placement | None:
        """What the running module declares of its only output on a cell; Replicate by default."""
        module = self._stack[-1][1]
        if module.boundary is None or len(module.boundary.outputs) != 1:
            return None
        found, _ = _by_cell(module.boundary, module.boundary.outputs[0], self.mesh)[cell]
        return found

    def axis_of(self, cell: int) -> str:
        """The axis that a cell belongs to in the running module's view of the mesh."""
        module = self._stack[-1][1]
        experts = module.boundary is not None and module.boundary.experts
        return _axis_of(self.mesh, cell, experts=experts)

    def divide(
        self, data: WeightSymbol, dims: Mapping[str, tuple[int, ...]], partial: frozenset[int]
    ) -> None:
        """Give a weight its division: cells by dimension, and cells of which one rank has it."""
        dims = {dim: cells for dim, cells in dims.items() if cells}
        if data.divided is None:
            data.divided, data.partial = dims, partial
            try:
                data.weight.place(
                    {
                        dim: Division(
                            shards=self.mesh.size(cells), index=self.mesh.index(self.rank, cells)
                        )
                        for dim, cells in dims.items()
                    }
                )
            except ConfigError as error:
                raise ConfigError(f"{self.where}: {error}") from error
        elif data.divided != dims or data.partial != partial:
            self.fail(
                f"reads {data.name} divided by {_words(dims)}, but another module reads it "
                f"divided by {_words(data.divided)}"
            )

    def _seen(self, path: str, module: Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(forward).parameters)

        def call(*args: Any, **kwargs: Any) -> Any:
            declared = module.boundary
            self._stack.append((path, module))
            try:
                if declared is None:
                    return forward(*args, **kwargs)
                values = dict(zip(names, args, strict=False)) | kwargs
                for name in declared.inputs:
                    if isinstance(values.get(name), Symbol):
                        values[name] = self._enter(path, module, declared, name, values[name])
                result = forward(**values)
                results = result if isinstance(result, tuple) else (result,)
                if len(results) != len(declared.outputs):
                    self.fail(
                        f"gives {len(results)} results, but its boundary declares "
                        f"{len(declared.outputs)}"
                    )
                left = tuple(
                    self._leave(
                        path,
                        module,
                        "out" if len(results) == 1 else f"out[{index}]",
                        layout,
                        found,
                    )
                    for index, (layout, found) in enumerate(
                        zip(declared.outputs, results, strict=True)
                    )
                )
                return left if isinstance(result, tuple) else left[0]
            finally:
                self._stack.pop()

        return call

    def _enter(
        self, path: str, module: Module | None, declared: Boundary, name: str, value: Symbol
    ) -> Symbol:
        layout = declared.inputs[name]
        by_cell = _by_cell(declared, layout, self.mesh)
        for placement in layout:
            if isinstance(placement, Shard) and not -len(value.dims) <= placement.dim_index:
                self.fail(f"{name} has no {placement.dim} to divide: it comes from {value.source}")
        dims = self._entered_dims(value, name, by_cell)
        after = self.symbol(dims, value.dtype)
        # Messages name who made a value, not who last took it in.
        after.source = value.source
        self.events.append(
            Crossing(
                path=path,
                module="the model" if module is None else _title(path, module),
                parameter=name,
                inward=True,
                before=value,
                after=after,
                wanted=tuple(None if divided is not None else p for p, divided in by_cell),
                layout=layout,
                wide=module is not None and name in module.wide_inputs,
            )
        )
        return after

    def _entered_dims(
        self, value: Symbol, name: str, by_cell: Sequence[tuple[Placement, int | None]]
    ) -> list[Dim]:
        """The dimensions of a value once its features lie as a module wants them."""
        dims = list(value.dims)
        for index, dim in enumerate(dims):
            wanted = tuple(
                cell
                for cell, (_, divided) in enumerate(by_cell)
                if divided is not None and divided % len(dims) == index
            )
            if dim.cells == wanted:
                continue
            if dim.cells and wanted:
                self.fail(
                    f"{name} comes from {value.source} divided over another group of ranks than "
                    "is wanted, and no collective changes one for the other"
                )
            if dim.cells and (len(dim.sizes) > 1 or dim.overlapping):
                self.fail(
                    f"{name} comes from {value.source} divided over ranks in "
                    f"{len(dim.sizes)} stacked pieces, which no collective puts together"
                )
            if dim.symbol is not None:
                self.fail(f"{name} would have tokens divided as features are")
            whole = dim.whole if dim.cells else dim
            dims[index] = self._divided(whole, wanted)
        return dims

    def _divided(self, whole: Dim, cells: tuple[int, ...]) -> Dim:
        if not cells:
            return whole
        ranks, index = self.mesh.size(cells), self.mesh.index(self.rank, cells)
        spans = [share(whole.size, ranks, place) for place in range(ranks)]
        sizes = tuple(end - first for first, end in spans)
        return Dim(size=sizes[index], cells=cells, sizes=(sizes,), index=index)

    def _leave(self, path: str, module: Module, name: str, layout: Layout, value: Any) -> Symbol:
        assert module.boundary is not None
        if not isinstance(value, Symbol):
            self.fail(f"{name} is a {type(value).__name__}, but its boundary declares a tensor")
        by_cell = _by_cell(module.boundary, layout, self.mesh)
        for cell, (found, divided) in enumerate(by_cell):
            held = [index for index, dim in enumerate(value.dims) if cell in dim.cells]
            if held != ([] if divided is None else [divided % len(value.dims)]):
                made = f"dimension {held[0]} divided" if held else "every dimension whole"
                self.fail(
                    f"declares {name}={_shown(layout)}, but its equations give "
                    f"{made} over {self.axis_of(cell)} (wanted: {found})"
                )
        after = self.symbol(value.dims, value.dtype)
        after.source = _title(path, module)
        self.events.append(
            Crossing(
                path=path,
                module=_title(path, module),
                parameter=name,
                inward=False,
                before=value,
                after=after,
                wanted=tuple(None if divided is not None else p for p, divided in by_cell),
                layout=layout,
            )
        )
        return after


class _Rules(KernelSelector):
    """Gives the rule of an op in place of a kernel."""

    def __init__(self, kernels: KernelSelector, tracer: Tracer) -> None:
        vars(self).update(vars(kernels))
        self._tracer = tracer

    def select(self, op: Op[Any, Any], **request: Any) -> Callable[..., Any]:
        tracer = self._tracer

        def call(*args: Any, **kwargs: Any) -> Any:
            if op.name not in tracer.rules:
                tracer.fail(
                    f"no rule says how placements pass through {op.name}; "
                    "modeling/compiler/rules.py has those of other ops"
                )
            values = dict(zip(op.parameters, args, strict=False)) | kwargs
            return tracer.rules[op.name](tracer, **values)

        return call


def _by_cell(boundary: Boundary, layout: Layout, mesh: Mesh) -> list[tuple[Placement, int | None]]:
    """For each cell, the placement on it, and which dimension it divides if not tokens."""
    declared = {placement.axis: placement for placement in layout}
    found: list[tuple[Placement, int | None]] = []
    for cell in range(len(mesh.cells)):
        axis = _axis_of(mesh, cell, experts=boundary.experts)
        placement = declared.get(axis)
        if placement is None:
            # Tokens of other requests are no part of what a rank of attention sees, and ranks that
            # share a context do the same but for attention itself; they may share experts.
            placement = Unsaid(axis) if axis in ("dp", "cp") else Replicate(axis)
        divided = None
        if isinstance(placement, Shard) and placement.dim_index != 0:
            divided = placement.dim_index
        found.append((placement, divided))
    return found


def _axis_of(mesh: Mesh, cell: int, *, experts: bool) -> str:
    axes = ("ep", "tp") if experts else ("dp", "cp", "tp")
    return next(axis for axis in axes if cell in mesh.cells_of(axis, experts=experts))


def _modules(path: str, module: Module) -> Iterable[tuple[str, Module]]:
    yield path, module
    for name, child in module.children():
        yield from _modules(f"{path}.{name}" if path else name, child)


def _title(path: str, module: Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


def _words(dims: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(dims) or "nothing"


def _shown(layout: Layout) -> str:
    return ", ".join(map(str, layout)) or "Replicate"
