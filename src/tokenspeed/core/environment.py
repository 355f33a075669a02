"""The one place that reads and sets environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenspeed.core.errors import ConfigError

__all__ = [
    "Torchrun",
    "cache_dir",
    "cpu_isa",
    "let_threads_sleep",
    "peers_dir",
    "quiet_grpc_forks",
    "torchrun",
    "with_variables",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Torchrun:
    """What torchrun tells a process that it starts.

    Attributes:
        rank: of all processes.
        world_size: how many there are.
        local_rank: of those on this host.
        master_address, master_port: where rank 0 is met.
        restarts: how often torchrun has started all of them again.
        serves_store: whether torchrun itself serves the store at that address.
    """

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int
    restarts: int
    serves_store: bool


def torchrun() -> Torchrun | None:
    """What `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` say; None unless all are set.

    Raises:
        ConfigError: one of them is no number, or the rank is not one of the world's.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names):
        return None
    found = Torchrun(
        rank=_number("RANK"),
        world_size=_number("WORLD_SIZE"),
        local_rank=_number("LOCAL_RANK"),
        master_address=os.environ["MASTER_ADDR"],
        master_port=_number("MASTER_PORT"),
        restarts=_number("TORCHELASTIC_RESTART_COUNT"),
        serves_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
    if not 0 <= found.rank < found.world_size:
        raise ConfigError(
            f"RANK is {found.rank}, but must be below WORLD_SIZE, which is {found.world_size}; "
            "unset both where no torchrun started this"
        )
    return found


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise ConfigError(f"{name} must be a whole number, but is {text!r}: unset it, or mend it")
    return int(text)


def cache_dir() -> Path:
    """The folder for downloads and exported tokenizers; it need not exist yet.

    `TOKENSPEED_CACHE_DIR` names it; else it is `tokenspeed` in `XDG_CACHE_HOME`, else in
    `~/.cache`.
    """
    own = os.environ.get("TOKENSPEED_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    root = Path(shared).expanduser() if shared else Path.home() / ".cache"
    return root / "tokenspeed"


def cpu_isa() -> str | None:
    """The instruction set that native CPU kernels must use: `TOKENSPEED_CPU_ISA`, if it is set."""
    return os.environ.get("TOKENSPEED_CPU_ISA") or None


def peers_dir() -> Path:
    """The folder for other engines and what they are given: `TOKENSPEED_PEERS`, else in the cache.

    They take some 10 GB together.
    """
    own = os.environ.get("TOKENSPEED_PEERS")
    return Path(own).expanduser().resolve() if own else cache_dir() / "peers"


def with_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with others added: for a program that is only told that way."""
    return {**os.environ, **variables}


def let_threads_sleep() -> None:
    """Have OpenMP's threads sleep, not spin, while they wait; for before torch is imported.

    Spinning threads and another busy process (the gateway, a client, a test) take each other's
    cores: a decode step of a small model was seen to take ten times as long. `OMP_WAIT_POLICY`
    set by the user stands.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quiet_grpc_forks() -> None:
    """Have gRPC leave forks alone, and not write of them; for before grpc is imported.

    The children of a server run another program at once, so nothing of gRPC lives on in them.
    """
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
