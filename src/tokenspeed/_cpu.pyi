"""The C++ CPU kernels as nanobind exposes them; `tokenspeed.kernels.cpu` is their typed face.

Matrices of tensors have contiguous rows and are float32 or bfloat16. What does not fit is a
KernelError. What norms and gates write and products read may be quantised rows instead: uint8
tensors of `quantised_size_bytes`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

def supported_isas() -> list[str]: ...
def quantised_size_bytes(runtime: Runtime, rows: int, columns: int) -> int: ...
def prefer_huge_pages(tensor: torch.Tensor) -> None: ...

class WeightMemory:
    def __init__(self, *, size_bytes: int) -> None: ...
    @property
    def taken_size_bytes(self) -> int: ...
    def give_back(self) -> None: ...

class Runtime:
    def __init__(
        self, *, threads: int, isa: str | None, memory: WeightMemory | None = None
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def measure_read_bytes_per_s(self, *, size_bytes: int, repeats: int) -> float: ...
    def measure_peaks(self, *, repeats: int) -> tuple[float, float, float]: ...

class PackedMatrix:
    @staticmethod
    def pack(
        runtime: Runtime, ggml_type: str, blocks: torch.Tensor, *, outputs: int, inputs: int
    ) -> PackedMatrix: ...
    @staticmethod
    def pack_dense(runtime: Runtime, weight: torch.Tensor) -> PackedMatrix: ...
    @property
    def format(self) -> str: ...
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...

def linear(
    runtime: Runtime,
    x: torch.Tensor,
    weight: Sequence[PackedMatrix],
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None: ...
def lookup(
    runtime: Runtime,
    ids: torch.Tensor,
    table: PackedMatrix,
    scale: float,
    y: torch.Tensor,
    first: int | None = None,
) -> None: ...
def aside(
    runtime: Runtime, x: torch.Tensor, y: torch.Tensor, call: Callable[[int], None]
) -> None: ...
def add_rms_norm(
    runtime: Runtime,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    stream: torch.Tensor | None,
    y: torch.Tensor,
) -> None: ...
def gate(runtime: Runtime, activation: str, x: torch.Tensor, y: torch.Tensor) -> None: ...
def angles(
    runtime: Runtime,
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    length: float,
    cosines: torch.Tensor,
    sines: torch.Tensor,
) -> None: ...
def add(runtime: Runtime, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> None: ...
def route(
    runtime: Runtime,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    scoring: str,
    normalise: bool,
    scale: float,
    groups: int,
    groups_kept: int,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> None: ...
def experts(
    runtime: Runtime,
    x: torch.Tensor,
    gate_up: Sequence[Sequence[PackedMatrix]],
    down: Sequence[Sequence[PackedMatrix]],
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    first: int,
    limit: float | None,
    y: torch.Tensor,
) -> None: ...
def rotate(
    runtime: Runtime,
    x: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    y: torch.Tensor,
) -> None: ...
def join(runtime: Runtime, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> None: ...
def take(runtime: Runtime, x: torch.Tensor, indices: torch.Tensor, y: torch.Tensor) -> None: ...
def append(
    runtime: Runtime,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    k_offset: torch.Tensor | None,
) -> None: ...
def attend(
    runtime: Runtime,
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    query_starts: npt.NDArray[np.int32],
    context_lens: npt.NDArray[np.int32],
    row_slots: npt.NDArray[np.int32],
    page_table: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    y: torch.Tensor,
    seen: npt.NDArray[np.int32] | None = None,
    log_sums: torch.Tensor | None = None,
) -> None: ...
def append_latents(
    runtime: Runtime, latents: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor
) -> None: ...
def attend_latents(
    runtime: Runtime,
    q: torch.Tensor,
    pool: torch.Tensor,
    query_starts: npt.NDArray[np.int32],
    context_lens: npt.NDArray[np.int32],
    row_slots: npt.NDArray[np.int32],
    page_table: torch.Tensor,
    scale: float,
    y: torch.Tensor,
    seen: npt.NDArray[np.int32] | None = None,
    log_sums: torch.Tensor | None = None,
) -> None: ...
def draw(
    runtime: Runtime,
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    tokens: torch.Tensor,
) -> None: ...
def argmax(runtime: Runtime, logits: torch.Tensor, tokens: torch.Tensor) -> None: ...
def logprobs(
    runtime: Runtime,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    count: int,
    chosen: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
) -> None: ...
def apply_bitmask(runtime: Runtime, logits: torch.Tensor, bitmask: torch.Tensor) -> None: ...
def penalise(
    logits: torch.Tensor,
    seen: torch.Tensor,
    output_counts: torch.Tensor,
    repetition: float,
    presence: float,
    frequency: float,
) -> None: ...
def add_bias(logits: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None: ...

class Sampler:
    def __init__(self, runtime: Runtime, *, slots_max: int, vocabulary: int) -> None: ...
    def bind(
        self,
        slot: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
        min_new_tokens: int,
        logprobs: int | None,
        ends: Sequence[int],
        bias_ids: Sequence[int],
        bias_values: Sequence[float],
        repetition: float,
        presence: float,
        frequency: float,
        seen: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None,
    ) -> None: ...
    def expect(self, slot: int) -> None: ...
    def allow(self, slot: int, bitmasks: torch.Tensor | None, count: int = 1) -> None: ...
    def sample(
        self,
        logits: torch.Tensor,
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        tokens: torch.Tensor,
        chosen: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
    ) -> None: ...

class StepRecording:
    def __init__(
        self,
        runtime: Runtime,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        query_starts: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        row_slots: npt.NDArray[np.int32],
        sampled: torch.Tensor,
        last_tokens: torch.Tensor,
        groups: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None: ...
    def begin(self, watcher: Callable[[int], None] | None = None) -> None: ...
    def end(self, logits: torch.Tensor, chosen: torch.Tensor) -> bool: ...
    def run(
        self,
        decode_count: int,
        row_slots: npt.NDArray[np.int32],
        query_starts: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        token_ids: npt.NDArray[np.int32],
        sample_rows: npt.NDArray[np.int32],
        groups: Sequence[
            tuple[
                npt.NDArray[np.int32],
                npt.NDArray[np.int32],
                npt.NDArray[np.int32],
                npt.NDArray[np.int32],
            ]
        ],
        tokens: npt.NDArray[np.int32],
        sampling: tuple[
            Sampler,
            npt.NDArray[np.int32],
            npt.NDArray[np.float32],
            npt.NDArray[np.int32],
            npt.NDArray[np.float32],
        ]
        | None,
    ) -> None: ...
    def __len__(self) -> int: ...
