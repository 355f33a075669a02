"""How placements pass through each op, and how the ops that read weights divide them.

A rule takes the tracer and the op's arguments, symbols where the op has tensors, and gives symbols.
It checks the dimensions it depends on: a norm over divided features is an error, a product over
divided inputs gives a partial sum.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from tokenspeed.modeling.compiler.symbol import Dim, Flow, Symbol, cat
from tokenspeed.modeling.compiler.trace import Tracer, WeightSymbol
from tokenspeed.modeling.placement import Partial, Shard

__all__ = ["RULES"]


def _linear(
    tracer: Tracer, x_TI: Symbol, weight_OI: WeightSymbol, bias_O: WeightSymbol | None
) -> Symbol:
    return _product(tracer, "gemm.linear", x_TI, weight_OI, bias_O, dtype=x_TI.dtype)


def _heads(tracer: Tracer, x_THI: Symbol, weight_HOI: WeightSymbol) -> Symbol:
    flow = Flow(name="gemm.heads", sums=frozenset({0}))
    outputs = _each_head(tracer, flow.name, x_THI, x_THI.dims[-1], weight_HOI)
    dims = [*x_THI.dims[:-1], Dim(size=outputs)]
    (made,) = tracer.record(flow, (x_THI,), [(dims, x_THI.dtype)])
    return made


def _each_head(tracer: Tracer, name: str, x: Symbol, taken: Dim, weight_HOI: WeightSymbol) -> int:
    """Outputs of each head's own product with `taken` of its elements, heads divided as x has
    them."""
    _whole_features(tracer, name, x)
    divided = x.dims[-2]
    tracer.divide(weight_HOI, {weight_HOI.weight.dims[0]: divided.cells}, frozenset())
    heads, outputs, inputs = weight_HOI.weight.local_shape
    if (divided.size, taken.size) != (heads, inputs):
        tracer.fail(
            f"{name} takes {heads} heads of {inputs} inputs, but what comes from "
            f"{x.source} has {divided.size} of {taken.size}"
        )
    return outputs


def _logits(tracer: Tracer, x_SI: Symbol, weight_VI: WeightSymbol) -> Symbol:
    return _product(tracer, "gemm.logits", x_SI, weight_VI, None, dtype=torch.float32)


def _product(
    tracer: Tracer,
    name: str,
    x: Symbol,
    matrix: WeightSymbol,
    bias: WeightSymbol | None,
    *,
    dtype: torch.dtype,
) -> Symbol:
    weight = matrix.weight
    rows, columns = weight.dims
    inputs = x.dims[-1]
    summed = inputs.cells
    divided = _output_cells(tracer, summed)
    tracer.divide(matrix, {rows: divided, columns: summed}, frozenset())
    if len(inputs.sizes) > 1 or inputs.size != weight.local_shape[1]:
        tracer.fail(
            f"{name} takes {weight.local_shape[1]} inputs of each token, but what comes from "
            f"{x.source} has {inputs.size}, in {max(1, len(inputs.sizes))} stacked pieces"
        )
    outputs = _weight_dim(tracer, matrix, rows, divided)
    if bias is not None:
        tracer.divide(bias, {bias.weight.dims[0]: divided}, frozenset(summed))
    flow = Flow(
        name=name,
        sums=frozenset({0}) if bias is None else frozenset(),
        makes_partial=frozenset(summed),
    )
    (made,) = tracer.record(flow, (x,), [([*x.dims[:-1], outputs], dtype)])
    return made


def _lookup(
    tracer: Tracer,
    token_ids_T: Symbol,
    table_VM: WeightSymbol,
    scale: float = 1.0,
    first: int | None = None,
) -> Symbol:
    rows, columns = table_VM.weight.dims
    cells = range(len(tracer.mesh.cells))
    summed = tuple(cell for cell in cells if isinstance(tracer.wanted_output(cell), Partial))
    divided = _output_cells(tracer, summed)
    tracer.divide(table_VM, {rows: summed, columns: divided}, frozenset())
    features = _weight_dim(tracer, table_VM, columns, divided)
    flow = Flow(name="embedding.lookup", makes_partial=frozenset(summed))
    outputs = [([*token_ids_T.dims, features], torch.float32)]
    (made,) = tracer.record(flow, (token_ids_T,), outputs)
    return made


def _take(tracer: Tracer, x_TM: Symbol, indices_S: Symbol) -> Symbol:
    return x_TM[indices_S]


def _rms_norm(tracer: Tracer, x_TM: Symbol, weight_M: WeightSymbol, epsilon: float) -> Symbol:
    _whole_features(tracer, "norm.rms_norm", x_TM)
    tracer.divide(weight_M, {}, frozenset())
    flow = Flow(name="norm.rms_norm")
    (made,) = tracer.record(flow, (x_TM,), [(x_TM.dims, weight_M.dtype)])
    return made


def _add_rms_norm(
    tracer: Tracer, x_TM: Symbol, residual_TM: Symbol, weight_M: WeightSymbol, epsilon: float
) -> tuple[Symbol, Symbol]:
    _whole_features(tracer, "norm.add_rms_norm", x_TM, residual_TM)
    tracer.divide(weight_M, {}, frozenset())
    normed, added = tracer.record(
        Flow(name="norm.add_rms_norm"),
        (x_TM, residual_TM),
        [(x_TM.dims, weight_M.dtype), (x_TM.dims, torch.float32)],
    )
    return normed, added


def _gated(name: str) -> Callable[..., Symbol]:
    def rule(tracer: Tracer, gate_up_T2F: Symbol) -> Symbol:
        both = gate_up_T2F.dims[-1]
        pieces = both.sizes
        if pieces and (len(pieces) != 2 or pieces[0] != pieces[1]):
            tracer.fail(f"{name} takes a gate and an up of one size, not {len(pieces)} pieces")
        half = replace(both, size=both.size // 2, sizes=pieces[:1])
        dims = [*gate_up_T2F.dims[:-1], half]
        (made,) = tracer.record(Flow(name=name), (gate_up_T2F,), [(dims, gate_up_T2F.dtype)])
        return made

    return rule


def _angles(
    tracer: Tracer, positions_T: Symbol, frequencies_E: torch.Tensor, length: float = 1.0
) -> tuple[Symbol, Symbol]:
    dims = [*positions_T.dims, Dim(size=len(frequencies_E))]
    cos, sin = tracer.record(
        Flow(name="rope.angles"), (positions_T,), [(dims, torch.float32), (dims, torch.float32)]
    )
    return cos, sin


def _rotate(tracer: Tracer, x_THD: Symbol, cos_TE: Symbol, sin_TE: Symbol) -> Symbol:
    _whole_features(tracer, "rope.rotate", x_THD)
    (made,) = tracer.record(
        Flow(name="rope.rotate"), (x_THD, cos_TE, sin_TE), [(x_THD.dims, x_THD.dtype)]
    )
    return made


def _append(tracer: Tracer, k_THD: Symbol, v_THD: Symbol, **pools: Any) -> None:
    tracer.record(Flow(name="kvcache.append", mixes_tokens=True), (k_THD, v_THD), [])


def _rotate_and_append(
    tracer: Tracer, q_TQD: Symbol, k_THD: Symbol, v_THD: Symbol, **others: Any
) -> Symbol:
    _whole_features(tracer, "kvcache.rotate_and_append", q_TQD, k_THD)
    flow = Flow(name="kvcache.rotate_and_append", mixes_tokens=True)
    (made,) = tracer.record(flow, (q_TQD, k_THD, v_THD), [(q_TQD.dims, q_TQD.dtype)])
    return made


def _paged_mha(
    tracer: Tracer, q_TQD: Symbol, sinks_Q: WeightSymbol | None = None, **others: Any
) -> Symbol:
    _whole_features(tracer, "attention.paged_mha", q_TQD)
    if sinks_Q is not None:
        tracer.divide(sinks_Q, {sinks_Q.weight.dims[0]: q_TQD.dims[-2].cells}, frozenset())
    flow = Flow(name="attention.paged_mha", mixes_tokens=True)
    (made,) = tracer.record(flow, (q_TQD,), [(q_TQD.dims, q_TQD.dtype)])
    return made


def _partial_mha(
    tracer: Tracer, q_TQD: Symbol, sinks_Q: WeightSymbol | None = None, **others: Any
) -> Symbol:
    _whole_features(tracer, "attention.partial_mha", q_TQD)
    if sinks_Q is not None:
        tracer.divide(sinks_Q, {sinks_Q.weight.dims[0]: q_TQD.dims[-2].cells}, frozenset())
    flow = Flow(
        name="attention.partial_mha",
        mixes_tokens=True,
        makes_softmax=frozenset(tracer.mesh.cells_of("cp")),
    )
    dims = [*q_TQD.dims[:-1], Dim(size=q_TQD.dims[-1].size + 1)]
    (made,) = tracer.record(flow, (q_TQD,), [(dims, torch.float32)])
    return made


def _route(
    tracer: Tracer, logits_TE: Symbol, bias_E: WeightSymbol | None, count: int, **how: Any
) -> tuple[Symbol, Symbol]:
    _whole_features(tracer, "moe.route", logits_TE)
    if bias_E is not None:
        tracer.divide(bias_E, {}, frozenset())
    dims = [logits_TE.dims[0], Dim(size=count)]
    experts, weights = tracer.record(
        Flow(name="moe.route"), (logits_TE,), [(dims, torch.int64), (dims, torch.float32)]
    )
    return experts, weights


def _experts(
    tracer: Tracer,
    *,
    x_TM: Symbol,
    gate_up_E2FM: WeightSymbol,
    down_EMF: WeightSymbol,
    experts_TK: Symbol,
    weights_TK: Symbol,
    gate_up_bias_E2F: WeightSymbol | None,
    down_bias_EM: WeightSymbol | None,
    **how: Any,
) -> Symbol:
    _whole_features(tracer, "moe.experts", x_TM)
    by_axis: dict[str, tuple[int, ...]] = {"ep": (), "tp": ()}
    for cell in range(len(tracer.mesh.cells)):
        if isinstance(tracer.wanted_output(cell), Partial):
            by_axis[tracer.axis_of(cell)] += (cell,)
    experts, features = by_axis["ep"], by_axis["tp"]
    tracer.divide(gate_up_E2FM, {"experts": experts, "outputs": features}, frozenset())
    tracer.divide(down_EMF, {"experts": experts, "inputs": features}, frozenset())
    if gate_up_bias_E2F is not None:
        tracer.divide(gate_up_bias_E2F, {"experts": experts, "outputs": features}, frozenset())
    if down_bias_EM is not None:
        # One of the ranks that add up shares of an expert's features has it.
        tracer.divide(down_bias_EM, {"experts": experts}, frozenset(features))
    flow = Flow(name="moe.experts", makes_partial=frozenset((*experts, *features)))
    (made,) = tracer.record(flow, (x_TM, experts_TK, weights_TK), [(x_TM.dims, x_TM.dtype)])
    return made


def _add(tracer: Tracer, a_TM: Symbol, b_TM: Symbol) -> Symbol:
    return a_TM + b_TM


def _append_latents(tracer: Tracer, latents_TE: Symbol, **pools: Any) -> None:
    tracer.record(Flow(name="kvcache.append_latents", mixes_tokens=True), (latents_TE,), [])


def _paged_mla(tracer: Tracer, q_TQE: Symbol, *, value_dim: int, **others: Any) -> Symbol:
    _whole_features(tracer, "attention.paged_mla", q_TQE)
    flow = Flow(name="attention.paged_mla", mixes_tokens=True)
    dims = [*q_TQE.dims[:-1], Dim(size=value_dim)]
    (made,) = tracer.record(flow, (q_TQE,), [(dims, q_TQE.dtype)])
    return made


def _partial_mla(tracer: Tracer, q_TQE: Symbol, *, value_dim: int, **others: Any) -> Symbol:
    _whole_features(tracer, "attention.partial_mla", q_TQE)
    flow = Flow(
        name="attention.partial_mla",
        mixes_tokens=True,
        makes_softmax=frozenset(tracer.mesh.cells_of("cp")),
    )
    dims = [*q_TQE.dims[:-1], Dim(size=value_dim + 1)]
    (made,) = tracer.record(flow, (q_TQE,), [(dims, torch.float32)])
    return made


def _project_parts(tracer: Tracer, parts_TQX: Symbol, weight_QVL: WeightSymbol) -> Symbol:
    flow = Flow(name="attention.project_parts", parts=frozenset({0}))
    taken = parts_TQX.dims[-1]
    outputs = _each_head(
        tracer, flow.name, parts_TQX, replace(taken, size=taken.size - 1), weight_QVL
    )
    dims = [*parts_TQX.dims[:-1], Dim(size=outputs + 1)]
    (made,) = tracer.record(flow, (parts_TQX,), [(dims, torch.float32)])
    return made


def _join_heads(tracer: Tracer, front_TQA: Symbol, behind_TQB: Symbol) -> Symbol:
    _whole_features(tracer, "attention.join_heads", front_TQA, behind_TQB)
    return cat((front_TQA, behind_TQB), dim=-1)


def _output_cells(tracer: Tracer, summed: tuple[int, ...]) -> tuple[int, ...]:
    """Cells over which the running module says that its features are divided."""
    found = []
    for cell in range(len(tracer.mesh.cells)):
        wanted = tracer.wanted_output(cell)
        if isinstance(wanted, Shard) and wanted.dim_index != 0 and cell not in summed:
            found.append(cell)
    return tuple(found)


def _weight_dim(tracer: Tracer, data: WeightSymbol, dim: str, cells: tuple[int, ...]) -> Dim:
    """The dimension of a result that a weight's dimension becomes."""
    weight = data.weight
    index = weight.dims.index(dim)
    size = weight.local_shape[index]
    if not cells:
        return Dim(size=size)
    sizes = weight.sizes(dim, tracer.mesh.size(cells))
    return Dim(
        size=size,
        cells=cells,
        sizes=sizes,
        index=tracer.mesh.index(tracer.rank, cells),
        overlapping=sum(map(sum, sizes)) > weight.shape[index],
    )


