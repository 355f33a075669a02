"""The one place that reads and sets environment variables."""

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "cache_dir",
    "cpu_isa",
    "let_threads_sleep",
    "peers_dir",
    "quiet_grpc_forks",
    "with_variables",
]


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
