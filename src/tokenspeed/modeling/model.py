"""What every model offers, and how one is built.

Legend: S sampled tokens, V vocabulary.
"""

import logging
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from tokenspeed.core.config import KVSpec
from tokenspeed.core.errors import ConfigError
from tokenspeed.distributed import LOOPBACK, Mesh, Store, connect
from tokenspeed.kernels import (
    GROUPED,
    PACKED,
    PANELS,
    QUANTISED,
    KernelSelector,
    PackedGroups,
    Stored,
)
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.compiler import (
    Program,
    StepInProgress,
    Tracer,
    check_placements,
    compile_module,
    groups_to_check,
    install,
    modules_of,
)
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.expert_weight import ExpertWeight
from tokenspeed.modeling.layers import Attention, AttentionLayer, LatentAttention
from tokenspeed.modeling.models.registry import model_class
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.weights import fill_weights, places_of

__all__ = ["Model", "build_model", "compile_model"]

_log = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# No type of a checkpoint's weights grows by more when it is packed.
PACKING_GROWTH_MAX = 1.06
# Bytes of an element of a checkpoint's groups where it takes five bits.
GROUP_ELEMENT_SIZE = 22 / 32


class Model(Module):
    """A language model of one architecture.

    Attributes:
        weight_names: Hugging Face's tensor names to ours. `*` stands for a number, the same on
            both sides; `name:part` is a part of a stacked weight. Several names are for a tensor
            of which several weights take rows.
        ignored_names: tensors some checkpoints carry that the equations do not use.
        later_layers_ignored: whether layers behind the model's own are passed over: networks that
            predict further tokens, which are kept as one more layer.
        config: its sizes.
        ranks: how many run it together.
        exchanges: of several, what these exchanges know of a step, where a recording can keep them.
    """

    weight_names: ClassVar[Mapping[str, str | Sequence[str]]]
    ignored_names: ClassVar[frozenset[str]] = frozenset()
    later_layers_ignored: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, kernels: KernelSelector) -> None:
        self.config = config
        self.kernels = kernels
        self.ranks = 1
        self.exchanges: StepInProgress | None = None

    @abstractmethod
    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """One pass over a mixed batch: writes its KV, gives logits_SV in float32."""

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """The KV each cache group keeps of a token on this rank.

        Layers that see everything are one group, the first; layers with a window another.
        """
        groups: dict[int, list[KVSpec]] = {}
        for (group, _), module in zip(self.kv_places, self._attentions, strict=True):
            groups.setdefault(group, []).append(module.kv_spec(self.kernels.kv_dtype_name))
        return tuple(
            replace(groups[group][0], layers=len(groups[group])) for group in sorted(groups)
        )

    @cached_property
    def kv_places(self) -> tuple[tuple[int, int], ...]:
        """The cache group of each layer of attention, and its number within the group."""
        found = self._attentions
        windows = sorted({module.window for module in found}, key=lambda window: window or 0)
        counts = dict.fromkeys(windows, 0)
        places = []
        for module in found:
            places.append((windows.index(module.window), counts[module.window]))
            counts[module.window] += 1
        return tuple(places)

    @property
    def _attentions(self) -> tuple[AttentionLayer, ...]:
        kinds = (Attention, LatentAttention)
        return tuple(module for _, module in modules_of(self) if isinstance(module, kinds))

    @property
    def weights_size_bytes(self) -> int:
        """Bytes of all weights; packed ones count once they are loaded."""
        distinct = {id(weight): weight for _, weight in self.weights()}
        return sum(weight.size_bytes for weight in distinct.values())

    def planned_size_bytes(self, checkpoint_size_bytes: int, *, plain: Iterable[str] = ()) -> int:
        """Bytes that the weights will take, before any is loaded.

        Args:
            checkpoint_size_bytes: what they take where they come from.
            plain: the checkpoint's names of what is not quantised beside what is.
        """
        distinct = {id(weight): weight for _, weight in self.weights()}.values()
        elements = [
            (math.prod(weight.local_shape), math.prod(weight.shape))
            for weight in distinct
            if weight.format_name == PACKED or weight.format_name in QUANTISED
        ]
        held = sum(local for local, _ in elements)
        # A rank packs its share of what is to be packed.
        packed = held / sum(whole for _, whole in elements) if elements else 0.0
        panels_size_bytes = sum(
            math.prod(weight.local_shape) * self.kernels.dtype.itemsize
            for weight in distinct
            if weight.format_name in PANELS
        )
        places = {place for name in plain for place in places_of(name, self.weight_names)}
        grouped = {name: weight for name, weight in self.weights() if weight.format_name in GROUPED}
        groups = sum(
            math.prod(weight.local_shape) * self._grouped_element_size(name, weight, places)
            for name, weight in grouped.items()
        )
        # Experts of which a part is not quantised are dense on a GPU, all of a product's together.
        mixed = sum(
            math.prod(weight.local_shape) * self.kernels.dtype.itemsize
            for name, weight in self.weights()
            if isinstance(weight, ExpertWeight) and weight.format_name in QUANTISED
            if any(f"{name}:{part}" in places for part in weight.parts)
        )
        return self.weights_size_bytes + int(
            PACKING_GROWTH_MAX
            * (packed * checkpoint_size_bytes + panels_size_bytes + groups + mixed)
        )

    def _grouped_element_size(self, name: str, weight: Weight, plain: AbstractSet[str]) -> float:
        """Bytes of an element, of which some may be no quantised ones."""
        parts = {f"{name}:{part}" if part else name: part for part in weight.parts}
        left = sum(math.prod(weight.part_shape(parts[key])) for key in plain & parts.keys())
        dense = left / math.prod(weight.shape)
        return dense * self.kernels.dtype.itemsize + (1 - dense) * GROUP_ELEMENT_SIZE

    def load_weights(self, weights: Iterable[tuple[str, Stored]]) -> None:
        """Fill the weights from (Hugging Face name, tensor) pairs of any order and type.

        Of each tensor this rank's share is read and copied, and let go before the next is asked
        for.

        Raises:
            CorruptCheckpoint: tensors are missing, unexpected or misshapen; names them.
        """
        weights = (pair for name, stored in weights for pair in self.parts_of(name, stored))
        if self.later_layers_ignored:
            weights = (pair for pair in weights if self._layer_of(pair[0]) < self.config.layers)
        fill_weights(
            dict(self.weights()), weights, names=self.weight_names, ignored=self.ignored_names
        )
        dequantised = sum(len(matrix.dequantised) for matrix in self._in_groups())
        if dequantised:
            _log.warning(
                "%d quantised matrices take the memory of dense ones: no packed format has their "
                "scales or groups exactly",
                dequantised,
            )

    def _in_groups(self) -> Iterator[PackedGroups]:
        for weight in {id(weight): weight for _, weight in self.weights()}.values():
            if weight.format_name in GROUPED:
                data: Any = weight.data
                yield from (data,) if isinstance(data, PackedGroups) else data

    def parts_of(self, name: str, stored: Stored) -> Iterable[tuple[str, Stored]]:
        """What `weight_names` names of a checkpoint's tensor: itself, where a family does not keep
        things in one tensor that others have apart."""
        return ((name, stored),)

    def _layer_of(self, name: str) -> int:
        found = _LAYER.match(name)
        return int(found[1]) if found else 0


