"""A rank that follows rank 0: `python -m tokenspeed.engine.follower`, started by `RankGroup`.

It runs the plans that rank 0 sends, in which the tokens of decode rows stand already, so that only
rank 0 samples and nothing goes back. It ends when rank 0 does.
"""

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep
from tokenspeed.core.errors import EngineError, TokenSpeedError
from tokenspeed.engine.rank_wire import (
    Failure,
    Launch,
    Loaded,
    Opened,
    Setup,
    Stop,
    ToFollower,
    decode_plan,
    receive,
    send,
)

__all__ = ["main"]


def main() -> int:
    """Follow until told to stop, or rank 0 is gone."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.engine.follower")
    parser.add_argument("--rank", type=int, required=True, help="of this process, above 0")
    parser.add_argument("--socket-fd", type=int, required=True, help="the socket to rank 0")
    parser.add_argument("--store", type=Path, required=True, help="file where ranks meet")
    parser.add_argument("--config-json", required=True, help="an EngineConfig as JSON")
    arguments = parser.parse_args()
    # The terminal sends Ctrl-C to every process of the group; ending is rank 0's to order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(arguments.config_json, type=EngineConfig)
    with socket.socket(fileno=arguments.socket_fd) as leader:
        try:
            _follow(leader, config, arguments.rank, arguments.store)
        except EngineError as error:
            return _report(leader, error)
        except Exception as error:
            if not isinstance(error, TokenSpeedError):
                sys.excepthook(type(error), error, error.__traceback__)
            return _report(leader, error)
    return 0


def _follow(leader: socket.socket, config: EngineConfig, rank: int, store_path: Path) -> None:
    let_threads_sleep()
    # Imported late: the torch behind it takes seconds, and wrong arguments should not.
    from tokenspeed.distributed import file_store  # noqa: PLC0415
    from tokenspeed.engine.assembly import make_runner, mesh_of, open_model  # noqa: PLC0415

    mesh = mesh_of(config)
    opened = open_model(config, mesh=mesh, rank=rank)
    send(leader, Opened())
    setup = _next(leader)
    if isinstance(setup, Stop):
        return
    assert isinstance(setup, Setup)
    store = file_store(store_path, mesh.world)
    _, _, runner = make_runner(opened, setup.config, mesh=mesh, rank=rank, store=store)
    send(leader, Loaded())
    while True:
        match _next(leader):
            case Launch(plan):
                runner.follow(decode_plan(plan))
            case Stop():
                runner.close()
                return
            case other:
                raise AssertionError(f"rank 0 sent {other!r} to a rank that runs")


def _next(leader: socket.socket) -> ToFollower:
    message: ToFollower = msgspec.msgpack.decode(receive(leader), type=ToFollower)
    return message


def _report(leader: socket.socket, error: Exception) -> int:
    """Tell rank 0, if it is there to be told."""
    try:
        leader.settimeout(1.0)
        send(leader, Failure(type(error).__name__, str(error)))
    except OSError:
        pass
    # Collectives that wait for others in threads of their own would keep the process alive.
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
