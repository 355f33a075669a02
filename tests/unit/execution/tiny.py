"""A small Llama of random weights, and plans for it made by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import GroupPlan, StepPlan
from tokenspeed.execution import Runner
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import Model, ModelConfig, build_model

__all__ = [
    "CPU",
    "GREEDY",
    "Planner",
    "Request",
    "bind",
    "config_of",
    "kernels",
    "runner_of",
    "tiny_model",
]

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)

SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def kernels() -> KernelSelector:
    return KernelSelector(device=CPU, dtype=torch.float32)


def tiny_model(seed: int = 0) -> Model:
    model = build_model(
        ModelConfig.from_hf(SIZES), dtype=torch.float32, device=CPU, kernels=kernels()
    )
    generator = torch.Generator().manual_seed(seed)
    for _, weight in model.weights():
        weight.data.copy_(torch.randn(weight.data.shape, generator=generator) * 0.6)
    return model


def config_of(**changes: int) -> SchedulerConfig:
    groups = (CacheGroup(pages=changes.pop("pages", 32), host_pages=changes.pop("host_pages", 0)),)
    sizes = {"page_size": 4, "slots_max": 8, "step_tokens_max": 64, "context_max": 64}
    return SchedulerConfig(groups=groups, **{**sizes, **changes})


def runner_of(config: SchedulerConfig, model: Model | None = None) -> Runner:
    model = model or tiny_model()
    (group,) = config.groups
    pools = KVPools(
        model.kv_specs(),
        pages=group.pages,
        page_size=config.page_size,
        device=CPU,
        host_pages=group.host_pages,
    )
    return Runner(model, pools, config, device=CPU, threads=1)


@dataclass(eq=False)
class Request:
    """A request of the planner."""

    slot: int
    prompt: list[int]
    pages: list[int] = field(default_factory=list)
    length: int = 0
    sampled: int = 0


class Planner:
    """Plans as a control plane would, whose cache groups all keep every page; pages are taken from
    the top."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.free = list(range(config.groups[0].pages))
        self.step = 0

    def plan(
        self,
        decodes: Sequence[Request] = (),
        prefills: Sequence[tuple[Request, int]] = (),
        *,
        drafts: Mapping[int, Sequence[int]] | None = None,
    ) -> StepPlan:
        """Decode rows, with drafts by their slots; then chunks of prompts, sampled where they end
        the prompt. A request with a draft is then to be told what `landed`."""
        drafts = drafts or {}
        rows = [(request, 1 + len(drafts.get(request.slot, ()))) for request in decodes]
        rows += prefills
        starts, tokens, samples, slots, table = [0], [], [], [], []
        for row, (request, count) in enumerate(rows):
            end = request.length + count
            decoding = row < len(decodes)
            if decoding:
                tokens += [0, *drafts.get(request.slot, ())]
            else:
                tokens += request.prompt[request.length : end]
            while len(request.pages) * self.config.page_size < end:
                table.append((request.slot, len(request.pages), self.free[-1]))
                request.pages.append(self.free.pop())
            for position in range(request.length, end):
                page = request.pages[position // self.config.page_size]
                slots.append(page * self.config.page_size + position % self.config.page_size)
            if end >= len(request.prompt):
                for _ in range(count if decoding else 1):
                    samples.append((row, request.sampled))
                    request.sampled += 1
            starts.append(starts[-1] + count)
        context = [request.length for request, _ in rows]
        for request, count in rows:
            request.length += count
        self.step += 1
        return StepPlan(
            step=self.step,
            decode_count=len(decodes),
            row_slots=ints([request.slot for request, _ in rows]),
            query_starts=ints(starts),
            context_lens=ints(context),
            token_ids=ints(tokens),
            sample_rows=ints([row for row, _ in samples]),
            sample_positions=ints([position for _, position in samples]),
            bound_slots=ints([]),
            bound_requests=np.zeros(0, dtype=np.int64),
            groups=(
                GroupPlan(
                    kv_slots=ints(slots),
                    table_slots=ints([change[0] for change in table]),
                    table_indices=ints([change[1] for change in table]),
                    table_pages=ints([change[2] for change in table]),
                ),
            )
            * len(self.config.groups),
        )

    @staticmethod
    def landed(request: Request, draft: Sequence[int], counting: int) -> None:
        """So many of a request's samples counted; the rest of its draft is forgotten."""
        wrong = 1 + len(draft) - counting
        request.length -= wrong
        request.sampled -= wrong


def ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def bind(runner: Runner, request: Request, params: SamplingParams, *, seed: int = 0) -> None:
    runner.bind(
        request.slot,
        params,
        seed=seed,
        prompt_count=len(request.prompt),
        tokens=ints(request.prompt),
        stop_token_ids=ints([]),
    )
