"""Drives a model's forward without a scheduler: requests with pages scattered at random.

Legend: S sampled tokens, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tokenspeed.cache import KVPools
from tokenspeed.kernels.rows import ContextShare, PagedRows
from tokenspeed.modeling import ForwardBatch, Model

__all__ = ["Driver", "Request", "build_rows"]


@dataclass(eq=False)
class Request:
    """A request of the driver: its slot, its pages, and the tokens whose KV is in them."""

    slot: int
    pages: list[int] = field(default_factory=list)
    length: int = 0


def build_rows(
    rows: Sequence[tuple[Request, int]],
    table: torch.Tensor,
    page_size: int,
    *,
    share: ContextShare | None = None,
    elsewhere: int = 0,
) -> PagedRows:
    """The rows of a step that runs `count` new tokens of each request, whose pages suffice.

    With a share, pages are those of all ranks; what others keep goes to the slot `elsewhere`.
    """
    kv_slots = []
    starts = [0]
    for request, count in rows:
        table[request.slot, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
        for position in range(request.length, request.length + count):
            page = request.pages[position // page_size]
            kv_slots.append(page * page_size + position % page_size)
        starts.append(starts[-1] + count)
    local_size = page_size
    if share is not None:
        local_size //= share.ranks
        kv_slots = share.slots(np.array(kv_slots, dtype=np.int32), local_size, elsewhere).tolist()
    return PagedRows(
        query_starts=np.array(starts, dtype=np.int32),
        context_lens=np.array([request.length for request, _ in rows], dtype=np.int32),
        row_slots=np.array([request.slot for request, _ in rows], dtype=np.int32),
        page_table_XP=table,
        kv_slots_T=torch.tensor(kv_slots, dtype=torch.int64),
        page_size=local_size,
        share=share,
    )


class Driver:
    """Runs steps of a model over pools of its own, all of whose groups keep all pages.

    With a share of every context, pages have `page_size` positions on each of its ranks.
    """

    def __init__(
        self,
        model: Model,
        *,
        pages: int = 64,
        page_size: int = 16,
        slots: int = 16,
        seed: int = 0,
        share: ContextShare | None = None,
    ) -> None:
        device = torch.device("cpu")
        self.model = model
        self.page_size = page_size * (share.ranks if share else 1)
        self.share = share
        self.kv = KVPools(
            model.kv_specs(),
            pages=pages,
            page_size=page_size,
            device=device,
            padded=share is not None,
        )
        self._elsewhere = pages * page_size
        for group, spec in enumerate(model.kv_specs()):
            for layer in range(spec.layers):
                pools = (
                    self.kv.layer(group, layer)
                    if not spec.latent
                    else (self.kv.latents(group, layer),)
                )
                for pool in pools:
                    # What is read without having been written shows.
                    pool.fill_(float("nan"))
        self._free = list(range(pages))
        random.Random(seed).shuffle(self._free)
        self._table = torch.full((slots, pages), -1, dtype=torch.int32)
        self._slots = list(range(slots))

    def request(self) -> Request:
        """A new request without tokens."""
        return Request(slot=self._slots.pop())

    def release(self, request: Request) -> None:
        """Give its pages and its slot back."""
        self._free.extend(request.pages)
        self._slots.append(request.slot)

    def step(
        self, rows: Sequence[tuple[Request, Sequence[int]]], *, all_logits: bool = False
    ) -> torch.Tensor:
        """One forward over the new tokens of each row.

        Returns:
            logits [S, V] of each row's last token, or of every token.
        """
        for request, tokens in rows:
            while len(request.pages) * self.page_size < request.length + len(tokens):
                request.pages.append(self._free.pop())
        counted = [(request, len(tokens)) for request, tokens in rows]
        paged = build_rows(
            counted, self._table, self.page_size, share=self.share, elsewhere=self._elsewhere
        )
        token_ids = [token for _, tokens in rows for token in tokens]
        positions = [
            position
            for request, count in counted
            for position in range(request.length, request.length + count)
        ]
        lasts = [int(end) - 1 for end in paged.query_starts[1:]]
        batch = ForwardBatch(
            token_ids_T=torch.tensor(token_ids),
            positions_T=torch.tensor(positions),
            groups=(paged,) * len(self.kv.pools),
            sample_token_indices_S=torch.tensor(
                list(range(len(token_ids))) if all_logits else lasts
            ),
        )
        with torch.inference_mode():
            logits_SV = self.model.forward(batch, self.kv)
        for request, count in counted:
            request.length += count
        return logits_SV

    def prefill(self, tokens: Sequence[int], *, chunk: int) -> torch.Tensor:
        """Logits [tokens, V] of one request run in chunks of at most `chunk` tokens."""
        request = self.request()
        parts = [
            self.step([(request, tokens[start : start + chunk])], all_logits=True)
            for start in range(0, len(tokens), chunk)
        ]
        self.release(request)
        return torch.cat(parts)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation, token by token."""
        request = self.request()
        tokens: list[int] = []
        following = list(prompt)
        for _ in range(count):
            following = [int(self.step([(request, following)]).argmax())]
            tokens += following
        self.release(request)
        return tokens
