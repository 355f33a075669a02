"""Finds the step-time model of a device from steps that ran on it."""

from collections.abc import Sequence

import numpy as np

from tokenspeed.bench.hardware import StepTime
from tokenspeed.core.errors import ConfigError
from tokenspeed.core.step import StepWork

__all__ = ["fit_step_time"]


def fit_step_time(steps: Sequence[tuple[StepWork, float]]) -> StepTime:
    """The linear model (`weights_us` 0) that fits best, no cost negative.

    Least squares of the relative error. Costs that come out negative are taken out, the most
    negative one first, and the rest is fitted again.

    Args:
        steps: what each ran, and the microseconds it took.

    Raises:
        ConfigError: there are fewer steps than costs, or one took no time.
    """
    names = ("step_us", "prefill_token_us", "decode_row_us", "kv_token_us", "pair_us")
    if len(steps) < len(names):
        raise ConfigError(f"{len(steps)} steps do not tell {len(names)} costs; measure more")
    took_us = np.array([took for _, took in steps])
    if not (took_us > 0).all():
        raise ConfigError("a step that took no time tells nothing; measure with a finer clock")
    terms = np.array(
        [
            (
                1.0,
                work.prefill_tokens,
                work.decode_rows,
                work.context_tokens,
                work.prefill_pairs,
            )
            for work, _ in steps
        ]
    )
    weighted = terms / took_us[:, None]
    # Columns of like size keep the solution exact: pairs count in millions, rows in ones.
    sizes = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    kept = [index for index in range(len(names)) if weighted[:, index].any()]
    costs = np.zeros(len(names))
    while kept:
        found, *_ = np.linalg.lstsq(
            weighted[:, kept] / sizes[kept], np.ones(len(steps)), rcond=None
        )
        if (found >= 0).all():
            costs[kept] = found / sizes[kept]
            break
        del kept[int(found.argmin())]
    return StepTime(**dict(zip(names, costs.tolist(), strict=True)))
