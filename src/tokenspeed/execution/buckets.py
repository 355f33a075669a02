"""Which steps are captured on GPUs: sizes that others are filled up to."""

from dataclasses import dataclass
from typing import Final

from tokenspeed.core.step import StepPlan

__all__ = ["Bucket", "bucket_for", "buckets_of"]

DRAFT_WIDTHS: Final = (2, 4, 8)
"""Tokens of a row with a draft. Attention takes more of them for a prompt's."""

DRAFT_TOKENS_MAX: Final = 256
"""Most tokens of a step with drafts, what fills it up included. Up to some 200 tokens a product
takes as long as reading its weights, so that filling is nearly free; beyond, it is computed in
vain, and the step is long enough for launches from Python to be hidden behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A step of rows with as many tokens each.

    Attributes:
        rows: how many.
        width: tokens of each.
        samples: tokens whose logits it has room for.
    """

    rows: int
    width: int
    samples: int

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.width

    @property
    def drafts(self) -> bool:
        """Whether rows have tokens behind their first one."""
        return self.width > 1


def buckets_of(rows_max: int, drafts_max: int = 0) -> tuple[Bucket, ...]:
    """What steps are captured for, ascending by width and by rows.

    Of rows without drafts at most an eighth of a large step is filling. With drafts rows double,
    which makes 20 buckets for 64 rows: each is captured once, where those without drafts are
    captured three times, and there are 11 of them.

    Args:
        rows_max: of a step.
        drafts_max: drafted tokens of a step.
    """
    plain = (1, 2, 4, *range(8, 64, 8), *range(64, rows_max + 32, 32))
    doubling = [1 << power for power in range(DRAFT_TOKENS_MAX.bit_length())]
    found = [
        Bucket(rows=rows, width=1, samples=rows)
        for rows in sorted({min(rows, rows_max) for rows in plain})
    ]
    for width in DRAFT_WIDTHS:
        # The shortest row that wants this width has half of it, and one more.
        if width // 2 > drafts_max:
            continue
        for rows in sorted({min(rows, rows_max) for rows in doubling}):
            if rows * width <= DRAFT_TOKENS_MAX:
                samples = min(rows * width, rows + drafts_max)
                found.append(Bucket(rows=rows, width=width, samples=samples))
    return tuple(found)


def bucket_for(plan: StepPlan, buckets: tuple[Bucket, ...]) -> Bucket | None:
    """The smallest bucket that a plan fits into; None if it fits into none, or has prompts.

    Args:
        plan: what runs.
        buckets: ascending, as `buckets_of` gives them.
    """
    rows = len(plan.row_slots)
    if rows != plan.decode_count or len(plan.token_ids) != len(plan.sample_rows):
        return None
    starts = plan.query_starts
    longest = 1 if len(plan.token_ids) == rows else int((starts[1:] - starts[:-1]).max())
    for bucket in buckets:
        if bucket.rows >= rows and bucket.width >= longest:
            return bucket
    return None
