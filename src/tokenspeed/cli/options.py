"""The flags that `serve`, `chat` and `generate` share, and the configuration made of them."""

import enum
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError

__all__ = ["DEFAULT_MODEL", "LogLevel", "LogLevelOption", "parse_size", "takes_engine_flags"]

DEFAULT_MODEL = "smollm2-135m"

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", re.IGNORECASE)
# Whatever is below can be counted in 64 bits.
_SIZE_MAX_BYTES = 2**62
_SHOWN_MAX = 40
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


class LogLevel(enum.StrEnum):
    """How much is written to stderr."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Device(enum.StrEnum):
    """Where the model runs."""

    CPU = "cpu"
    CUDA = "cuda"


class DType(enum.StrEnum):
    """Element type of weights, activations and KV."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class ExecutorBackend(enum.StrEnum):
    """Who starts the ranks."""

    MP = "mp"
    TORCHRUN = "torchrun"
    RAY = "ray"


class KVDType(enum.StrEnum):
    """Element type of KV."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FLOAT8_E4M3FN = "float8_e4m3fn"


LogLevelOption = Annotated[
    LogLevel,
    typer.Option(help="How much to write to stderr; debug shows the traceback of an error."),
]


def parse_size(text: str, flag: str, *, least: int = 0) -> int:
    """Bytes of a size such as `2GiB`, `512MiB`, `1.5G` or `1000000`; an error names the flag.

    Raises:
        ConfigError: it is none, less than `least`, or more than any machine has.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{flag} {shortened(text)!r} is no size; write a number and a unit, such as 512MiB or "
            "2GiB"
        )
    number, unit = match.groups()
    size_bytes = float(number) * _UNITS[unit.upper().removesuffix("B")]
    if size_bytes >= _SIZE_MAX_BYTES:
        raise ConfigError(f"{flag} {shortened(text)!r} is more than any machine has")
    if size_bytes < least:
        raise ConfigError(f"{flag} {text!r} is less than {least} byte; write such as 512MiB")
    return int(size_bytes)


def shortened(text: str) -> str:
    """What was given, as far as a message should repeat it."""
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


def parse_kernels(choices: list[str]) -> dict[str, str]:
    """Kernel choices `OP=SOLUTION` by op.

    Raises:
        ConfigError: one is of another form, or an op is named twice.
    """
    kernels: dict[str, str] = {}
    for choice in choices:
        op, equals, solution = choice.partition("=")
        if not (op and equals and solution):
            raise ConfigError(
                f"--kernel {choice!r} must be OP=SOLUTION, such as attention.paged_mha=reference; "
                "`tokenspeed kernels list` names both"
            )
        if op in kernels:
            raise ConfigError(f"--kernel names {op} twice")
        kernels[op] = solution
    return kernels


def _engine_flags(
    *,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name the API knows the model by [default: the model's own].")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.CPU,
    dtype: Annotated[
        DType, typer.Option(help="Element type of weights, activations and KV.")
    ] = DType.AUTO,
    kv_dtype: Annotated[
        KVDType,
        typer.Option(
            help="Element type of KV: int8 holds nearly twice as many tokens, and on GPUs "
            "float8_e4m3fn does."
        ),
    ] = KVDType.AUTO,
    max_context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of one request and its answer [default: the model's]."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 64,
    max_step_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one step; less means shorter stalls.")
    ] = 512,
    page_size: Annotated[int, typer.Option(min=1, help="Token positions of one KV page.")] = 32,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the KV cache, as 2GiB [default: what fits]."),
    ] = None,
    host_cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of the host for KV that leaves a GPU [default: none]."
        ),
    ] = None,
    overlap_depth: Annotated[
        int | None,
        typer.Option(min=0, max=1, help="Steps planned ahead [default: by device]."),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse KV of shared prefixes.")
    ] = True,
    speculate: Annotated[
        str,
        typer.Option(
            metavar="auto|off|suffix|draft:MODEL",
            help="Tokens that steps verify beside the next one: suffix guesses from what was said "
            "before, draft:MODEL has a smaller model of the same tokenizer guess beside that, auto "
            "is whatever it can. The text is the same.",
        ),
    ] = "auto",
    draft_memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Memory of the texts that suffix guesses come from."),
    ] = "512MiB",
    tp: Annotated[int, typer.Option(min=1, help="Ranks, each a process, that share a layer.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="How many of them share the experts.")] = 1,
    cp: Annotated[
        int,
        typer.Option(min=1, help="Groups of --tp ranks that share the KV of each context."),
    ] = 1,
    distributed_executor_backend: Annotated[
        ExecutorBackend | None,
        typer.Option(
            help="Who starts the ranks: mp, on this host; ray, over its nodes; torchrun, which has "
            "done so already [default: torchrun within it, else mp]."
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ray's cluster [default: this host's]."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each rank [default: all there are, shared out]."),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="On a GPU, the same bits whatever shares the batch; slower."
        ),
    ] = False,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OP=SOLUTION",
            help="Force a kernel for an op, once per op; see `tokenspeed kernels list`.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Base of the seeds of requests without one [default: random]."),
    ] = None,
) -> dict[str, Any]:
    """The fields of an `EngineConfig`, all but the model."""
    return {
        "served_model_name": served_model_name,
        "device": device.value,
        "dtype": dtype.value,
        "kv_dtype": kv_dtype.value,
        "max_context": max_context,
        "max_running": max_running,
        "max_step_tokens": max_step_tokens,
        "page_size": page_size,
        "kv_cache_size_bytes": (
            None
            if kv_cache_memory is None
            else parse_size(kv_cache_memory, "--kv-cache-memory", least=1)
        ),
        "host_cache_size_bytes": (
            0 if host_cache_memory is None else parse_size(host_cache_memory, "--host-cache-memory")
        ),
        "overlap_depth": overlap_depth,
        "prefix_cache": prefix_cache,
        "speculate": speculate,
        "draft_memory_size_bytes": parse_size(draft_memory, "--draft-memory"),
        "tp": tp,
        "ep": ep,
        "cp": cp,
        "distributed_executor_backend": (
            None if distributed_executor_backend is None else distributed_executor_backend.value
        ),
        "ray_address": ray_address,
        "threads": threads,
        "deterministic": deterministic,
        "kernels": parse_kernels(kernel or []),
        "seed": seed,
    }


def takes_engine_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the engine's flags.

    The command takes `engine`, a function from a model's name to its `EngineConfig`, in place of
    them. Wrong values raise ConfigError when that function is called, so that the command can
    report them as it reports every error.
    """
    own = inspect.signature(command, eval_str=True)
    flags = inspect.signature(_engine_flags, eval_str=True)

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in flags.parameters}

        def engine(model: str) -> EngineConfig:
            return EngineConfig(model=model, **_engine_flags(**chosen))

        command(engine=engine, **values)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "engine"
    ]
    parameters += flags.parameters.values()
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return wrapper
