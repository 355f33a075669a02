"""The engine's cache events in the words of the gateway, which routes by them."""

import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from smg_grpc_proto.generated import common_pb2

from tokenspeed.entrypoint.loads import engine_load

if TYPE_CHECKING:
    from tokenspeed.engine.client import EngineClient
    from tokenspeed.engine.facts import EngineStats
    from tokenspeed.engine.wire import CacheEventBatch

__all__ = ["event_messages", "kv_events_of"]

# Blocks of one message: 1024 pages of 32 tokens are some 200 KB, far below gRPC's limit of 4 MB.
BLOCKS_MAX = 1024
# Counters are asked for at most this often, whatever the rate of cache events.
STATS_AGE_MAX_S = 0.25

_STORED, _REMOVED, _CLEARED = 0, 1, 2


async def event_messages(client: "EngineClient", *, after: int) -> AsyncIterator[Any]:
    """`KvEventBatch` messages of one subscription: the cache as it is, then each change.

    The first events clear what the gateway knew and store what the cache holds. Every message
    carries the engine's load.

    Args:
        after: the sequence number up to which the subscriber has seen everything; numbers of
            this subscription follow it.

    Raises:
        EngineDead: the engine is gone.
    """
    sequence = after
    loads = _Loads(client)
    async for batch in client.subscribe_cache():
        for events in kv_events_of(batch, client.info.page_size):
            sequence += 1
            yield common_pb2.KvEventBatch(
                sequence_number=sequence,
                timestamp=time.time(),
                events=events,
                dp_rank=0,
                load=await loads.record(),
            )


def kv_events_of(batch: "CacheEventBatch", page_size: int) -> Iterator[list[Any]]:
    """Lists of `KvCacheEvent`s of a batch in order, at most `BLOCKS_MAX` blocks a list.

    Pages stored one after the other on one chain become one event.
    """
    kinds = np.frombuffer(batch.kinds, dtype=np.int32).tolist()
    hashes = np.frombuffer(batch.hashes, dtype=np.int64).tolist()
    parents = np.frombuffer(batch.parents, dtype=np.int64).tolist()
    has_parent = np.frombuffer(batch.has_parent, dtype=np.bool_).tolist()
    tokens = np.frombuffer(batch.tokens, dtype=np.int32).reshape(-1, page_size)
    events: list[Any] = []
    blocks = 0
    stored = 0
    tip: int | None = None
    for kind, page_hash, parent, chained in zip(kinds, hashes, parents, has_parent, strict=True):
        if blocks == BLOCKS_MAX:
            yield events
            events, blocks, tip = [], 0, None
        if kind == _STORED:
            if not (chained and tip == parent):
                event = common_pb2.KvCacheEvent(event_id=stored)
                if chained:
                    event.stored.parent_block_hash = parent
                events.append(event)
            events[-1].stored.blocks.add(
                block_hash=page_hash, token_ids=tokens[stored].tolist(), block_size=page_size
            )
            stored += 1
            tip = page_hash
        elif kind == _REMOVED:
            if not (events and events[-1].HasField("removed")):
                events.append(common_pb2.KvCacheEvent())
            events[-1].removed.block_hashes.append(page_hash)
            tip = None
        else:
            assert kind == _CLEARED, f"unknown kind of cache event {kind}"
            events.append(common_pb2.KvCacheEvent(cleared=common_pb2.KvCacheCleared()))
            tip = None
        blocks += 1
    if events:
        yield events


class _Loads:
    """The engine's counters, read at most every `STATS_AGE_MAX_S`."""

    def __init__(self, client: "EngineClient") -> None:
        self._client = client
        self._stats: EngineStats | None = None
        self._read_at_s = 0.0
        self._samples = 0

    async def record(self) -> Any:
        now_s = time.monotonic()
        if self._stats is None or now_s - self._read_at_s > STATS_AGE_MAX_S:
            self._stats = await self._client.stats()
            self._read_at_s = now_s = time.monotonic()
        self._samples += 1
        age_ms = int(1000 * (now_s - self._read_at_s))
        return engine_load(self._stats, self._client.info, sample=self._samples, age_ms=age_ms)