def _whole_features(tracer: Tracer, name: str, *symbols: Symbol) -> None:
    for symbol in symbols:
        if symbol.dims[-1].cells:
            tracer.fail(f"{name} needs all features of what comes from {symbol.source}")


RULES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "activation.gelu_tanh_and_mul": _gated("activation.gelu_tanh_and_mul"),
        "activation.silu_and_mul": _gated("activation.silu_and_mul"),
        "attention.join_heads": _join_heads,
        "attention.paged_mha": _paged_mha,
        "attention.paged_mla": _paged_mla,
        "attention.partial_mha": _partial_mha,
        "attention.partial_mla": _partial_mla,
        "attention.project_parts": _project_parts,
        "embedding.lookup": _lookup,
        "embedding.take": _take,
        "gemm.heads": _heads,
        "gemm.linear": _linear,
        "gemm.logits": _logits,
        "kvcache.append": _append,
        "kvcache.append_latents": _append_latents,
        "kvcache.rotate_and_append": _rotate_and_append,
        "moe.add": _add,
        "moe.experts": _experts,
        "moe.route": _route,
        "norm.add_rms_norm": _add_rms_norm,
        "norm.rms_norm": _rms_norm,
        "rope.angles": _angles,
        "rope.rotate": _rotate,
    }
)
"""By name of an op; an op without a rule cannot stand in a model of several ranks."""
