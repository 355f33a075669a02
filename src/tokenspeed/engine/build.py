"""Puts an engine together: files, model, pool, planes."""

from collections import deque
from functools import cache, partial

import torch

from tokenspeed import loader
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, EngineConfig, SchedulerConfig
from tokenspeed.core.errors import ConfigError
from tokenspeed.distributed import Mesh, Place
from tokenspeed.engine.assembly import make_runner, mesh_of, open_model
from tokenspeed.engine.core import Engine, EngineCore
from tokenspeed.engine.drafting import load_draft, open_draft
from tokenspeed.engine.facts import EngineInfo
from tokenspeed.engine.pace import learn_drafts, learn_pace, tps_alone
from tokenspeed.engine.rank_launch import check_ranks
from tokenspeed.engine.ranks import GroupRunner, RankGroup
from tokenspeed.engine.sizing import (
    PROPOSAL_LENGTH_MAX,
    memory_share_size_bytes,
    pages_that_fit,
    step_drafts_max,
)
from tokenspeed.execution import Runner, give_back_memory
from tokenspeed.grammar import ConstraintCompiler, TokenTable
from tokenspeed.kernels.cpu import WeightMemory
from tokenspeed.modeling import ModelConfig, build_model

__all__ = ["build_engine"]


def build_engine(
    config: EngineConfig,
    *,
    progress: loader.Progress | None = None,
    memory: WeightMemory | None = None,
    learn: bool = True,
) -> Engine:
    """Find, verify and load a model, and make it ready to step.

    Args:
        config: the model, and how it is to run.
        progress: told how far it is.
        memory: where packed weights go, where some was taken ahead.
        learn: whether to learn now what is in `Engine.learning` else.

    Raises:
        ModelError: the model cannot be had, read or run.
        ConfigError: the configuration does not suit the model or the machine.
        KernelError: a forced kernel cannot run.
        EngineError: a rank did not come, or died as it started.
    """
    mesh = mesh_of(config)
    check_ranks(config, mesh)
    # Ranks of this host start while this one looks for the model.
    group = RankGroup(config, mesh) if mesh.world > 1 else None
    try:
        engine = _build(config, mesh, group, progress, memory)
        if learn:
            deque(engine.learning, maxlen=0)
        return engine
    except BaseException:
        if group is not None:
            group.end()
        raise


