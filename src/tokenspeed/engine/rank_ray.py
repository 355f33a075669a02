"""Ranks as Ray's actors: a placement group with a bundle a rank, of which rank 0 has the first.

Rank 0 is the engine's own process, on the node that serves. Ray carries a few words as ranks start;
plans go over torch.distributed, as they do with torchrun.
"""

import contextlib
import socket
from dataclasses import replace
from typing import Any

import msgspec

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.distributed import Mesh, RankName, meet, tcp_store
from tokenspeed.engine.follower import follow_over_tcp
from tokenspeed.engine.rank_launch import (
    MEETING_TIMEOUT_S,
    LaunchedRanks,
    byte_links,
    meeting_prefix,
)
from tokenspeed.engine.rank_links import Link

__all__ = ["launch_with_ray"]

_REACH_TIMEOUT_S = 5.0
_PLACEMENT_TIMEOUT_S = 30.0


class _Rank:
    """What an actor runs."""

    def device_indices(self) -> list[str]:
        """The GPUs that Ray gave it."""
        import ray  # noqa: PLC0415

        return [str(index) for index in ray.get_gpu_ids()]

    def follow(self, rank: int, address: str, port: int, config_json: str) -> None:
        """Follow rank 0 until told to stop; the actor's process ends with an error."""
        config = msgspec.json.decode(config_json, type=EngineConfig)
        follow_over_tcp(config, rank=rank, address=address, port=port, prefix=meeting_prefix())


class _Actor:
    """A rank above 0."""

    def __init__(self, name: RankName, link: Link, handle: Any, running: Any) -> None:
        self.rank = name.rank
        self.name = str(name)
        self.link = link
        self._handle = handle
        self._running = running

    def ended(self, wait_s: float = 0.0) -> str | None:
        """How the actor ended; None while it lives."""
        return _outcome(self._running, wait_s)

    def end(self) -> None:
        """Kill it."""
        import ray  # noqa: PLC0415

        with contextlib.suppress(Exception):
            ray.kill(self._handle)


def launch_with_ray(config: EngineConfig, mesh: Mesh) -> LaunchedRanks:
    """Start the ranks above 0 as actors.

    Raises:
        ConfigError: Ray is not installed, not reached, or has no room for the ranks.
        EngineError: a rank did not come.
    """
    ray = _connected(config.ray_address)
    try:
        return _launch(ray, config, mesh)
    except BaseException:
        ray.shutdown()
        raise


def _launch(ray: Any, config: EngineConfig, mesh: Mesh) -> LaunchedRanks:
    from ray.util import get_node_ip_address  # noqa: PLC0415
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: PLC0415

    wants = {"CPU": float(config.threads or 1)}
    if config.device == "cuda":
        wants["GPU"] = 1.0
    group = _placed(ray, wants, mesh)
    address = get_node_ip_address()
    store, port = tcp_store(
        address, 0, serve=True, timeout_s=MEETING_TIMEOUT_S, prefix=meeting_prefix()
    )
    # A rank that failed is not to be started again: its memory of past steps is gone.
    kind = ray.remote(_Rank)
    actors = [
        kind.options(
            num_cpus=wants["CPU"],
            num_gpus=wants.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=rank
            ),
        ).remote()
        for rank in range(mesh.world)
    ]
    text = msgspec.json.encode(config).decode()
    running = [
        actor.follow.remote(rank, address, port, text)
        for rank, actor in enumerate(actors)
        if rank > 0
    ]

    def check() -> None:
        for rank, one in enumerate(running, 1):
            if (how := _outcome(one, 0.0)) is not None:
                raise EngineError(f"rank {rank} ended as it started: {how}")

    place, names = meet(
        store, 0, mesh.world, address=address, timeout_s=MEETING_TIMEOUT_S, check=check
    )
    if config.device == "cuda":
        # The first actor holds the device of rank 0, which this process uses.
        (index,) = ray.get(actors[0].device_indices.remote())
        place = replace(place, device_index=int(index))
    links = byte_links(place, names)

    def release() -> None:
        # Ray ends actors and takes bundles back as their driver leaves.
        ray.shutdown()

    return LaunchedRanks(
        members=[_Actor(*pair) for pair in zip(names[1:], links, actors[1:], running, strict=True)],
        place=place,
        release=release,
    )


def _connected(address: str | None) -> Any:
    try:
        import ray  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "--distributed-executor-backend ray needs Ray: pip install 'tokenspeed[ray]' on each "
            "node"
        ) from error
    named = "the Ray cluster of this host" if address is None else f"the Ray cluster at {address}"
    remedy = (
        "Start one with `ray start --head` on one node and `ray start --address=HOST:PORT` on the "
        "others, this one among them, and give --ray-address HOST:PORT"
    )
    if address is not None:
        # Ray itself tries for a minute, and says little.
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"--ray-address must be HOST:PORT, but is {address!r}")
        try:
            socket.create_connection((host, int(port)), _REACH_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot reach {named}: {error}. {remedy}.") from error
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
    except Exception as error:
        raise ConfigError(f"cannot join {named}: {_brief(error)}. {remedy}.") from error
    return ray


def _placed(ray: Any, wants: dict[str, float], mesh: Mesh) -> Any:
    """A placement group, its first bundle on this node."""
    from ray.util.placement_group import placement_group  # noqa: PLC0415

    nodes = [node for node in ray.nodes() if node["Alive"]]
    each = ", ".join(f"{count:g} {name}" for name, count in wants.items())
    remedy = (
        "Start more nodes with `ray start --address=HOST:PORT`, end what else runs there, or lower "
        "--tp or --threads"
    )
    fitting = sum(
        int(min(node["Resources"].get(name, 0.0) // count for name, count in wants.items()))
        for node in nodes
    )
    if fitting < mesh.world:
        raise ConfigError(
            f"Ray's {len(nodes)} nodes have room for {fitting} ranks of {each} each, but "
            f"{mesh.flags} makes {mesh.world}. {remedy}."
        )
    here = ray.get_runtime_context().get_node_id()
    group = placement_group(
        [wants] * mesh.world,
        strategy="PACK",
        bundle_label_selector=[{"ray.io/node-id": here}, *({} for _ in range(1, mesh.world))],
    )
    if not group.wait(_PLACEMENT_TIMEOUT_S):
        free = ray.available_resources()
        held = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in wants)
        raise ConfigError(
            f"Ray found no place for {mesh.world} ranks of {each} each, the first on this node, in "
            f"{_PLACEMENT_TIMEOUT_S:g} s; {held} are free. {remedy}."
        )
    return group


def _outcome(running: Any, wait_s: float) -> str | None:
    """How an actor's work ended; None while it goes on."""
    import ray  # noqa: PLC0415

    done, _ = ray.wait([running], timeout=wait_s)
    if not done:
        return None
    try:
        ray.get(running)
    except Exception as error:
        return _brief(error)
    return "it stopped"


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
