"""Self-attention over paged KV.

Legend: T tokens, M model features, Q query heads, H KV heads, D elements of a head, P pages,
C positions of a page.
"""

import torch

from tokenspeed.core.config import KVSpec
from tokenspeed.kernels import Activations, KernelSelector, ops
from tokenspeed.kernels.kv_formats import ROUNDED
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling.cut import Cut
from tokenspeed.modeling.layers.context import ContextMerge, ContextPart
from tokenspeed.modeling.layers.linear import ColumnLinear, RowLinear
from tokenspeed.modeling.layers.norm import HeadNorm
from tokenspeed.modeling.layers.rotary import Angles, rotary_order
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import Partial, Replicate, boundary

__all__ = ["Attention"]


@boundary(x_TM=Replicate("tp"), out=Partial("tp"))
class Attention(Module):
    """Multi-head attention with rotary positions and grouped KV heads.

    Args:
        hidden_size: M.
        heads: Q.
        kv_heads: H.
        head_dim: D.
        qkv_bias: whether the query, key and value projections add one.
        output_bias: whether the output projection adds one.
        head_norm_epsilon: of a norm of each query and key head; None where there is none.
        head_norm_offset: added to the weights of those norms.
        scale: what products of queries and keys are multiplied by; the inverse root of D if None.
        window: tokens that a query sees, itself included; all if None.
        sinks: whether each head has a score that takes its part of the softmax and gives nothing.
        inputs: elements that queries, keys and values are made of; M if None.
        rotated: how many leading elements of a head are rotated; all if None.
        kernels: chooses the ops.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        head_norm_epsilon: float | None = None,
        head_norm_offset: float = 0.0,
        scale: float | None = None,
        window: int | None = None,
        sinks: bool = False,
        inputs: int | None = None,
        rotated: int | None = None,
        kernels: KernelSelector,
    ) -> None:
        self._head_dim = head_dim
        self._scale = head_dim**-0.5 if scale is None else scale
        self.window = window
        # A KV head stays with its query heads; ranks beyond the KV heads share them.
        cut = Cut(unit=head_dim, groups=kv_heads, shared=frozenset({"k", "v"}))
        order = None if rotated in (None, head_dim) else rotary_order(head_dim, rotated or 0)
        self.qkv = ColumnLinear(
            inputs or hidden_size,
            (heads + 2 * kv_heads) * head_dim,
            kernels=kernels,
            bias=qkv_bias,
            parts={"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim},
            cut=cut,
            orders={"q": order, "k": order} if order else None,
        )
        self.reads = self.qkv.reads
        self.output = RowLinear(
            heads * head_dim, hidden_size, kernels=kernels, bias=output_bias, cut=cut
        )
        self.q_norm: HeadNorm | None = None
        self.k_norm: HeadNorm | None = None
        if head_norm_epsilon is not None:
            self.q_norm, self.k_norm = (
                HeadNorm(
                    head_dim,
                    epsilon=head_norm_epsilon,
                    kernels=kernels,
                    order=order,
                    offset=head_norm_offset,
                )
                for _ in range(2)
            )
        self.sinks: Weight | None = None
        if sinks:
            self.sinks = Weight(
                (heads,),
                dims=("heads",),
                kernels=kernels,
                cuts={"heads": Cut(groups=kv_heads)},
                dtype=torch.float32,
            )
        traits = {"head_dim": head_dim}
        self._kv_format = kernels.kv_format(
            ops.kvcache.append, ops.attention.paged_mha, head_dim=head_dim
        )
        self._rotate = kernels.select(ops.rope.rotate, traits=traits)
        self._append = kernels.select(
            ops.kvcache.append, format_name=self._kv_format, traits=traits
        )
        self._rotate_and_append = kernels.select_beyond_reference(
            ops.kvcache.rotate_and_append, format_name=self._kv_format, traits=traits
        )
        self._attend = kernels.select(
            ops.attention.paged_mha, format_name=self._kv_format, traits=traits
        )
        self.part: ContextPart | None = None
        self.merge: ContextMerge | None = None
        if kernels.context_shared:
            self.part = ContextPart(
                head_dim,
                scale=self._scale,
                window=window,
                format_name=self._kv_format,
                kernels=kernels,
            )
            self.merge = ContextMerge(kernels)

    def kv_spec(self, dtype_name: str) -> KVSpec:
        """What this layer keeps of a token, in elements of a type."""
        return KVSpec(
            layers=1,
            kv_heads=self.local_kv_heads,
            head_dim=self._head_dim,
            dtype=dtype_name,
            window=self.window,
        )

    @property
    def local_kv_heads(self) -> int:
        """KV heads that this rank holds."""
        return self.qkv.weight.local_parts["k"] // self._head_dim

    def _k_offset(self) -> torch.Tensor | None:
        """The bias of K as offset_HD, where pages are rounded.

        Its large elements, of some models a hundred times what else K has, stand where rotation
        turns them by less than a tenth over ten thousand positions: they are the same in K of all
        positions, and would leave few of 8 bits to what differs.
        """
        bias = self.qkv.bias
        if self._kv_format != ROUNDED or bias is None or self.k_norm is not None:
            return None
        if self.sinks is not None:
            # A sink is no product with K: it would not move with the other scores.
            return None
        if not isinstance(bias.data, torch.Tensor):
            return None
        first = bias.local_parts["q"]
        return bias.data[first : first + bias.local_parts["k"]].view(-1, self._head_dim)

    def forward(
        self,
        x_TM: Activations,
        angles: Angles,
        rows: PagedRows,
        kv: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """out_TM; writes the tokens' K and V to kv = (k_PCHD, v_PCHD) on the way."""
        qkv_TXD = self.qkv(x_TM).unflatten(-1, (-1, self._head_dim))
        q_TQD = self._rotated(qkv_TXD, angles, rows, kv)
        if self.part is not None and self.merge is not None:
            out_TQD = self.merge(self.part(q_TQD, rows, kv, self.sinks))
        else:
            out_TQD = self._attend(
                q_TQD,
                *kv,
                rows,
                self._scale,
                window=self.window,
                sinks_Q=self.sinks.tensor if self.sinks else None,
            )
        out_TM: torch.Tensor = self.output(out_TQD.flatten(1))
        return out_TM

    def _rotated(
        self,
        qkv_TXD: torch.Tensor,
        angles: Angles,
        rows: PagedRows,
        kv: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Rotated queries q_TQD; writes K and V."""
        kv_heads = self.local_kv_heads
        qk_TXD, v_THD = qkv_TXD[:, :-kv_heads], qkv_TXD[:, -kv_heads:]
        q_TQD, k_THD = qk_TXD[:, :-kv_heads], qk_TXD[:, -kv_heads:]
        if self.q_norm is not None and self.k_norm is not None:
            q_TQD, k_THD = self.q_norm(q_TQD), self.k_norm(k_THD)
        if self._rotate_and_append is not None:
            k_PCHD, v_PCHD = kv
            pages = {"k_PCHD": k_PCHD, "v_PCHD": v_PCHD, "kv_slots_T": rows.kv_slots_T}
            return self._rotate_and_append(q_TQD, k_THD, v_THD, *angles, **pages)
        if self.q_norm is None:
            # Queries and keys lie next to each other, so one rotation serves both.
            qk_TXD = self._rotate(qk_TXD, *angles)
            q_TQD, k_THD = qk_TXD[:, :-kv_heads], qk_TXD[:, -kv_heads:]
        else:
            q_TQD, k_THD = self._rotate(q_TQD, *angles), self._rotate(k_THD, *angles)
        self._append(k_THD, v_THD, *kv, rows.kv_slots_T, k_offset_HD=self._k_offset())
        return q_TQD
