"""The engine's loop over a tiny model, without a tokenizer: many draws of short texts."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from tests.models.tiny import build, read_tensors, write_tiny
from tokenspeed.cache import KVPools
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.pace import learn_drafts
from tokenspeed.engine.wire import Submit
from tokenspeed.execution import Runner

__all__ = ["TinyEngine"]

PROMPT_TOKENS = 24
SLOTS = 64
CPU = torch.device("cpu")


class TinyEngine:
    """A model of random weights that samples among the three likeliest tokens.

    Args:
        folder: where its checkpoint is written.
        drafts: whether steps may have drafts.

    Attributes:
        control: the control plane.
    """

    def __init__(self, folder: Path, *, drafts: bool) -> None:
        write_tiny("llama", folder)
        hf_config = json.loads((folder / "config.json").read_text())
        model = build(hf_config, native_formats=True)
        model.load_weights(read_tensors(folder).items())
        config = SchedulerConfig(
            groups=(CacheGroup(pages=8 * SLOTS),),
            page_size=16,
            slots_max=SLOTS,
            step_tokens_max=1024,
            context_max=64,
            step_drafts_max=SLOTS if drafts else 0,
        )
        pools = KVPools(model.kv_specs(), pages=8 * SLOTS, page_size=16, device=CPU)
        self._runner = Runner(model, pools, config, device=CPU, threads=1)
        self._runner.warm_up()
        self.control = Scheduler(config)
        if drafts:
            learn_drafts(self._runner, config, self.control)
        self._core = EngineCore(
            self.control, self._runner, eos_token_ids=(), overlap_depth=0, seed=0
        )
        self._requests = 0

    def draw(
        self, prompt: int, *, count: int, tokens: int, first_seed: int
    ) -> Counter[tuple[int, ...]]:
        """How often each text came up.

        Args:
            prompt: number of one that says a few tokens over and over.
            count: draws.
            tokens: of a text.
            first_seed: of the first draw; the others have those that follow.
        """
        dice = np.random.Generator(np.random.Philox(prompt))
        said = dice.integers(0, 199, 4 + prompt % 5)
        ids = np.resize(said, PROMPT_TOKENS).astype(np.int32).tobytes()
        params = SamplingParams(top_k=3, max_new_tokens=tokens)
        texts: dict[int, list[int]] = {}
        for seed in range(first_seed, first_seed + count):
            self._requests += 1
            texts[self._requests] = []
            self._core.submit(Submit(self._requests, ids, params, tokens, seed, 0, 0, None))
        while self._core.busy:
            outputs = self._core.step()
            if outputs is None:
                continue
            requests = np.frombuffer(outputs.requests, dtype=np.int64).tolist()
            found = np.frombuffer(outputs.tokens, dtype=np.int32).tolist()
            for request, token in zip(requests, found, strict=True):
                texts[request].append(token)
        return Counter(tuple(text) for text in texts.values())

    def close(self) -> None:
        """Free the runner."""
        self._core.close()
