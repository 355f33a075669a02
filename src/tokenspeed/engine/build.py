"""Puts an engine together: files, model, pool, planes."""

import torch

from tokenspeed import loader
from tokenspeed.cache import KVPools
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, EngineConfig, SchedulerConfig
from tokenspeed.core.errors import ConfigError
from tokenspeed.engine.core import Engine, EngineCore
from tokenspeed.engine.pace import learn_pace, tps_alone
from tokenspeed.engine.sizing import available_memory_size_bytes, pages_that_fit
from tokenspeed.engine.wire import EngineInfo
from tokenspeed.execution import Runner, resolve_dtype, usable_cpu_count
from tokenspeed.grammar import ConstraintCompiler, TokenTable
from tokenspeed.kernels import PACKED, QUANTISED_ROWS, KernelSelector, load_plugins
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.modeling import ModelConfig, build_model

__all__ = ["build_engine"]


def build_engine(config: EngineConfig, *, progress: loader.Progress | None = None) -> Engine:
    """Find, verify and load a model, and make it ready to step.

    Raises:
        ModelError: the model cannot be had, read or run.
        ConfigError: the configuration does not suit the model or the machine.
        KernelError: a forced kernel cannot run.
    """
    files = loader.resolve(config.model, progress=progress)
    checkpoint = loader.open_checkpoint(files)
    model_config = ModelConfig.from_hf(checkpoint.hf_config)
    context_max = _context_max(config, model_config)
    device = torch.device(config.device)
    dtype = resolve_dtype(config.dtype, device)

    load_plugins()
    dtype_name = str(dtype).removeprefix("torch.")
    kernels = KernelSelector(
        device=device,
        dtype=dtype,
        overrides=config.kernels,
        weight_formats=(
            *((PACKED,) if checkpoint.packable else ()),
            f"{dtype_name}_panels",
            dtype_name,
        ),
        kv_formats=_kv_formats(dtype_name, config.page_size),
        activation_formats=(QUANTISED_ROWS,),
        runtime=start_runtime(threads=config.threads or usable_cpu_count()),
    )
    # On the meta device a model has shapes and no memory: enough to know what it will take.
    shape = build_model(model_config, dtype=dtype, device=torch.device("meta"), kernels=kernels)
    weights_size_bytes = shape.planned_size_bytes(checkpoint.size_bytes)
    specs = shape.kv_specs()
    pages = pages_that_fit(
        config,
        specs,
        weights_size_bytes=weights_size_bytes,
        context_max=context_max,
        available_size_bytes=available_memory_size_bytes(),
    )

    model = build_model(model_config, dtype=dtype, device=device, kernels=kernels)
    model.load_weights(checkpoint.blocks(progress=progress))
    page_size_bytes = sum(spec.token_size_bytes for spec in specs) * config.page_size
    host_pages = config.host_cache_size_bytes // page_size_bytes
    pools = KVPools(
        specs, pages=pages, page_size=config.page_size, device=device, host_pages=host_pages
    )
    overlap_depth = config.overlap_depth
    if overlap_depth is None:
        # A CPU runs the forward on the very cores that would plan meanwhile.
        overlap_depth = 1 if device.type == "cuda" else 0
    scheduler_config = SchedulerConfig(
        groups=(CacheGroup(pages=pages, host_pages=host_pages),),
        page_size=config.page_size,
        slots_max=config.max_running,
        step_tokens_max=config.max_step_tokens,
        context_max=context_max,
        overlap_depth=overlap_depth,
        prefix_cache=config.prefix_cache,
        tps_floor=config.tps_floor,
        queue_timeout_us=(
            None if config.queue_timeout_s is None else int(config.queue_timeout_s * 1e6)
        ),
    )
    runner = Runner(model, pools, scheduler_config, device=device, threads=config.threads)
    runner.warm_up()
    scheduler = Scheduler(scheduler_config)
    if config.tps_floor is not None or config.queue_timeout_s is not None:
        learn_pace(runner, scheduler_config, scheduler)
    tokenizer = loader.Tokenizer(files.tokenizer_dir)
    core = EngineCore(
        scheduler,
        runner,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        overlap_depth=overlap_depth,
        seed=config.seed,
        constraints=ConstraintCompiler(
            lambda: _token_table(tokenizer, model_config.vocab_size),
            lambda text: tokenizer.encode(text.decode(errors="replace")),
        ),
    )
    info = EngineInfo(
        model_name=config.served_model_name or files.name,
        architecture=model_config.architecture,
        model_type=checkpoint.hf_config["model_type"],
        model_path=str(files.path),
        tokenizer_dir=str(files.tokenizer_dir),
        quantisation=checkpoint.quantisation,
        dtype=dtype_name,
        vocab_size=model_config.vocab_size,
        context_max=context_max,
        eos_token_ids=list(tokenizer.eos_token_ids),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        default_sampling=checkpoint.sampling_defaults,
        pages=pages,
        page_size=config.page_size,
        slots_max=config.max_running,
        step_tokens_max=config.max_step_tokens,
        overlap_depth=overlap_depth,
        weights_size_bytes=model.weights_size_bytes,
        kv_size_bytes=pools.size_bytes,
        tps_floor=config.tps_floor,
        tps_alone=None if config.tps_floor is None else tps_alone(scheduler, scheduler_config),
    )
    return Engine(core=core, info=info)


def _token_table(tokenizer: loader.Tokenizer, vocabulary: int) -> TokenTable:
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


def _kv_formats(dtype_name: str, page_size: int) -> tuple[str, ...]:
    """Interleaved pages need whole vectors of positions."""
    interleaved = (f"interleaved_{dtype_name}",) if page_size % 16 == 0 else ()
    return (*interleaved, dtype_name)
