"""Mixtures of experts: each token goes to a few of many gated networks.

Legend: T tokens, M model features, E experts, K experts of a token, F features of an expert.
"""

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.modeling.config import ExpertsConfig
from tokenspeed.modeling.expert_weight import ExpertWeight
from tokenspeed.modeling.layers.linear import Linear, features_cut
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Partial, PerToken, Replicate, boundary

__all__ = ["Experts", "Router", "SparseMLP"]


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
        self.scores = Linear(hidden_size, config.count, kernels=kernels)
        self._route = kernels.select(ops.moe.route)

    def forward(self, x_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts_TK, weights_TK)."""
        config = self._config
        return self._route(
            self.scores(x_TM),
            None,
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
        self._experts = kernels.select(ops.moe.experts, format_name=format_name)

    def forward(
        self, x_TM: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """out_TM."""
        first = self.gate_up.local_first or 0
        return self._experts(
            x_TM, self.gate_up.data, self.down.data, experts_TK, weights_TK, first=first
        )


@boundary(x_TM=Replicate("tp"), out=Partial("tp"))
class SparseMLP(Module):
    """Each token's experts, weighed.

    Args:
        hidden_size: M.
        config: the experts.
        kernels: chooses the ops.
    """

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, kernels: KernelSelector) -> None:
        self.router = Router(hidden_size, config, kernels=kernels)
        self.experts = Experts(hidden_size, config, kernels=kernels)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        """out_TM."""
        experts_TK, weights_TK = self.router(x_TM)
        out_TM: torch.Tensor = self.experts(x_TM, experts_TK, weights_TK)
        return out_TM
