"""A rank that follows rank 0.

It runs the plans that rank 0 sends, in which the tokens of decode rows stand already, so that only
rank 0 samples and nothing goes back. It ends when rank 0 does. `python -m
tokenspeed.engine.follower` is one on rank 0's own host, started by it; torchrun's and Ray's find
rank 0 over TCP.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep, torchrun
from tokenspeed.core.errors import EngineError, TokenSpeedError
from tokenspeed.engine.rank_wire import (
    Failure,
    Launch,
    Loaded,
    Opened,
    Setup,
    Stop,
    decode_plan,
    decode_to_follower,
    encode,
)

if TYPE_CHECKING:
    from tokenspeed.distributed import Place
    from tokenspeed.engine.rank_links import Link

__all__ = ["follow_by_torchrun", "follow_over_tcp", "main"]


def main() -> int:
    """Follow the process that started this one until told to stop, or it is gone."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.engine.follower")
    parser.add_argument("--rank", type=int, required=True, help="of this process, above 0")
    parser.add_argument("--socket-fd", type=int, required=True, help="the socket to rank 0")
    parser.add_argument("--store", type=Path, required=True, help="file where ranks meet")
    parser.add_argument("--config-json", required=True, help="an EngineConfig as JSON")
    arguments = parser.parse_args()
    # The terminal sends Ctrl-C to every process of the group; ending is rank 0's to order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(arguments.config_json, type=EngineConfig)
    let_threads_sleep()
    # Imported late: the torch behind it takes seconds, and wrong arguments should not.
    from tokenspeed.distributed import Place, file_store  # noqa: PLC0415
    from tokenspeed.engine.rank_links import SocketLink  # noqa: PLC0415

    world = _world(config)
    place = Place(
        rank=arguments.rank,
        local_rank=arguments.rank,
        local_ranks=world,
        store=file_store(arguments.store, world),
        device_index=arguments.rank,
    )
    _follow(SocketLink(socket.socket(fileno=arguments.socket_fd)), config, place)
    return 0


def follow_by_torchrun(config: EngineConfig) -> None:
    """Follow rank 0 as torchrun's environment says. Where that fails, the process ends.

    Raises:
        ConfigError: torchrun started more or fewer ranks than `config` asks for.
        EngineError: rank 0 is not there.
    """
    from tokenspeed.engine.assembly import mesh_of  # noqa: PLC0415
    from tokenspeed.engine.rank_launch import check_torchrun, meeting_prefix  # noqa: PLC0415

    found = torchrun()
    assert found is not None
    check_torchrun(found, mesh_of(config))
    # torchrun ends its processes together, and rank 0 lets running requests end first.
    follow_over_tcp(
        config,
        rank=found.rank,
        address=found.master_address,
        port=found.master_port,
        prefix=meeting_prefix(found.restarts),
        signals=(signal.SIGINT, signal.SIGTERM),
    )


def follow_over_tcp(
    config: EngineConfig,
    *,
    rank: int,
    address: str,
    port: int,
    prefix: str,
    signals: Sequence[signal.Signals] = (),
) -> None:
    """Follow rank 0 from wherever it can be reached. Where that fails once it was, the process
    ends.

    Args:
        config: as rank 0's.
        rank: of this process, above 0.
        address, port: where the store is served.
        prefix: of the ranks' keys in it.
        signals: not to be heeded once rank 0 is there, whose end this rank follows.

    Raises:
        EngineError: rank 0 is not there.
    """
    let_threads_sleep()
    from tokenspeed.distributed import (  # noqa: PLC0415
        ByteGroup,
        address_towards,
        meet,
        tcp_store,
    )
    from tokenspeed.engine.rank_launch import LINK_TIMEOUT_S, MEETING_TIMEOUT_S  # noqa: PLC0415
    from tokenspeed.engine.rank_links import GroupLink  # noqa: PLC0415

    world = _world(config)
    store, _ = tcp_store(address, port, serve=False, timeout_s=MEETING_TIMEOUT_S, prefix=prefix)
    own = address_towards(address, port)
    place, _ = meet(store, rank, world, address=own, timeout_s=MEETING_TIMEOUT_S)
    group = ByteGroup(place, world, timeout_s=LINK_TIMEOUT_S)
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    _follow(GroupLink(group, 0), config, place, aloud=True)


def _follow(leader: "Link", config: EngineConfig, place: "Place", *, aloud: bool = False) -> None:
    """Follow until told to stop; tells rank 0, and ends the process, where that fails.

    Args:
        leader: the way to rank 0.
        config: as rank 0's.
        place: of this rank.
        aloud: whether people are told here too.
    """
    try:
        _run(leader, config, place)
    except Exception as error:
        if not isinstance(error, TokenSpeedError):
            sys.excepthook(type(error), error, error.__traceback__)
        elif aloud:
            print(f"rank {place.rank}: {error}", file=sys.stderr)  # noqa: T201
        # Rank 0 may be gone.
        with contextlib.suppress(EngineError):
            leader.send(encode(Failure(type(error).__name__, str(error))))
        # Collectives that wait for others in threads of their own would keep the process alive.
        sys.stderr.flush()
        os._exit(1)


def _run(leader: "Link", config: EngineConfig, place: "Place") -> None:
    from tokenspeed import loader  # noqa: PLC0415
    from tokenspeed.engine.assembly import make_runner, mesh_of, open_model  # noqa: PLC0415
    from tokenspeed.engine.sizing import memory_share_size_bytes  # noqa: PLC0415

    mesh = mesh_of(config)
    opened = open_model(config, place=place)
    leader.send(
        encode(
            Opened(
                config=config,
                model=loader.fingerprint(opened.files),
                dtype=opened.dtype_name,
                memory_size_bytes=memory_share_size_bytes(config, place),
            )
        )
    )
    setup = decode_to_follower(leader.receive())
    if isinstance(setup, Stop):
        return
    assert isinstance(setup, Setup)
    _, _, _, runner = make_runner(opened, setup.config, mesh=mesh, place=place)
    runner.record()
    leader.send(encode(Loaded()))
    while True:
        match decode_to_follower(leader.receive()):
            case Launch(plan):
                runner.follow(decode_plan(plan))
            case Stop():
                runner.close()
                return
            case other:
                raise AssertionError(f"rank 0 sent {other!r} to a rank that runs")


def _world(config: EngineConfig) -> int:
    from tokenspeed.engine.assembly import mesh_of  # noqa: PLC0415

    return mesh_of(config).world


if __name__ == "__main__":
    sys.exit(main())
