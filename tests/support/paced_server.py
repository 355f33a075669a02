"""An OpenAI-compatible server that streams on a schedule, and keeps the times of all it did."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self


@dataclass
class Served:
    """One request and when the server had it and wrote each token, by time.perf_counter."""

    body: dict[str, Any]
    received_s: float
    token_s: list[float] = field(default_factory=list)


@dataclass
class Pace:
    """Seconds until the first token and between two, by request; called with the request's body."""

    first_s: Callable[[dict[str, Any]], float] = lambda body: 0.0
    token_s: float = 0.0
    # Answers end after so many tokens, whatever was asked for.
    tokens_max: int | None = None
    with_usage: bool = True
    cached_tokens: Callable[[dict[str, Any]], int] = lambda body: 0
    # (status, text) in place of an answer, where it is given for a request.
    refusal: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None
    # An event in place of the token of that number.
    broken_at: int | None = None
    # The stream ends after so many tokens as if it were whole, but for its last event.
    cut_at: int | None = None


def words_of(body: dict[str, Any]) -> int:
    """This server's tokens are words."""
    return sum(len(message["content"].split()) for message in body["messages"])


async def wait(seconds: float) -> None:
    await asyncio.sleep(seconds)


class PacedServer:
    """Runs in a thread of its own until the block is left. `pause` is how its time passes."""

    def __init__(
        self, pace: Pace | None = None, *, pause: Callable[[float], Awaitable[None]] = wait
    ) -> None:
        self.pace = pace or Pace()
        self.served: list[Served] = []
        self.port = 0
        self._pause = pause
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.main()), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)

    async def main(self, port: int = 0) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self.announce()
        await self._over.wait()
        server.close()

    def announce(self) -> None:
        """For a server in a process of its own: it listens."""

    def answered(self) -> None:
        """For a server in a process of its own: it gave an answer."""

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                length = 0
                while (header := (await reader.readline()).strip().lower()) != b"":
                    name, _, value = header.partition(b":")
                    if name == b"content-length":
                        length = int(value)
                data = await reader.readexactly(length)
                received_s = time.perf_counter()
                if line.startswith(b"GET"):
                    self._reply(writer, 200, {"data": [{"id": "paced"}]})
                else:
                    await self._chat(writer, Served(json.loads(data), received_s))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _reply(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)

    async def _chat(self, writer: asyncio.StreamWriter, served: Served) -> None:
        self.served.append(served)
        body, pace = served.body, self.pace
        refusal = pace.refusal(body)
        if refusal is not None:
            self._reply(writer, refusal[0], {"error": {"message": refusal[1]}})
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        await self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
        count = min(body["max_tokens"], pace.tokens_max or body["max_tokens"])
        for index in range(count):
            await self._pause(pace.token_s if index else pace.first_s(body))
            if index == pace.cut_at:
                writer.write(b"0\r\n\r\n")
                return
            if index == pace.broken_at:
                await self._event(writer, {"error": {"message": "out of order"}})
                break
            served.token_s.append(time.perf_counter())
            delta = {"content": f"t{len(self.served)}-{index} "}
            await self._event(writer, {"choices": [{"index": 0, "delta": delta}]})
        if pace.with_usage:
            usage = {
                "prompt_tokens": words_of(body),
                "completion_tokens": count,
                "prompt_tokens_details": {"cached_tokens": pace.cached_tokens(body)},
            }
            await self._event(writer, {"choices": [], "usage": usage})
        await self._send(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        self.answered()

    async def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        await self._send(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()


class _Announced(PacedServer):
    def announce(self) -> None:
        print(self.port, flush=True)

    def answered(self) -> None:
        print("answered", flush=True)


if __name__ == "__main__":
    # A server to kill, on the port that is its argument. It prints the port, and a line for each
    # answer.
    asyncio.run(_Announced(Pace(token_s=0.002)).main(int(sys.argv[1]) if sys.argv[1:] else 0))
