"""What a model would be on several ranks: its steps between them, and what each would hold.

No weights are read, and where only a `config.json` is at hand none need exist.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from tokenspeed import loader
from tokenspeed.core.errors import ConfigError
from tokenspeed.distributed import Mesh
from tokenspeed.engine.assembly import packed_formats
from tokenspeed.engine.sizing import RESERVE_SIZE_BYTES
from tokenspeed.execution import resolve_dtype
from tokenspeed.kernels import GROUPED, PACKED, KernelSelector, load_plugins
from tokenspeed.loader.files import read_json_object
from tokenspeed.loader.schemes import read_scheme
from tokenspeed.modeling import ModelConfig, build_model, compile_model
from tokenspeed.modeling.compiler import Step

__all__ = ["Fit", "Outline", "OutlineStep", "outline"]

_BLOCK = re.compile(r"(?<=\.)\d+(?=\.|$| )")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlineStep:
    """Transitions that are alike in several blocks.

    Attributes:
        before: the module in front of which they stand, `*` for a number; "the model" at its end.
        parameter: what they are done to.
        source: the module it comes from.
        kind: of collective, or "slice".
        ranks: how many take part.
        float32_sum: whether the sum goes into the addition before a norm without being rounded.
        count: how many there are of them in a forward pass.
        token_size_bytes: what a rank sends for each token, in all of them.
        sample_size_bytes: what it sends for each sampled token, in all of them.
    """

    before: str
    parameter: str
    source: str
    kind: str
    ranks: int
    float32_sum: bool
    count: int
    token_size_bytes: float
    sample_size_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Whether a rank's memory is enough.

    Attributes:
        memory_size_bytes: what it has.
        reserve_size_bytes: what is left to everything but weights and KV.
        tokens: how many tokens of KV fit beside the weights; 0 if the weights alone do not.
        fits: whether these are one context at least.
    """

    memory_size_bytes: int
    reserve_size_bytes: int
    tokens: int
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model on a mesh. Sizes are of the rank that holds the most, the first.

    Attributes:
        model, architecture, dtype: which.
        weights: how they would be held.
        ranks: of the mesh.
        tp, ep, dp, cp: its degrees.
        steps: in order of their first occurrence.
        collectives: of a forward pass.
        token_size_bytes: what a rank sends for each token of a step.
        sample_size_bytes: what it sends for each sampled one.
        weights_size_bytes: of a rank.
        kv_token_size_bytes: of a rank, for each token of context.
        context_max: tokens of a context.
        fit: whether it fits; None where no memory was given.
    """

    model: str
    architecture: str
    dtype: str
    weights: str
    ranks: int
    tp: int
    ep: int
    dp: int
    cp: int
    steps: tuple[OutlineStep, ...]
    collectives: int
    token_size_bytes: float
    sample_size_bytes: float
    weights_size_bytes: int
    kv_token_size_bytes: int
    context_max: int
    fit: Fit | None


def outline(
    model: str,
    mesh: Mesh,
    *,
    dtype: str = "auto",
    max_context: int | None = None,
    memory_size_bytes: int | None = None,
) -> Outline:
    """Compile a model for a mesh and add up what its ranks hold and send.

    Args:
        model: as `EngineConfig.model`, or a `config.json`, or a folder that has nothing else.
        mesh: the ranks.
        dtype: as `EngineConfig.dtype`.
        max_context: tokens of a context; the model's own limit if None.
        memory_size_bytes: of each rank; None if it is not to be looked at.

    Raises:
        ModelError: the model cannot be had, or is of no architecture that is computed here.
        ConfigError: it cannot be divided over so many ranks.
    """
    found = _described(model)
    config = ModelConfig.from_hf(found.hf_config)
    context_max = min(max_context or config.context_max, config.context_max)
    device = torch.device("cpu")
    element = resolve_dtype(dtype, device)
    element_name = str(element).removeprefix("torch.")
    load_plugins()
    formats = (*found.formats, f"{element_name}_panels", element_name)
    kernels = KernelSelector(device=device, dtype=element, weight_formats=formats)
    program = compile_model(config, kernels=kernels, mesh=mesh)
    shape = build_model(
        config, dtype=element, device=torch.device("meta"), kernels=kernels, mesh=mesh
    )
    weights_size_bytes = shape.planned_size_bytes(found.size_bytes, plain=found.plain_names)
    # Of ranks that share contexts each has a part of the positions.
    kv_token_size_bytes = -(-sum(spec.token_size_bytes for spec in shape.kv_specs()) // mesh.cp)
    moved = program.moved()
    fit = None
    if memory_size_bytes is not None:
        room = memory_size_bytes - weights_size_bytes - RESERVE_SIZE_BYTES
        tokens = max(0, room // kv_token_size_bytes)
        fit = Fit(
            memory_size_bytes=memory_size_bytes,
            reserve_size_bytes=RESERVE_SIZE_BYTES,
            tokens=tokens,
            fits=tokens >= context_max,
        )
    return Outline(
        model=found.name,
        architecture=config.architecture,
        dtype=element_name,
        weights=found.quantisation or element_name,
        ranks=mesh.world,
        tp=mesh.tp,
        ep=mesh.ep,
        dp=mesh.dp,
        cp=mesh.cp,
        steps=_alike(program.steps, mesh),
        collectives=len(program.collectives),
        token_size_bytes=float(moved["T"]),
        sample_size_bytes=float(moved["S"]),
        weights_size_bytes=weights_size_bytes,
        kv_token_size_bytes=kv_token_size_bytes,
        context_max=context_max,
        fit=fit,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """What is known of a model before its weights are read.

    Attributes:
        name: for people.
        hf_config: its configuration.
        size_bytes: of the weights, where they are; 0 where they are not at hand.
        quantisation: theirs, where they are packed.
        formats: that they may have then.
        plain_names: of what is not quantised beside what is, as far as is known.
    """

    name: str
    hf_config: dict[str, Any]
    size_bytes: int
    quantisation: str | None
    formats: tuple[str, ...]
    plain_names: frozenset[str]


def _described(model: str) -> _Described:
    path = Path(model)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (path / "config.json").exists():
        path = path / "config.json"
    if path.suffix == ".json":
        if not path.is_file():
            raise ConfigError(f"there is no file {model}")
        name = path.parent.resolve().name if path.name == "config.json" else path.stem
        hf_config = dict(read_json_object(path))
        scheme = read_scheme(hf_config)
        formats = packed_formats(scheme.format_name if scheme else None)
        return _Described(
            name=name,
            hf_config=hf_config,
            size_bytes=0,
            quantisation=scheme.name if scheme and {*GROUPED} & {*formats} else None,
            formats=formats,
            plain_names=frozenset(),
        )
    files = loader.resolve(model)
    checkpoint = loader.open_checkpoint(files)
    formats = packed_formats(checkpoint.packed_format)
    return _Described(
        name=files.name,
        hf_config=checkpoint.hf_config,
        size_bytes=checkpoint.size_bytes,
        quantisation=checkpoint.quantisation if {PACKED, *GROUPED} & {*formats} else None,
        formats=formats,
        plain_names=checkpoint.plain_names,
    )


def _alike(steps: tuple[Step, ...], mesh: Mesh) -> tuple[OutlineStep, ...]:
    found: dict[tuple[object, ...], list[Step]] = {}
    for step in steps:
        transition = step.transition
        key = (
            _BLOCK.sub("*", step.path),
            step.parameter,
            _BLOCK.sub("*", step.source),
            transition.kind,
            transition.cells,
            transition.wide,
        )
        found.setdefault(key, []).append(step)
    rows = []
    for same in found.values():
        first = same[0]
        moved = {"T": Fraction(0), "S": Fraction(0)}
        for step in same:
            if step.transition.symbol is not None:
                moved[step.transition.symbol[0]] += step.transition.moved
        rows.append(
            OutlineStep(
                before=_BLOCK.sub("*", first.path) or "the model",
                parameter=first.parameter,
                source=_BLOCK.sub("*", first.source),
                kind=first.transition.kind,
                ranks=mesh.size(first.transition.cells),
                float32_sum=first.transition.wide,
                count=len(same),
                token_size_bytes=float(moved["T"]),
                sample_size_bytes=float(moved["S"]),
            )
        )
    return tuple(rows)
