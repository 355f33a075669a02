"""Holding real tensors against the program: for debugging a model or the compiler.

On every boundary each tensor must have the shape that was traced, what is replicated must be the
same bits on all ranks, and a share of the tokens as long as the rank's share. It costs an exchange
for each tensor, so it is never on by itself.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenspeed.core.errors import PlacementError
from tokenspeed.modeling.compiler.install import Groups, StepInProgress, inner_forward, modules_of
from tokenspeed.modeling.compiler.program import Lying, Program
from tokenspeed.modeling.module import Module

__all__ = ["check_placements", "groups_to_check"]


def groups_to_check(program: Program) -> tuple[tuple[int, ...], ...]:
    """Cells of the groups that the check needs beside those of the program."""
    return tuple((cell,) for cell in range(len(program.mesh.cells)))


def check_placements(root: Module, program: Program, groups: Groups, known: StepInProgress) -> None:
    """Have every call of a module of a model check what crosses its boundary.

    To be called before the program is installed, so that tensors are seen as `forward` gets them.

    Args:
        root: the model.
        program: what was compiled for it.
        groups: this rank's, those of `groups_to_check` among them.
        known: tokens of the step in progress.
    """
    crossings: dict[str, list[Lying]] = {}
    for lying in program.lying:
        crossings.setdefault(lying.path, []).append(lying)
    checker = _Checker(groups, known)
    for path, module in modules_of(root):
        if path in crossings and module.boundary is not None:
            _watch(module, crossings[path], checker)


class _Checker:
    def __init__(self, groups: Groups, known: StepInProgress) -> None:
        self._groups = groups
        self._known = known

    def check(self, lying: Lying, value: Any) -> None:
        """Raise a PlacementError if a tensor lies otherwise than was found.

        All ranks come to the same end: one that sees a wrong shape tells the others.
        """
        if not isinstance(value, torch.Tensor):
            return
        problem = self._shape_problem(lying, value)
        for cell, state in enumerate(lying.states):
            group = self._groups[(cell,)]
            flags = torch.tensor([float(problem is not None)])
            if group.all_reduce(flags).item() and problem is None:
                problem = f"is wrong on another of ranks {_listed(group.ranks)}"
            if problem is None and state == "R":
                mine = value.contiguous().view(torch.uint8).flatten()
                theirs = group.all_gather(mine, dim=0, sizes=[len(mine)] * group.size)
                if not all(torch.equal(other, mine) for other in torch.split(theirs, len(mine))):
                    problem = f"should be the same on ranks {_listed(group.ranks)}, but is not"
        if problem is not None:
            raise PlacementError(f"{lying.module}: {lying.parameter} {problem}")

    def _shape_problem(self, lying: Lying, value: torch.Tensor) -> str | None:
        wanted: list[int | str] = []
        for index, dim in enumerate(lying.dims):
            if dim.symbol is None:
                wanted.append(dim.size)
                continue
            total = self._known.by_symbol[dim.symbol]
            cells = tuple(cell for cell, state in enumerate(lying.states) if state == "T")
            if index == 0 and cells:
                group = self._groups[cells]
                total = group.shares(total)[group.index]
            wanted.append("any" if "B" in lying.states else dim.size * total)
        if len(wanted) == value.dim() and all(
            want in (size, "any") for want, size in zip(wanted, value.shape, strict=True)
        ):
            return None
        return f"is of shape {list(value.shape)}, not {wanted}"


def _watch(module: Module, crossings: Sequence[Lying], checker: _Checker) -> None:
    forward = inner_forward(module)
    _, *names = inspect.signature(type(module).forward).parameters
    inward = [lying for lying in crossings if lying.inward]
    outward = [lying for lying in crossings if not lying.inward]

    def watched(*args: Any, **kwargs: Any) -> Any:
        values: Mapping[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        for lying in inward:
            checker.check(lying, values.get(lying.parameter))
        result = forward(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        for lying, value in zip(outward, results, strict=True):
            checker.check(lying, value)
        return result

    vars(module)["forward"] = watched


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
