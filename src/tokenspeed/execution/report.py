"""Log-probabilities of a step that was sampled in several parts.

Legend: L log-probabilities.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tokenspeed.core.step import SampledLogprobs

__all__ = ["joined"]


def joined(parts: Sequence[tuple[npt.NDArray[np.intp], SampledLogprobs]]) -> SampledLogprobs | None:
    """The log-probabilities of samples that were taken in several parts.

    Args:
        parts: the samples of each, and its log-probabilities, which count these.
    """
    if not parts:
        return None
    indices_L = np.concatenate([samples[found.sample_indices] for samples, found in parts])
    order_L = np.argsort(indices_L)
    width = max(found.top_values.shape[1] for _, found in parts)

    def wide(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.pad(values, ((0, 0), (0, width - values.shape[1])))

    return SampledLogprobs(
        sample_indices=indices_L[order_L].astype(np.int32),
        chosen=np.concatenate([found.chosen for _, found in parts])[order_L],
        top_token_ids=np.concatenate([wide(found.top_token_ids) for _, found in parts])[order_L],
        top_values=np.concatenate([wide(found.top_values) for _, found in parts])[order_L],
        top_counts=np.concatenate([found.top_counts for _, found in parts])[order_L],
    )
