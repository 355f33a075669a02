"""Mixtures of experts: each token goes to a few of many gated networks.

Legend: T tokens, M model features, E experts, K experts of a token, F features of an expert.
"""

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.modeling.config import ExpertsConfig
from tokenspeed.modeling.expert_weight import ExpertBias, ExpertWeight
from tokenspeed.modeling.layers.linear import Linear, features_cut
from tokenspeed.modeling.layers.mlp import GatedMLP
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import Partial, PerToken, Replicate, boundary

__all__ = ["Experts", "Router", "SparseMLP", "Sum"]


@boundary(x_TM=PerToken("tp"), outs=(PerToken("tp"), PerToken("tp")))
class Router(Module):
    """Chooses and weighs each token's experts.

    Args:
        hidden_size: M.
        config: how they are chosen.
        kernels: chooses the ops.
    """

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, kernels: KernelSelector) -> None:
        self._config = config
        self.scores = Linear(hidden_size, config.count, kernels=kernels, bias=config.biased)
        self.bias: Weight | None = None
        if config.bias:
            # Experts whose scores are close are told apart by it, so it is kept as it comes.
            self.bias = Weight(
                (config.count,), dims=("experts",), kernels=kernels, dtype=torch.float32
            )
        self._route = kernels.select(ops.moe.route)

    def forward(self, x_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts_TK, weights_TK)."""
        config = self._config
        return self._route(
            self.scores(x_TM),
            self.bias.tensor if self.bias else None,
            config.per_token,
            scoring=config.scoring,
            normalise=config.normalise,
            scale=config.scale,
            groups=config.groups,
            groups_kept=config.groups_kept,
        )


@boundary(
    x_TM=(Replicate("ep"), Replicate("tp")),
    experts_TK=(Replicate("ep"), Replicate("tp")),
    weights_TK=(Replicate("ep"), Replicate("tp")),
    out=(Partial("ep"), Partial("tp")),
    experts=True,
)
class Experts(Module):
    """The experts' networks, divided over `ep` by expert and over `tp` inside each.

    Args:
        hidden_size: M.
        config: how many, and how large.
        kernels: chooses the op.
    """

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, kernels: KernelSelector) -> None:
        size = config.intermediate_size
        format_name = kernels.weight_format(ops.moe.experts)
        cut = features_cut(size, kernels)
        self.gate_up = ExpertWeight(
            config.count,
            2 * size,
            hidden_size,
            kernels=kernels,
            pieces={"gate": size, "up": size},
            cut=cut,
            format_name=format_name,
        )
        self.down = ExpertWeight(
            config.count, hidden_size, size, kernels=kernels, cut=cut, format_name=format_name
        )
        self.gate_up_bias: ExpertBias | None = None
        self.down_bias: ExpertBias | None = None
        if config.biased:
            self.gate_up_bias = ExpertBias(
                config.count,
                2 * size,
                kernels=kernels,
                pieces={"gate": size, "up": size},
                cut=cut,
            )
            self.down_bias = ExpertBias(config.count, hidden_size, kernels=kernels)
        self._limit = config.limit
        self._experts = kernels.select(ops.moe.experts, format_name=format_name)

    def forward(
        self, x_TM: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """out_TM."""
        first = self.gate_up.local_first or 0
        return self._experts(
            x_TM,
            self.gate_up.data,
            self.down.data,
            experts_TK,
            weights_TK,
            first=first,
            gate_up_bias_E2F=self.gate_up_bias.data if self.gate_up_bias else None,
            down_bias_EM=self.down_bias.data if self.down_bias else None,
            limit=self._limit,
        )


@boundary(a_TM=Partial("tp"), b_TM=Partial("tp"), out=Partial("tp"))
class Sum(Module):
    """Two results of a layer, added before the ranks' shares of both are.

    Args:
        kernels: chooses the op.
    """

    def __init__(self, *, kernels: KernelSelector) -> None:
        self._add = kernels.select(ops.moe.add)

    def forward(self, a_TM: torch.Tensor, b_TM: torch.Tensor) -> torch.Tensor:
        """a + b."""
        return self._add(a_TM, b_TM)


@boundary(x_TM=Replicate("tp"), out=Partial("tp"))
class SparseMLP(Module):
    """Each token's experts, weighed, and those that all tokens share.

    Args:
        hidden_size: M.
        config: the experts.
        kernels: chooses the ops.
    """

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, kernels: KernelSelector) -> None:
        self.router = Router(hidden_size, config, kernels=kernels)
        self.experts = Experts(hidden_size, config, kernels=kernels)
        self.shared: GatedMLP | None = None
        if config.shared:
            self.shared = GatedMLP(
                hidden_size=hidden_size,
                intermediate_size=config.shared * config.intermediate_size,
                bias=False,
                kernels=kernels,
            )
            self.both = Sum(kernels=kernels)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        """out_TM."""
        experts_TK, weights_TK = self.router(x_TM)
        out_TM: torch.Tensor = self.experts(x_TM, experts_TK, weights_TK)
        return out_TM if self.shared is None else self.both(out_TM, self.shared(x_TM))
