"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1) over paged latents.

Legend: T tokens, M model features, I features that queries are made of, H heads, D elements of a
query, N those that are not rotated, R those that are, L compressed KV, E = L + R elements of a
latent, V elements of a head's value, P pages, C positions of a page.
"""

from typing import TypeAlias

import torch

from tokenspeed.core.config import KVSpec
from tokenspeed.kernels import Activations, KernelSelector, ops
from tokenspeed.kernels.rows import PagedRows, PartedRows
from tokenspeed.modeling.config import LatentConfig
from tokenspeed.modeling.cut import Cut
from tokenspeed.modeling.head_weight import HeadWeight
from tokenspeed.modeling.layers.attention import Attention
from tokenspeed.modeling.layers.context import ContextLatents
from tokenspeed.modeling.layers.linear import ColumnLinear, Linear, RowLinear
from tokenspeed.modeling.layers.norm import BranchNorm
from tokenspeed.modeling.layers.rotary import Angles
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Partial, PerToken, Replicate, Shard, boundary

__all__ = ["AttentionLayer", "LatentAttention", "LatentHeads"]

# Whatever the model's other norms have.
_EPSILON = 1e-6


@boundary(
    q_THD=Shard("tp", "heads"),
    kv_TE=Replicate("tp"),
    out=Shard("tp", "heads"),
)
class LatentHeads(Module):
    """What heads do with latents: the latents of all tokens, the heads of this rank.

    Attention is computed on compressed KV. A head's up-projection of K goes to its query, that of V
    to what comes out, so that neither K nor V of a position is ever made. Of a long prompt they are
    where there is a kernel for that and it takes fewer operations, but for ranks that share a
    context.

    Args:
        heads: H.
        config: the other sizes.
        scale: what products of queries and keys are multiplied by.
        kernels: chooses the ops.
    """

    def __init__(
        self, heads: int, config: LatentConfig, *, scale: float, kernels: KernelSelector
    ) -> None:
        self._config = config
        self._scale = scale
        self.kv_norm = BranchNorm(config.kv_rank, epsilon=_EPSILON, kernels=kernels)
        rows = config.plain_dim + config.value_dim
        self.k_up = HeadWeight(
            heads,
            config.kv_rank,
            config.plain_dim,
            kernels=kernels,
            rows=rows,
            first=0,
            transposed=True,
        )
        self.v_up = HeadWeight(
            heads,
            config.value_dim,
            config.kv_rank,
            kernels=kernels,
            rows=rows,
            first=config.plain_dim,
        )
        self._heads = kernels.select(ops.gemm.heads, format_name=self.k_up.format_name)
        self._rotate = kernels.select(ops.rope.rotate, traits={"head_dim": config.rotated_dim})
        self._join = kernels.select(ops.attention.join_heads)
        traits = {"latent_dim": config.latent_dim, "value_dim": config.kv_rank}
        attention = ops.attention.paged_mla
        if kernels.context_shared:
            attention = ops.attention.partial_mla
        kv_format = kernels.kv_format(ops.kvcache.append_latents, attention, **traits)
        self._append = kernels.select(
            ops.kvcache.append_latents,
            format_name=kv_format,
            traits={"latent_dim": config.latent_dim},
        )
        self._attend = kernels.select(ops.attention.paged_mla, format_name=kv_format, traits=traits)
        self._attend_prompt = kernels.select_beyond_reference(
            ops.attention.prompt_mla, format_name=kv_format, traits=traits
        )
        self.shared: ContextLatents | None = None
        if kernels.context_shared:
            self._attend_prompt = None
            self.shared = ContextLatents(
                config,
                scale=scale,
                format_name=kv_format,
                up_format_name=self.v_up.format_name,
                kernels=kernels,
            )
        self._seen_by_min = _seen_by_min(config)

    def forward(
        self,
        q_THD: torch.Tensor,
        kv_TE: torch.Tensor,
        angles: Angles,
        rows: PagedRows,
        latents_PCE: torch.Tensor,
    ) -> torch.Tensor:
        """out_THV; writes the tokens' latents to latents_PCE on the way."""
        config = self._config
        plain, rank = config.plain_dim, config.kv_rank
        k_T1R = kv_TE[:, rank:].unflatten(-1, (1, config.rotated_dim))  # type: ignore[no-untyped-call]
        kv_T1L = self.kv_norm(kv_TE[:, :rank]).unflatten(-1, (1, rank))
        latents_TE = self._join(kv_T1L, self._rotate(k_T1R, *angles)).flatten(1)
        self._append(latents_TE, latents_PCE, rows.kv_slots_T)
        turned_THR = self._rotate(q_THD[..., plain:], *angles)
        parted = None
        # Where a program for ranks is compiled, rows are nobody's yet.
        if self._attend_prompt is not None and isinstance(rows, PagedRows):
            parted = rows.parted(self._seen_by_min)
        if parted is None:
            return self._absorbed(q_THD[..., :plain], turned_THR, rows, latents_PCE)
        return self._in_two_ways(q_THD[..., :plain], turned_THR, rows, parted, latents_PCE)

    def _absorbed(
        self,
        plain_THN: torch.Tensor,
        turned_THR: torch.Tensor,
        rows: PagedRows,
        latents_PCE: torch.Tensor,
    ) -> torch.Tensor:
        """out_THV, with heads' up-projections before and behind attention."""
        q_THL = self._heads(plain_THN, self.k_up.data)
        q_THE = self._join(q_THL, turned_THR)
        if self.shared is not None:
            out_THV: torch.Tensor = self.shared(q_THE, rows, latents_PCE, self.v_up)
            return out_THV
        rank = self._config.kv_rank
        out_THL = self._attend(q_THE, latents_PCE, rows, self._scale, value_dim=rank)
        return self._heads(out_THL, self.v_up.data)

    def _in_two_ways(
        self,
        plain_THN: torch.Tensor,
        turned_THR: torch.Tensor,
        rows: PagedRows,
        parted: PartedRows,
        latents_PCE: torch.Tensor,
    ) -> torch.Tensor:
        """out_THV: of long prompts over keys and values that are made, of other rows absorbed."""
        assert self._attend_prompt is not None
        out_THV = plain_THN.new_empty(*plain_THN.shape[:2], self._config.value_dim)
        for prompt in parted.prompts:
            of = slice(prompt.start, prompt.end)
            pages = -(-(prompt.context_len + prompt.end - prompt.start) // rows.page_size)
            out_THV[of] = self._attend_prompt(
                torch.cat((plain_THN[of], turned_THR[of]), dim=-1),
                self.k_up.data,
                self.v_up.data,
                latents_PCE,
                rows.page_table_XP[prompt.slot, :pages],
                context_len=prompt.context_len,
                scale=self._scale,
            )
        if parted.others is not None and parted.tokens_T is not None:
            at_T = parted.tokens_T
            out_THV[at_T] = self._absorbed(
                plain_THN[at_T], turned_THR[at_T], parted.others, latents_PCE
            )
        return out_THV


def _seen_by_min(config: LatentConfig) -> float:
    """From how many tokens on that see a position its keys and values are worth being made: what
    that takes, over what it saves for each of the tokens."""
    made = config.kv_rank * (config.plain_dim + config.value_dim)
    absorbed = config.latent_dim + config.kv_rank
    return made / (absorbed - config.plain_dim - config.rotated_dim - config.value_dim)


@boundary(x_TM=PerToken("tp"), out=Partial("tp"))
class LatentAttention(Module):
    """Attention whose keys and values are made of one small vector a token.

    The projections down to it are each token's own, so ranks may share tokens out among them; what
    they give is small, and is what moves.

    Args:
        hidden_size: M.
        heads: H.
        config: the other sizes.
        bias: whether the projections down and out add one.
        scale: what products of queries and keys are multiplied by.
        kernels: chooses the ops.
    """

    window: int | None = None

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        config: LatentConfig,
        bias: bool,
        scale: float,
        kernels: KernelSelector,
    ) -> None:
        self._config = config
        self._query_dim = config.plain_dim + config.rotated_dim
        cut = Cut(unit=self._query_dim)
        orders = _orders(config)
        self.q_down: Linear | None = None
        self.q_norm: BranchNorm | None = None
        if config.q_rank is not None:
            self.q_down = Linear(hidden_size, config.q_rank, kernels=kernels, bias=bias)
            self.q_norm = BranchNorm(config.q_rank, epsilon=_EPSILON, kernels=kernels)
        self.q = ColumnLinear(
            hidden_size if config.q_rank is None else config.q_rank,
            heads * self._query_dim,
            kernels=kernels,
            cut=cut,
            orders=orders and {None: orders[0]},
        )
        self.kv_down = Linear(
            hidden_size,
            config.latent_dim,
            kernels=kernels,
            bias=bias,
            orders=orders and {None: orders[1]},
        )
        self.reads = self.kv_down.reads
        self.heads = LatentHeads(heads, config, scale=scale, kernels=kernels)
        self.output = RowLinear(
            heads * config.value_dim,
            hidden_size,
            kernels=kernels,
            bias=bias,
            cut=Cut(unit=config.value_dim),
        )

    def kv_spec(self, dtype_name: str) -> KVSpec:
        """What this layer keeps of a token, in elements of a type; the same on all ranks."""
        return KVSpec(
            layers=1,
            kv_heads=1,
            head_dim=self._config.latent_dim,
            dtype=dtype_name,
            latent=True,
        )

    def forward(
        self,
        x_TM: Activations,
        angles: Angles,
        rows: PagedRows,
        latents_PCE: torch.Tensor,
    ) -> torch.Tensor:
        """out_TM; writes the tokens' latents to latents_PCE on the way."""
        q_TI = x_TM
        if self.q_down is not None and self.q_norm is not None:
            q_TI = self.q_norm(self.q_down(x_TM))
        q_THD = self.q(q_TI).unflatten(-1, (-1, self._query_dim))
        out_THV = self.heads(q_THD, self.kv_down(x_TM), angles, rows, latents_PCE)
        out_TM: torch.Tensor = self.output(out_THV.flatten(1))
        return out_TM


def _orders(config: LatentConfig) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """In which order rows of a query and of a latent are kept; None for that of the checkpoint.

    The rotation pairs an element of the first half with one of the second, where a checkpoint may
    have pairs next to each other.
    """
    if not config.interleaved:
        return None
    plain, rank = config.plain_dim, config.kv_rank

    def behind(first: int) -> tuple[int, ...]:
        end = first + config.rotated_dim
        return (*range(first), *range(first, end, 2), *range(first + 1, end, 2))

    return behind(plain), behind(rank)


AttentionLayer: TypeAlias = Attention | LatentAttention
"""What a block may have as its attention."""
