"""Short texts drawn from a tiny model by its runner, with guesses in every step or with none."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from tests.models.tiny import build, read_tensors, write_tiny
from tests.unit.execution.tiny import Planner, Request, bind, config_of
from tokenspeed.cache import KVPools
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner

__all__ = ["TinyDraws"]

PROMPT_TOKENS = 12
SLOTS = 64
CPU = torch.device("cpu")


class TinyDraws:
    """A model of random weights that samples among its three likeliest tokens.

    Args:
        folder: where its checkpoint is written.

    Attributes:
        drafted, accepted: guesses so far, and those that were right.
    """

    def __init__(self, folder: Path) -> None:
        write_tiny("llama", folder)
        model = build(json.loads((folder / "config.json").read_text()), native_formats=True)
        model.load_weights(read_tensors(folder).items())
        sizes = {"page_size": 16, "pages": 2 * SLOTS, "slots_max": SLOTS, "context_max": 64}
        self._config = config_of(**sizes, step_tokens_max=1024, step_drafts_max=8 * SLOTS)
        pools = KVPools(model.kv_specs(), pages=2 * SLOTS, page_size=16, device=CPU)
        self._runner = Runner(model, pools, self._config, device=CPU, threads=1)
        self._runner.warm_up()
        self.drafted = self.accepted = 0

    def draw(
        self, prompt: int, *, count: int, tokens: int, first_seed: int, drafts: bool
    ) -> Counter[tuple[int, ...]]:
        """How often each text came up.

        Args:
            prompt: its number.
            count: draws.
            tokens: of a text.
            first_seed: of the first draw; the others have those that follow.
            drafts: whether steps guess the rest of the likeliest text.
        """
        dice = np.random.Generator(np.random.Philox(prompt))
        ids: list[int] = dice.integers(0, 199, PROMPT_TOKENS).tolist()
        greedy = SamplingParams(temperature=0.0)
        (likeliest,) = self._batch(ids, [0], greedy, tokens, None)
        drawn = SamplingParams(top_k=3)
        found: Counter[tuple[int, ...]] = Counter()
        for start in range(0, count, SLOTS):
            seeds = range(first_seed + start, first_seed + min(count, start + SLOTS))
            guess = likeliest if drafts else None
            found.update(map(tuple, self._batch(ids, list(seeds), drawn, tokens, guess)))
        return found

    def close(self) -> None:
        """Free the runner."""
        self._runner.close()

    def _batch(
        self,
        ids: list[int],
        seeds: list[int],
        params: SamplingParams,
        tokens: int,
        guess: list[int] | None,
    ) -> list[list[int]]:
        """A text for each seed."""
        planner = Planner(self._config)
        requests = [Request(slot=slot, prompt=list(ids)) for slot in range(len(seeds))]
        for request, seed in zip(requests, seeds, strict=True):
            bind(self._runner, request, params, seed=seed)
        plan = planner.plan([], [(request, len(ids)) for request in requests])
        texts = [[token] for token in self._runner.launch(plan).result().tokens.tolist()]
        while live := [request for request in requests if len(texts[request.slot]) < tokens]:
            drafts = {
                # A text may have one token more than is guessed.
                request.slot: (guess or [])[len(texts[request.slot]) : tokens - 1]
                for request in live
            }
            plan = planner.plan(live, drafts=drafts)
            sampled = iter(self._runner.launch(plan).result().tokens.tolist())
            for request in live:
                draft = drafts[request.slot]
                row = [next(sampled) for _ in range(1 + len(draft))]
                right = 0
                while right < len(draft) and row[right] == draft[right]:
                    right += 1
                texts[request.slot] += row[: right + 1]
                planner.landed(request, draft, right + 1)
                self.drafted += len(draft)
                self.accepted += right
        return texts