def compile_model(
    config: ModelConfig, *, kernels: KernelSelector, mesh: Mesh, rank: int = 0
) -> Program:
    """What a model does between the ranks of a mesh; needs no weights.

    Args:
        config: which model.
        kernels: answers what formats weights have.
        mesh: the ranks.
        rank: whose shapes are traced; the program is the same for all.

    Raises:
        UnsupportedModel: no class computes the architecture.
        PlacementError: its modules do not fit together on this mesh.
        ConfigError: a dimension cannot be divided over so many ranks.
    """
    kernels = _among(kernels, mesh)
    return compile_module(
        lambda rules: model_class(config.architecture)(config, rules),
        _symbols,
        kernels=kernels,
        mesh=mesh,
        rank=rank,
    )


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: KernelSelector,
    mesh: Mesh | None = None,
    rank: int = 0,
    store: Store | None = None,
    address: str = LOOPBACK,
    check: bool = False,
) -> Model:
    """A model with its kernels chosen, its program in place and its weights yet to load.

    Args:
        config: what to build.
        dtype: element type of weights, activations and KV.
        device: where the weights lie; "meta" for a model that has shapes and sizes only.
        kernels: chooses kernels for this dtype.
        mesh: the ranks that run it together; one rank if None.
        rank: which of them this is.
        store: where they find each other, all of them at once; None for a model whose sizes are
            wanted and that is not run.
        address: of this host, where other ranks reach it.
        check: whether every tensor that crosses a boundary is held against the program, which
            takes many times as long.

    Raises:
        UnsupportedModel: no class computes the architecture.
        PlacementError: its modules do not fit together on this mesh.
        KernelError: an op has no kernel that can run here.
        ConfigError: the selector is for another dtype, or a dimension cannot be divided.
        EngineError: other ranks did not come.
    """
    if kernels.dtype != dtype:
        raise ConfigError(f"kernels were selected for {kernels.dtype}, but the model is {dtype}")
    if mesh is not None and mesh.world > 1:
        kernels = _among(kernels.with_tensors_only(), mesh)
    with device:
        model = model_class(config.architecture)(config, kernels)
    if mesh is not None and mesh.world > 1:
        program = compile_model(config, kernels=kernels, mesh=mesh, rank=rank)
        program.place_weights(model, rank)
        model.ranks = mesh.world
        if store is not None:
            wanted = {*program.groups, *(groups_to_check(program) if check else ())}
            groups = connect(
                mesh, rank, sorted(wanted), store=store, address=address, device=device
            )
            known = StepInProgress()
            if check:
                check_placements(model, program, groups, known)
            install(model, program, groups, counts=_counts, known=known)
            if not check and program.keeps_tokens_together and device.type == "cpu":
                model.exchanges = known
    return model


