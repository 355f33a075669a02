"""gpt-oss (OpenAI 2025): sinks, a window in every other layer, experts with biases and a limit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from tokenspeed.kernels import KernelSelector, Stored
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.expert_weight import StackedExpert
from tokenspeed.modeling.layers import AttentionLayer
from tokenspeed.modeling.models.llama import Llama, attention_of
from tokenspeed.modeling.models.qwen3 import Qwen3Moe
from tokenspeed.modeling.placement import Shard, boundary

__all__ = ["GptOss"]

_EXPERTS = "blocks.*.mlp.experts"
# What a checkpoint has of all experts: its parts, with the first of their outputs and the step.
_STACKED = {
    "gate_up_proj": {"gate_proj.weight": (0, 2), "up_proj.weight": (1, 2)},
    "gate_up_proj_bias": {"gate_proj.bias": (0, 2), "up_proj.bias": (1, 2)},
    "down_proj": {"down_proj.weight": (0, 1)},
    "down_proj_bias": {"down_proj.bias": (0, 1)},
}


@boundary(out=Shard("tp", "vocabulary"))
class GptOss(Qwen3Moe):
    """Embedding, blocks, norm, head."""

    weight_names: ClassVar[Mapping[str, str | Sequence[str]]] = {
        **{name: ours for name, ours in Llama.weight_names.items() if ".mlp." not in name},
        **{name: ours for name, ours in Qwen3Moe.weight_names.items() if ".experts." in name},
        "model.layers.*.self_attn.sinks": "blocks.*.attention.sinks",
        "model.layers.*.mlp.router.weight": "blocks.*.mlp.router.scores.weight",
        "model.layers.*.mlp.router.bias": "blocks.*.mlp.router.scores.bias",
        "model.layers.*.mlp.experts.*.gate_proj.bias": f"{_EXPERTS}.gate_up_bias:*.gate",
        "model.layers.*.mlp.experts.*.up_proj.bias": f"{_EXPERTS}.gate_up_bias:*.up",
        "model.layers.*.mlp.experts.*.down_proj.bias": f"{_EXPERTS}.down_bias:*",
    }

    def attention(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> AttentionLayer:
        """A block's attention."""
        return attention_of(config, kernels, layer, sinks=True)

    def parts_of(self, name: str, stored: Stored) -> Iterable[tuple[str, Stored]]:
        """Each expert's tensors; gates and ups take turns as outputs of one product."""
        layer, _, what = name.rpartition(".")
        parts = _STACKED.get(what) if layer.endswith(".mlp.experts") else None
        if parts is None:
            return ((name, stored),)
        return (
            (f"{layer}.{expert}.{part}", StackedExpert(stored, expert, first=first, step=step))
            for expert in range(stored.shape[0])
            for part, (first, step) in parts.items()
        )
