"""The engine process: `python -m tokenspeed.engine --socket PATH --config-json JSON`."""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep
from tokenspeed.engine.ahead import take_memory
from tokenspeed.engine.core import Engine
from tokenspeed.engine.server import serve
from tokenspeed.loader import Progress, resolve


def main() -> int:
    """Serve one engine on a Unix-domain socket until it is told to stop or its parent is gone."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.engine", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="path of the socket to bind")
    parser.add_argument("--config-json", required=True, help="an EngineConfig as JSON")
    arguments = parser.parse_args()
    parent_pid = os.getppid()
    config = msgspec.json.decode(arguments.config_json, type=EngineConfig)

    let_threads_sleep()
    # Modules and a model are many objects that stay: looking through them for garbage, again and
    # again while they come, takes a fifth of the time that imports take.
    gc.disable()

    def build(progress: Progress, found: Callable[[Path], None]) -> Engine:
        files = resolve(config.model, progress=progress)
        found(files.tokenizer_dir)
        memory = take_memory(config, files)
        # Imported late, for the torch behind it: meanwhile the system makes memory, and the client
        # reads the tokenizer.
        from tokenspeed.engine.build import build_engine  # noqa: PLC0415

        engine = build_engine(config, progress=progress, memory=memory, learn=False)
        gc.freeze()
        gc.enable()
        return engine

    code = serve(
        build,
        arguments.socket,
        parent_pid=parent_pid,
        stream_interval_s=config.stream_interval_ms / 1000,
    )
    # A frame of torch's import refers to itself, and by those that called it to the engine: the
    # interpreter's last look for garbage frees both.
    gc.unfreeze()
    if config.tp * config.cp > 1:
        # Threads that listen to other ranks, and Ray's, still hold what the interpreter would take
        # down, of which it would complain; everything that matters is closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
