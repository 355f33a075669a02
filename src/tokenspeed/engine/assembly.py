"""What every rank of an engine does alike: find the model, choose kernels, load, make a runner."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tokenspeed import loader
from tokenspeed.cache import KVPools
from tokenspeed.core.config import EngineConfig, SchedulerConfig
from tokenspeed.core.errors import ConfigError
from tokenspeed.distributed import Mesh, Place, share
from tokenspeed.execution import Drafting, Runner, resolve_dtype, usable_cpu_count
from tokenspeed.kernels import (
    PACKED_FLOAT4,
    PACKED_GROUPS,
    QUANTISED_ROWS,
    KernelSelector,
    load_plugins,
)
from tokenspeed.kernels.cpu import WeightMemory, start_runtime
from tokenspeed.kernels.kv_formats import kv_formats
from tokenspeed.kernels.quantised import FLOAT4_GROUPS, INT4_GROUPS
from tokenspeed.kernels.rows import ContextShare
from tokenspeed.modeling import Model, ModelConfig, build_model

__all__ = ["OpenedModel", "make_runner", "mesh_of", "open_model", "packed_formats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model that was found and not loaded.

    Attributes:
        files, checkpoint, config: its files, and what they say.
        device, dtype: where it will run, and its element type.
        kernels: chooses its kernels.
        threads: CPU threads of this rank.
    """

    files: loader.ModelFiles
    checkpoint: "loader.Checkpoint"
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    kernels: KernelSelector
    threads: int

    @property
    def dtype_name(self) -> str:
        """The element type's name."""
        return str(self.dtype).removeprefix("torch.")


def mesh_of(config: EngineConfig) -> Mesh:
    """The ranks of an engine.

    Raises:
        ConfigError: its degrees do not fit together.
    """
    return Mesh(tp=config.tp, ep=config.ep, cp=config.cp)


