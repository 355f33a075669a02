"""Filling a model's weights from the tensors of a checkpoint."""

import re
from collections.abc import Iterable, Mapping, Sequence

from tokenspeed.core.errors import CorruptCheckpoint
from tokenspeed.kernels import Stored
from tokenspeed.modeling.module import Weight

__all__ = ["fill_weights", "places_of"]

_NUMBER = re.compile(r"(?<=[.:])\d+(?=\.|$)")
_NAMES_SHOWN = 8


def fill_weights(
    weights: Mapping[str, Weight],
    tensors: Iterable[tuple[str, Stored]],
    *,
    names: Mapping[str, str | Sequence[str]],
    ignored: frozenset[str],
) -> None:
    """Take each tensor to its place, in the format that it has there.

    Args:
        weights: the model's, by our names. Of the names of a shared weight the first counts;
            a checkpoint may bring the others too, as a copy.
        tensors: (checkpoint name, tensor) pairs.
        names: checkpoint name to `our name` or `our name:part`, or to several of them where one
            tensor has what several weights take; `*` stands for a number.
        ignored: checkpoint names to pass over, with `*` for numbers.

    Raises:
        CorruptCheckpoint: after all were seen, if any was missing, unexpected, repeated or
            misshapen.
    """
    wanted = {}
    copies: set[str] = set()
    seen: set[int] = set()
    for name, weight in weights.items():
        keys = {f"{name}:{part}" if part else name: (weight, part) for part in weight.parts}
        if id(weight) in seen:
            copies.update(keys)
        else:
            seen.add(id(weight))
            wanted.update(keys)
    missing = dict.fromkeys(wanted)
    unexpected = []
    misshapen = []
    for name, tensor in tensors:
        if _NUMBER.sub("*", name) in ignored:
            continue
        for ours in places_of(name, names):
            if ours in copies:
                continue
            if ours not in missing:
                unexpected.append(name)
                continue
            del missing[ours]
            weight, part = wanted[ours]
            shape = weight.part_shape(part)
            if shape != tuple(tensor.shape):
                misshapen.append(f"{name} is {list(tensor.shape)}, not {list(shape)}")
                continue
            weight.fill(part, tensor)
    theirs = {ours: pattern for pattern, targets in names.items() for ours in _each(targets)}
    problems = {
        "missing": list(dict.fromkeys(_checkpoint_name(ours, theirs) for ours in missing)),
        "unexpected or repeated": list(dict.fromkeys(unexpected)),
        "misshapen": list(dict.fromkeys(misshapen)),
    }
    if any(problems.values()):
        raise CorruptCheckpoint(
            "the checkpoint does not fit its architecture: "
            + "; ".join(f"{what}: {_listed(items)}" for what, items in problems.items() if items)
        )


def places_of(name: str, names: Mapping[str, str | Sequence[str]]) -> list[str]:
    """Where a tensor goes, as `our name` or `our name:part`.

    Args:
        name: the checkpoint's.
        names: as of `fill_weights`.
    """
    targets = _each(names.get(_NUMBER.sub("*", name), ""))
    return [_with_numbers(target, _NUMBER.findall(name)) for target in targets]


def _each(targets: str | Sequence[str]) -> Sequence[str]:
    return (targets,) if isinstance(targets, str) else targets


def _with_numbers(pattern: str, numbers: list[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def _checkpoint_name(ours: str, theirs: Mapping[str, str]) -> str:
    pattern = theirs.get(_NUMBER.sub("*", ours))
    return _with_numbers(pattern, _NUMBER.findall(ours)) if pattern else ours


def _listed(items: list[str]) -> str:
    shown = ", ".join(items[:_NAMES_SHOWN])
    more = len(items) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
