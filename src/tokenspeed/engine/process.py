"""Starts an engine process and watches over it. Imports no torch."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import EngineDead
from tokenspeed.engine.client import EngineClient, ProgressCallback
from tokenspeed.engine.pulse import Pulse, descendants

__all__ = ["EngineProcess"]

STOP_TIMEOUT_S = 10.0
# More than one engine is ever asked for.
_REQUESTS_MAX = 1 << 40


class EngineProcess:
    """One engine process, its socket folder and its client. Made by `start`.

    Attributes:
        client: speaks to the engine.
        exited: done when the process has ended; its result says how, for people.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, client: EngineClient, folder: Path
    ) -> None:
        self.client = client
        self._process = process
        self._folder = folder
        self._hang: str | None = None
        self._feeling = asyncio.create_task(self._feel())
        self.exited: asyncio.Task[str] = asyncio.create_task(self._watch())

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_progress: ProgressCallback | None = None,
        command: Sequence[str] = (sys.executable, "-m", "tokenspeed.engine"),
    ) -> "EngineProcess":
        """Start an engine and wait until it takes requests.

        Args:
            config: what the engine is started with.
            on_progress: called as the model loads.
            command: the program, which takes --socket and --config-json.

        Raises:
            EngineDead: the process ended without a word.
            TokenSpeedError: the engine's own reason not to start.
        """
        # mkdtemp's folder is the user's alone (0700), so nobody else reaches the socket.
        folder = Path(tempfile.mkdtemp(prefix="tokenspeed-"))
        socket_path = folder / "engine.sock"
        process = await asyncio.create_subprocess_exec(
            *command,
            "--socket",
            str(socket_path),
            "--config-json",
            msgspec.json.encode(config).decode(),
        )
        connecting = asyncio.create_task(
            EngineClient.connect(
                socket_path,
                on_progress=on_progress,
                first_request=1 + config.dp_rank * _REQUESTS_MAX,
            )
        )
        dying = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({connecting, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                # The last words of a dying engine are on their way.
                await asyncio.wait({connecting}, timeout=1.0)
            if not connecting.done():
                raise EngineDead(f"the engine process ended as it started: {_how(process)}")
            client = connecting.result()
        except BaseException:
            connecting.cancel()
            dying.cancel()
            await asyncio.gather(connecting, dying, return_exceptions=True)
            await _end(process)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        dying.cancel()
        return cls(process, client, folder)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def stop(self) -> None:
        """End the process: asked first, then terminated, then killed."""
        # An engine that was told to end answers nothing more.
        self._feeling.cancel()
        if not self.exited.done():
            self.client.shut_down()
            await asyncio.wait({self.exited}, timeout=STOP_TIMEOUT_S)
        await _end(self._process)
        await self.exited
        self.client.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _watch(self) -> str:
        await self._process.wait()
        self._feeling.cancel()
        # What it still said before it ended should be heard first.
        await asyncio.sleep(0.05)
        ended = f"the engine process {self._process.pid} ended: {_how(self._process)}"
        if (told := self.client.cause) is not None:
            ended = f"{ended}; {told}"
        reason = ended if self._hang is None else f"{ended}, for {self._hang}"
        self.client.fail(reason)
        return reason

    async def _feel(self) -> None:
        """Kill the engine once it hangs: nothing else ends a process that hears nothing."""
        with contextlib.suppress(EngineDead):
            self._hang = await Pulse(self.client, self.pid).lost()
            # Those that it started wait for it, and may hang as well.
            for pid in (*descendants(self.pid), self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _how(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    if code is None:
        return "unknown"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


async def _end(process: asyncio.subprocess.Process) -> None:
    for end in (process.terminate, process.kill):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), timeout=STOP_TIMEOUT_S)
