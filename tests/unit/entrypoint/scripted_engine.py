"""An engine client whose engine says what a test tells it to; streams are the real ones."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from tokenspeed.core.errors import EngineDead
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import FinishReason
from tokenspeed.engine.facts import EngineInfo, EngineStats, LiveRequest, StepTiming
from tokenspeed.engine.ledger import INTERVAL_BOUNDS_US
from tokenspeed.engine.stream import TokenStream
from tokenspeed.engine.wire import CacheEventBatch

EOS = 2


class ScriptedEngine:
    """Answers each request with the tokens 10, 11, ... up to its limit, as steps are taken."""

    def __init__(self, tokenizer_dir: Path = Path()) -> None:
        self.info = EngineInfo(
            model_name="scripted",
            architecture="LlamaForCausalLM",
            model_type="llama",
            model_path="scripted.gguf",
            tokenizer_dir=str(tokenizer_dir),
            quantisation="F32",
            dtype="float32",
            vocab_size=1000,
            context_max=512,
            eos_token_ids=[EOS],
            bos_token_id=1,
            pad_token_id=None,
            default_sampling={"temperature": 0.5, "top_k": 7},
            pages=64,
            page_size=4,
            slots_max=8,
            step_tokens_max=64,
            overlap_depth=0,
            weights_size_bytes=1000,
            kv_size_bytes=2000,
            tps_floor=None,
            tps_alone=None,
        )
        # Token 20 is "aa", the others below 100 are a letter each.
        self.tokenizer = SimpleNamespace(
            bytes_of=lambda token: b"aa" if token == 20 else bytes([ord("a") + token % 10]),
            control_token_ids=frozenset({EOS}),
        )
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.tenants: list[str | None] = []
        self.salts: list[int] = []
        self.streams: list[TokenStream] = []
        self.aborted: list[int] = []
        self.cache: asyncio.Queue[CacheEventBatch] = asyncio.Queue()
        self.dead = False
        self.steps = 5

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: int = 0,
        priority: int = 0,
        tenant: str | None = None,
    ) -> TokenStream:
        if self.dead:
            raise EngineDead("the engine is gone")
        index = len(self.streams)
        stream = TokenStream(
            request=index,
            prompt_tokens=len(prompt),
            stop_strings=None,
            abort=lambda: self.aborted.append(index),
        )
        self.prompts.append([int(token) for token in prompt])
        self.params.append(params)
        self.tenants.append(tenant)
        self.salts.append(salt)
        self.streams.append(stream)
        return stream

    async def wait_for_requests(self, count: int) -> None:
        while len(self.streams) < count:
            await asyncio.sleep(0)

    def finish(self, index: int, count: int, *, with_eos: bool = False) -> None:
        """Give a request its tokens, one step each, and its end."""
        stream = self.streams[index]
        for token in range(10, 10 + count):
            stream.push(token, 3)
        if with_eos:
            stream.push(EOS, 3, is_stop=True)
            stream.push_end(FinishReason.STOP, stop_token_id=EOS)
        else:
            stream.push_end(FinishReason.LENGTH)

    async def stats(self) -> EngineStats:
        if self.dead:
            raise EngineDead("the engine is gone")
        return EngineStats(
            running=2,
            waiting=1,
            parked=0,
            transferring=0,
            waiting_uncached_tokens=9,
            pages_total=64,
            pages_free=32,
            pages_cached=16,
            pages_active=16,
            host_pages_total=0,
            host_pages_cached=0,
            steps=self.steps,
            prompt_tokens=100,
            cached_tokens=25,
            missed_evicted_tokens=10,
            missed_unseen_tokens=45,
            missed_other_salt_tokens=0,
            missed_tail_tokens=20,
            output_tokens=50,
            proposed_tokens=0,
            draft_memory_size_bytes=0,
            retractions=0,
            drafted_tokens=0,
            accepted_tokens=0,
            parkings=0,
            evictions=0,
            stores=0,
            loads=0,
            refusals=0,
            uptime_s=2.0,
            output_tokens_per_s=25.0,
            timing=StepTiming(intervals=[0] * (len(INTERVAL_BOUNDS_US) + 1)),
        )

    async def live_requests(self) -> list[LiveRequest]:
        return []

    async def flush_cache(self, timeout_s: float) -> bool:
        return timeout_s > 0

    async def start_profile(self, output_dir: str | None, steps: int | None) -> str:
        return f"{output_dir}/trace-{steps}"

    async def stop_profile(self) -> str:
        return "trace"

    async def subscribe_cache(self) -> AsyncIterator[CacheEventBatch]:
        while True:
            yield await self.cache.get()