def open_model(
    config: EngineConfig,
    *,
    place: Place,
    progress: loader.Progress | None = None,
    beside: OpenedModel | None = None,
    memory: WeightMemory | None = None,
) -> OpenedModel:
    """Find and check a model, and choose what computes it on this rank.

    Args:
        config: names the model, and says how it is to run.
        place: which rank this is.
        progress: told how far it is.
        beside: a model that it takes turns with, on the same threads.
        memory: where packed weights go, where some was taken ahead.

    Raises:
        ModelError: the model cannot be had, read or run.
        ConfigError: the configuration does not suit the machine.
    """
    files = loader.resolve(config.model, progress=progress)
    checkpoint = loader.open_checkpoint(files)
    model_config = ModelConfig.from_hf(checkpoint.hf_config)
    device = _device(config, place)
    dtype = resolve_dtype(config.dtype, device)
    load_plugins()
    dtype_name = str(dtype).removeprefix("torch.")
    # All engines of this host share its CPUs, and so do their ranks.
    sharing = config.dp * place.local_ranks
    threads = config.threads or max(1, usable_cpu_count() // sharing)
    if beside is not None:
        runtime, threads = beside.kernels.runtime, beside.threads
    else:
        with _own_cpus(sharing, config.dp_rank * place.local_ranks + place.local_rank):
            runtime = start_runtime(threads=threads, memory=memory)
    kernels = KernelSelector(
        device=device,
        dtype=dtype,
        overrides=config.kernels,
        weight_formats=(
            *packed_formats(checkpoint.packed_format),
            f"{dtype_name}_panels",
            dtype_name,
        ),
        kv_formats=_kv_formats(
            dtype_name if config.kv_dtype == "auto" else config.kv_dtype, config.page_size
        ),
        activation_formats=(QUANTISED_ROWS,),
        runtime=runtime,
        deterministic=config.deterministic,
    )
    return OpenedModel(
        files=files,
        checkpoint=checkpoint,
        config=model_config,
        device=device,
        dtype=dtype,
        kernels=kernels,
        threads=threads,
    )


def make_runner(
    opened: OpenedModel,
    config: SchedulerConfig,
    *,
    mesh: Mesh,
    place: Place,
    progress: loader.Progress | None = None,
    load_draft: Callable[[Model], Drafting] | None = None,
) -> tuple[Model, KVPools, Drafting | None, Runner]:
    """Build and load a model, its KV pools, what proposes drafts to it, and its runner.

    Args:
        opened: the model.
        config: sizes of pools and steps, the same on all ranks.
        mesh: the ranks.
        place: which of them this is, and where it finds the others.
        progress: told of the bytes read.
        load_draft: loads what proposes drafts to this model, where something does.

    Raises:
        ModelError: the weights cannot be read, or do not fit the model.
        ConfigError: the model cannot be divided over so many ranks.
        EngineError: other ranks did not come.
    """
    model = build_model(
        opened.config,
        dtype=opened.dtype,
        device=opened.device,
        kernels=opened.kernels,
        mesh=mesh,
        rank=place.rank,
        store=place.store,
        address=place.address,
    )
    model.load_weights(opened.checkpoint.blocks(progress=progress))
    group = config.groups[0]
    share = _context_share(mesh, place.rank)
    pools = KVPools(
        model.kv_specs(),
        pages=group.pages,
        page_size=config.page_size // mesh.cp,
        device=opened.device,
        host_pages=group.host_pages,
        # What other ranks keep goes to a page of its own.
        padded=opened.device.type == "cuda" or share is not None,
    )
    drafting = load_draft and load_draft(model)
    runner = Runner(
        model,
        pools,
        config,
        device=opened.device,
        threads=opened.threads,
        share=share,
        drafting=drafting,
    )
    return model, pools, drafting, runner


def _context_share(mesh: Mesh, rank: int) -> ContextShare | None:
    if mesh.cp == 1:
        return None
    return ContextShare(index=mesh.index(rank, mesh.cells_of("cp")), ranks=mesh.cp)


def _device(config: EngineConfig, place: Place) -> torch.device:
    """Where this rank runs; one alone leaves the choice of a GPU to torch.

    Raises:
        ConfigError: there is no GPU for it.
    """
    if config.device == "cpu":
        return torch.device(config.device)
    # A PyTorch without CUDA counts none.
    gpus = torch.cuda.device_count()
    wanted = 0 if place.store is None else place.device_index
    if wanted >= gpus:
        fewer = ", or lower --tp and --cp" if gpus else ""
        raise ConfigError(
            f"--device cuda needs {wanted + 1} GPU{'s' if wanted else ''} here, but PyTorch "
            f"{torch.__version__} finds {gpus}: choose --device cpu, install a PyTorch for your "
            f"driver{fewer}"
        )
    if place.store is None:
        return torch.device(config.device)
    device = torch.device(config.device, place.device_index)
    torch.cuda.set_device(device)
    return device


def packed_formats(name: str | None) -> tuple[str, ...]:
    """In which matrices can be had beside dense ones, best first.

    Args:
        name: the checkpoint's `packed_format`.
    """
    if name is None:
        return ()
    on_cpus = {INT4_GROUPS: PACKED_GROUPS, FLOAT4_GROUPS: PACKED_FLOAT4}.get(name)
    return (name,) if on_cpus is None else (name, on_cpus)


def _kv_formats(dtype_name: str, page_size: int) -> tuple[str, ...]:
    formats = kv_formats(dtype_name, page_size=page_size)
    if not formats:
        raise ConfigError(
            f"--kv-dtype {dtype_name} needs pages of a multiple of 16 positions, but --page-size "
            f"is {page_size}"
        )
    return formats


@contextmanager
def _own_cpus(ranks: int, rank: int) -> Iterator[None]:
    """Let threads that are started meanwhile run on this rank's share of the CPUs only.

    Native threads are pinned where they start, and those of two ranks must not meet.
    """
    if ranks == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    first, end = share(len(before), ranks, rank)
    if end > first:
        os.sched_setaffinity(0, sorted(before)[first:end])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
