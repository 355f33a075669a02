"""A stream begins with its first message, or after a while without one."""

import asyncio
from typing import Any

from tokenspeed.entrypoint.opening import StreamOpening


class Call:
    """What a gRPC call was told, and what it refuses: metadata beside or after a message."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self._busy = False

    async def write(self, message: Any) -> None:
        await self._tell(message)

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        assert not self.told
        await self._tell("metadata")

    async def _tell(self, what: Any) -> None:
        assert not self._busy
        self._busy = True
        await asyncio.sleep(0)
        self._busy = False
        self.told.append(what)


def test_a_silent_call_is_opened_and_goes_on() -> None:
    async def run() -> list[Any]:
        call = Call()
        opening = StreamOpening(call, after_s=0.0)
        while not call.told:
            await asyncio.sleep(0)
        await opening.write(1)
        await opening.write(2)
        await opening.close()
        return call.told

    assert asyncio.run(run()) == ["metadata", 1, 2]


def test_a_message_that_comes_first_opens_the_call_by_itself() -> None:
    async def run() -> list[Any]:
        call = Call()
        opening = StreamOpening(call, after_s=0.0)
        await opening.write(1)
        for _ in range(5):
            await asyncio.sleep(0)
        await opening.close()
        return call.told

    assert asyncio.run(run()) == [1]


def test_an_opening_and_a_message_at_once_take_turns() -> None:
    async def run() -> list[Any]:
        call = Call()
        opening = StreamOpening(call, after_s=0.0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await opening.write(1)
        await opening.close()
        return call.told

    assert asyncio.run(run())[-1] == 1


def test_a_call_that_ended_is_not_opened() -> None:
    async def run() -> list[Any]:
        call = Call()
        opening = StreamOpening(call, after_s=0.0)
        await opening.close()
        for _ in range(5):
            await asyncio.sleep(0)
        return call.told

    assert asyncio.run(run()) == []