def _build(
    config: EngineConfig,
    mesh: Mesh,
    group: RankGroup | None,
    progress: loader.Progress | None,
    memory: WeightMemory | None,
) -> Engine:
    place = Place() if group is None else group.place
    opened = open_model(config, place=place, progress=progress, memory=memory)
    files, checkpoint, model_config = opened.files, opened.checkpoint, opened.config
    context_max = _context_max(config, model_config)
    # On the meta device a model has shapes and no memory: enough to know what it will take. The
    # first rank's shares are the largest.
    shape = build_model(
        model_config,
        dtype=opened.dtype,
        device=torch.device("meta"),
        kernels=opened.kernels,
        mesh=mesh,
    )
    specs = shape.kv_specs()
    weights_size_bytes = shape.planned_size_bytes(
        checkpoint.size_bytes, plain=checkpoint.plain_names
    )
    memory_size_bytes = memory_share_size_bytes(config, place)
    if memory is not None:
        memory_size_bytes += memory.taken_size_bytes
    if group is not None:
        memory_size_bytes = min(memory_size_bytes, group.await_opened(opened))
    draft = open_draft(
        config,
        opened,
        shape,
        weights_size_bytes=weights_size_bytes,
        available_size_bytes=memory_size_bytes,
        progress=progress,
    )
    # A head's KV lie in the target's pages.
    all_specs = (*specs, *draft.specs) if draft is not None and draft.head else specs
    draft_size_bytes = draft.weights_size_bytes + draft.pages_size_bytes if draft else 0
    pages = pages_that_fit(
        config,
        all_specs,
        weights_size_bytes=weights_size_bytes + draft_size_bytes,
        context_max=context_max,
        available_size_bytes=memory_size_bytes,
    )
    page_size_bytes = sum(spec.token_size_bytes for spec in all_specs) * config.page_size
    host_pages = config.host_cache_size_bytes // page_size_bytes
    overlap_depth = config.overlap_depth
    if overlap_depth is None:
        # A CPU runs the forward on the very cores that would plan meanwhile; the other ranks get a
        # step's tokens with the next plan.
        overlap_depth = 1 if opened.device.type == "cuda" and group is None else 0
    scheduler_config = SchedulerConfig(
        groups=tuple(
            CacheGroup(
                kind=spec.kind,
                pages=pages,
                host_pages=host_pages,
                window=spec.window,
            )
            for spec in specs
        ),
        # A page of all ranks that share a context.
        page_size=config.page_size * config.cp,
        slots_max=config.max_running,
        step_tokens_max=config.max_step_tokens,
        context_max=context_max,
        overlap_depth=overlap_depth,
        prefix_cache=config.prefix_cache,
        tps_floor=config.tps_floor,
        queue_timeout_us=(
            None if config.queue_timeout_s is None else int(config.queue_timeout_s * 1e6)
        ),
        step_drafts_max=step_drafts_max(config),
        draft_memory_size_bytes=config.draft_memory_size_bytes,
        step_proposals_max=step_drafts_max(config) if draft else 0,
        proposal_length_max=min(PROPOSAL_LENGTH_MAX, step_drafts_max(config)) if draft else 0,
        proposal_window=draft.window if draft else 0,
    )
    if group is not None:
        group.set_up(scheduler_config)
    model, pools, drafting, own_runner = make_runner(
        opened,
        scheduler_config,
        mesh=mesh,
        place=place,
        progress=progress,
        load_draft=(
            None
            if draft is None
            else partial(load_draft, draft, scheduler_config, progress=progress)
        ),
    )
    runner: Runner | GroupRunner = own_runner
    if group is not None:
        group.await_loaded()
        runner = GroupRunner(own_runner, group, slots_max=scheduler_config.slots_max)
    runner.warm_up()
    scheduler = Scheduler(scheduler_config)
    if config.tps_floor is not None or config.queue_timeout_s is not None:
        learn_pace(runner, scheduler_config, scheduler)
    # Whoever serves texts reads the tokenizer; this side needs it for constraints alone.
    tokenizer = cache(lambda: loader.Tokenizer(files.tokenizer_dir))
    special = loader.SpecialTokens.read(files.tokenizer_dir) or tokenizer().special
    core = EngineCore(
        scheduler,
        runner,
        eos_token_ids=special.eos,
        overlap_depth=overlap_depth,
        seed=config.seed,
        constraints=ConstraintCompiler(
            lambda: _token_table(tokenizer(), model_config.vocab_size),
            lambda text: tokenizer().encode(text.decode(errors="replace")),
        ),
    )
    info = EngineInfo(
        model_name=config.served_model_name or files.name,
        architecture=model_config.architecture,
        model_type=checkpoint.hf_config["model_type"],
        model_path=str(files.path),
        tokenizer_dir=str(files.tokenizer_dir),
        quantisation=checkpoint.quantisation,
        dtype=opened.dtype_name,
        vocab_size=model_config.vocab_size,
        context_max=context_max,
        eos_token_ids=list(special.eos),
        bos_token_id=special.bos,
        pad_token_id=special.pad,
        default_sampling=checkpoint.sampling_defaults,
        pages=pages,
        page_size=scheduler_config.page_size,
        slots_max=config.max_running,
        step_tokens_max=config.max_step_tokens,
        overlap_depth=overlap_depth,
        weights_size_bytes=model.weights_size_bytes
        + (drafting.model.weights_size_bytes if drafting else 0),
        kv_size_bytes=pools.size_bytes + (drafting.pools.size_bytes if drafting else 0),
        tps_floor=config.tps_floor,
        tps_alone=None if config.tps_floor is None else tps_alone(scheduler, scheduler_config),
    )
    # What loading needed and nothing does from here on.
    if memory is not None:
        memory.give_back()
    give_back_memory()
    return Engine(
        core=core,
        info=info,
        learning=learn_drafts(runner, scheduler_config, scheduler),
        check=None if group is None else group.check,
    )


def _token_table(tokenizer: "loader.Tokenizer", vocabulary: int) -> TokenTable:
    """What the tokens that have logits stand for."""
    return TokenTable(
        texts=[tokenizer.bytes_of(token) for token in range(vocabulary)],
        special=sorted(token for token in tokenizer.special_token_ids if token < vocabulary),
        ends=[token for token in tokenizer.eos_token_ids if token < vocabulary],
    )


def _context_max(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.context_max
    if config.max_context is None:
        return limit
    if config.max_context > limit:
        raise ConfigError(
            f"--max-context is {config.max_context}, but the model was made for {limit} tokens; "
            f"give {limit} or less"
        )
    return config.max_context
