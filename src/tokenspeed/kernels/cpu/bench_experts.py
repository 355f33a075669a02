"""How fast mixtures of experts run here: all experts in one call, beside one after the other.

Legend: T tokens, M model features, E experts, K experts of a token, F features of an expert.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.cpu.activation import silu_and_mul
from tokenspeed.kernels.cpu.runtime import CpuRuntime

__all__ = ["ExpertsFigure", "bench_experts"]

# Of a model of 30 billion weights, 3 billion of them in use, each layer with fewer experts.
_FEATURES, _HIDDEN, _EXPERTS, _CHOSEN = 2048, 768, 32, 8
_TOKENS = (1, 4, 16, 128)
# A layer of dense experts is as large as many caches; three of them are no longer in any.
_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsFigure:
    """The best of some runs of one layer's experts.

    Attributes:
        tokens: T.
        grouped_us: in one call.
        apart_us: in two products and a gate for each expert that has tokens, from Python.
        bytes_per_s: of weights of the experts in use, in one call.
    """

    tokens: int
    grouped_us: float
    apart_us: float
    bytes_per_s: float


def bench_experts(runtime: CpuRuntime, *, repeats: int = 7) -> Iterator[ExpertsFigure]:
    """Measure a layer of experts in bytes (w8), each token at experts of its own.

    Args:
        runtime: where products run.
        repeats: the best of so many runs counts.
    """
    # What runs in PyTorch beside the products gets as many threads.
    torch.set_num_threads(runtime.threads)
    layers = [
        [_packed(runtime, 2 * _HIDDEN, _FEATURES), _packed(runtime, _FEATURES, _HIDDEN)]
        for _ in range(_LAYERS)
    ]
    generator = torch.Generator().manual_seed(0)
    for tokens in _TOKENS:
        order_TE = torch.rand(tokens, _EXPERTS, generator=generator).argsort(-1)
        step = _Step(
            x_TM=torch.randn(tokens, _FEATURES, generator=generator),
            experts_TK=order_TE[:, :_CHOSEN].contiguous(),
            weights_TK=torch.rand(tokens, _CHOSEN, generator=generator),
        )
        grouped_s, apart_s = [], []
        for _ in range(repeats):
            grouped_s.append(_seconds(_grouped, runtime, step, layers))
            apart_s.append(_seconds(_apart, runtime, step, layers))
        used = len(set(step.experts_TK.flatten().tolist()))
        size_bytes = used * sum(matrices[0].size_bytes for matrices in layers[0])
        yield ExpertsFigure(
            tokens=tokens,
            grouped_us=min(grouped_s) * 1e6,
            apart_us=min(apart_s) * 1e6,
            bytes_per_s=size_bytes / min(grouped_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    x_TM: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor


_Layers = list[list[list[_cpu.PackedMatrix]]]


def _grouped(runtime: CpuRuntime, step: _Step, layers: _Layers) -> None:
    for gate_up, down in layers:
        _cpu.experts(
            runtime,
            step.x_TM,
            [[matrix] for matrix in gate_up],
            [[matrix] for matrix in down],
            None,
            None,
            step.experts_TK,
            step.weights_TK,
            0,
            None,
            torch.empty_like(step.x_TM),
        )


def _apart(runtime: CpuRuntime, step: _Step, layers: _Layers) -> None:
    """What one would write without the op."""
    for gate_up, down in layers:
        out_TM = torch.zeros(step.x_TM.shape)
        for expert in sorted(set(step.experts_TK.flatten().tolist())):
            tokens_N, places_N = torch.where(step.experts_TK == expert)
            both_N2F = torch.empty(len(tokens_N), 2 * _HIDDEN)
            _cpu.linear(runtime, step.x_TM[tokens_N], [gate_up[expert]], None, both_N2F)
            hidden_NF = silu_and_mul(both_N2F, runtime=runtime)
            found_NM = torch.empty(len(tokens_N), _FEATURES)
            _cpu.linear(runtime, hidden_NF, [down[expert]], None, found_NM)
            out_TM.index_add_(0, tokens_N, found_NM * step.weights_TK[tokens_N, places_N, None])


def _packed(runtime: CpuRuntime, outputs: int, inputs: int) -> list[_cpu.PackedMatrix]:
    # Any bytes do; these make scales of common size.
    blocks = torch.full((outputs * inputs // 32 * 34,), 0x11, dtype=torch.uint8)
    return [
        _cpu.PackedMatrix.pack(runtime, "Q8_0", blocks, outputs=outputs, inputs=inputs)
        for _ in range(_EXPERTS)
    ]


def _seconds(
    run: Callable[[CpuRuntime, _Step, _Layers], None],
    runtime: CpuRuntime,
    step: _Step,
    layers: _Layers,
) -> float:
    """Of one layer."""
    start = time.perf_counter()
    run(runtime, step, layers)
    return (time.perf_counter() - start) / len(layers)
