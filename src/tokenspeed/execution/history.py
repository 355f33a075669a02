"""The tokens a request has seen, for penalties.

Legend: V vocabulary, L distinct tokens seen, N tokens.
"""

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array

__all__ = ["TokenHistory"]


class TokenHistory:
    """Counts of one request's tokens; penalties read only the tokens that occurred.

    Args:
        tokens_N: int32, prompt and then output so far.
        prompt_count: how many of them are the prompt.
        vocabulary: V; token ids below it.
        params: repetition counts prompt and output; presence and frequency only the output.
        device: where penalties are computed.
    """

    def __init__(
        self,
        tokens_N: Int32Array,
        *,
        prompt_count: int,
        vocabulary: int,
        params: SamplingParams,
        device: torch.device,
    ) -> None:
        self.params = params
        self._device = device
        self._seen_V: npt.NDArray[np.bool_] = np.zeros(vocabulary, dtype=np.bool_)
        if params.repetition_penalty != 1.0:
            self._seen_V[tokens_N[:prompt_count]] = True
        output_N = tokens_N[prompt_count:]
        self._seen_V[output_N] = True
        self._counts_V: npt.NDArray[np.int32] = np.bincount(output_N, minlength=vocabulary).astype(
            np.int32
        )

    def push(self, token: int) -> None:
        """Count one more output token."""
        self._seen_V[token] = True
        self._counts_V[token] += 1

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [L] ids that a penalty touches, ascending; int32 [L] occurrences in the output."""
        ids_L = np.flatnonzero(self._seen_V)
        counts_L = torch.from_numpy(self._counts_V[ids_L])
        return torch.from_numpy(ids_L).to(self._device), counts_L.to(self._device)