def _among(kernels: KernelSelector, mesh: Mesh) -> KernelSelector:
    return kernels.with_context_shared() if mesh.cp > 1 else kernels


class _Unplaced:
    """What a forward is given beside tensors of the data flow: rows of a cache group, its pools."""

    def __getattr__(self, name: str) -> "_Unplaced":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def layer(self, group: int, layer: int) -> tuple["_Unplaced", "_Unplaced"]:
        """K and V of a layer, as `KVStorage` has it."""
        return self, self

    def latents(self, group: int, layer: int) -> "_Unplaced":
        """Latents of a layer, as `KVStorage` has it."""
        return self


def _symbols(tracer: Tracer, twin: Model) -> tuple[object, ...]:
    """What a model is called with, for the compiler."""
    unplaced: Any = _Unplaced()
    batch = ForwardBatch(
        token_ids_T=tracer.input("T", dtype=torch.int64),  # type: ignore[arg-type]
        positions_T=tracer.input("T", dtype=torch.int64),  # type: ignore[arg-type]
        groups=(unplaced,) * len(twin.kv_specs()),
        sample_token_indices_S=tracer.input("S", dtype=torch.int64),  # type: ignore[arg-type]
    )
    return batch, unplaced


def _counts(batch: ForwardBatch, kv: KVStorage) -> Mapping[str, int]:
    tokens = len(batch.token_ids_T)
    sampled_S = batch.sample_token_indices_S
    return {"T": tokens, "S": tokens if sampled_S is None else len(sampled_S)}
