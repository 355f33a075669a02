"""How many processes of engines one host is to have. Imports no torch."""

import os

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError

__all__ = ["check_crowd"]

# Each takes a quarter of a gigabyte before it has read a weight. As many as there are CPUs always
# pass, and so do these on a small machine, where several ranks are only of use to try them out.
_PROCESSES_ALWAYS = 16


def check_crowd(config: EngineConfig, *, ranks: int) -> None:
    """Refuse more processes than a host has a use for, before the first is started.

    Args:
        config: says how many engines.
        ranks: processes of each of them on this host.

    Raises:
        ConfigError: they are too many.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(cpus, _PROCESSES_ALWAYS)
    if config.dp * ranks > most:
        ways_out = "lower them"
        if config.dp == 1:
            ways_out += (
                ", or spread the ranks over hosts with torchrun or "
                "--distributed-executor-backend ray"
            )
        raise ConfigError(
            f"--tp {config.tp} --cp {config.cp} --dp {config.dp} makes {config.dp * ranks} "
            f"processes on this host, which has {cpus} CPUs and is given {most} at most: {ways_out}"
        )
