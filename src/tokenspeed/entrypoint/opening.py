"""When a streamed answer begins: with its first token, or once its client should hear something."""

import asyncio
import contextlib
from typing import Any

__all__ = ["OPEN_AFTER_S", "StreamOpening"]

# The gateway answers its client once a call has sent its first metadata: until then a refusal has
# a status of its own (400, 429, 503), from then on silence is filled with signs of life and a
# refusal is an event of the stream. Most refusals come at once; a long prompt takes longer.
OPEN_AFTER_S = 2.0


class StreamOpening:
    """The beginning of one gRPC call whose messages are streamed.

    Opens the stream after `OPEN_AFTER_S` if nothing was written until then. `close` belongs to
    the end of the call.
    """

    def __init__(self, context: Any, after_s: float = OPEN_AFTER_S) -> None:
        self._context = context
        self._opened = False
        self._turn = asyncio.Lock()
        self._waiting = asyncio.create_task(self._open(after_s))

    async def write(self, message: Any) -> None:
        """Write a message; the first one opens the stream."""
        if self._opened:
            await self._context.write(message)
            return
        async with self._turn:
            await self._context.write(message)
            self._opened = True

    async def close(self) -> None:
        """Open no more. What follows on the call is not written meanwhile."""
        async with self._turn:
            self._opened = True
        self._waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._waiting

    async def _open(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        async with self._turn:
            if not self._opened:
                # A call that was cancelled meanwhile takes no metadata, and needs none.
                with contextlib.suppress(Exception):
                    await self._context.send_initial_metadata(())
                self._opened = True
