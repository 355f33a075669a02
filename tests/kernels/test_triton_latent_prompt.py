"""Long prompts over latents whose keys and values are made first, interpreted."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.triton_cases import GPU, SEED, drawn_cases, interpreting, verify_interpreted
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.kernels import KernelSelector, Platform
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.triton import latent_prompt
from tokenspeed.kernels.verify.paging import scattered_rows
from tokenspeed.modeling.config import LatentConfig
from tokenspeed.modeling.layers.latent import LatentHeads
from tokenspeed.modeling.layers.rotary import Angles

pytestmark = needs_interpreter
__all__ = ["interpreting"]

CPU = torch.device("cpu")
CONFIG = LatentConfig(
    q_rank=None, kv_rank=48, plain_dim=16, rotated_dim=8, value_dim=12, interleaved=False
)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a prompt has several."""
    monkeypatch.setattr(latent_prompt, "CHUNK", 70)
    return


def test_chunks_of_a_prompt_are_merged_to_what_the_formula_says() -> None:
    for kernel, case in drawn_cases("attention.prompt_mla", each=4):
        verify_interpreted(kernel, case)


def heads_on(platform: Platform | None, *, deterministic: bool = False) -> LatentHeads:
    kernels = KernelSelector(
        device=CPU,
        dtype=torch.float32,
        platform=platform,
        overrides=None if platform else {"attention.paged_mla": "reference"},
        deterministic=deterministic,
    )
    heads = LatentHeads(3, CONFIG, scale=0.2, kernels=kernels)
    generator = torch.Generator().manual_seed(5)
    for name, weight in heads.weights():
        centre = 1.0 if "norm" in name else 0.0
        weight.tensor.normal_(centre, 0.3, generator=generator)
    return heads


def ran(heads: LatentHeads, rows: PagedRows, pages: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    tokens = int(rows.query_starts[-1])
    q_THD = torch.randn(tokens, 3, 24, generator=generator)
    kv_TE = torch.randn(tokens, 56, generator=generator)
    turns_TE = torch.randn(tokens, 4, generator=generator)
    latents_PCE = torch.randn(pages, 16, 56, generator=generator) * size
    angles = Angles(turns_TE.cos(), turns_TE.sin())
    return heads(q_THD, kv_TE, angles, rows, latents_PCE)


LENGTHS = [(150, 1), (90, 110), (40, 2), (0, 130)]


def test_prompts_with_made_keys_give_what_absorbed_queries_give_beside_other_rows() -> None:
    for lengths in (LENGTHS, LENGTHS[1:2], LENGTHS[2:3]):
        rows, pages = scattered_rows(lengths, page_size=16, seed=SEED % 1000)
        wanted = ran(heads_on(None), rows, pages)
        found = ran(heads_on(GPU), rows, pages)
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), lengths


def test_a_later_chunk_may_weigh_more_than_numbers_can_say() -> None:
    """Sums of two chunks are merged by their logarithms, whichever is the greater."""
    rows, pages = scattered_rows([(290, 110)], page_size=16, seed=SEED % 1000)
    wanted = ran(heads_on(None), rows, pages, size=300.0)
    found = ran(heads_on(GPU), rows, pages, size=300.0)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_only_rows_are_parted_whose_positions_are_seen_by_enough_tokens() -> None:
    rows, _ = scattered_rows(LENGTHS, page_size=16, seed=1)
    parted = rows.parted(50.0)
    assert parted is not None
    assert [(row.start, row.end, row.context_len) for row in parted.prompts] == [
        (1, 111, 90),
        (113, 243, 0),
    ]
    assert parted.others is not None
    assert parted.others.query_starts.tolist() == [0, 1, 3]
    assert parted.others.context_lens.tolist() == [150, 40]
    assert parted.tokens_T is not None
    assert parted.tokens_T.tolist() == [0, 111, 112]
    assert torch.equal(parted.others.kv_slots_T, rows.kv_slots_T[parted.tokens_T])
    assert rows.parted(50.0) is parted
    assert rows.parted(70.0) is not None
    assert rows.parted(1000.0) is None


def test_deterministic_mode_and_cpus_run_absorbed() -> None:
    """A prompt's bits must be those of the same tokens decoded."""
    assert heads_on(GPU)._attend_prompt is not None
    assert heads_on(GPU, deterministic=True)._attend_prompt is None
    assert heads_on(None)._attend_prompt is None
