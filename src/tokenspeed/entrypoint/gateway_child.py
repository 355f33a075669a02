"""The gateway's process: takes its command line from stdin and never outlives its parent.

Command lines are visible to every user of the machine; an API key is not for them.
"""

import ctypes
import json
import os
import signal
import sys

__all__ = ["die_with_parent", "main", "wake_together"]

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
# The gateway's runtime sleeps 10 ms at a time to see how late it wakes, for metrics of its own, and
# cannot be told not to: a hundredth of a core while nothing is served. None of its timers stands in
# the way of a token; the shortest that anybody waits for is of two seconds.
_TIMER_SLACK_NS = 50_000_000


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have ended before the call.
    if os.getppid() != parent_pid:
        sys.exit(1)


def wake_together() -> None:
    """Let the kernel wake this process for several of its timers at once (Linux).

    Threads inherit it from the thread that starts them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_TIMER_SLACK_NS), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_TIMERSLACK)")


def main() -> None:
    """Read {"parent_pid": ..., "arguments": [...]} from stdin, then be `smg ARGUMENTS`."""
    order = json.load(sys.stdin)
    if sys.platform == "linux":
        die_with_parent(order["parent_pid"])
        wake_together()
    from smg.cli import main as smg  # noqa: PLC0415  # a second of imports, after the guard

    smg(order["arguments"])


if __name__ == "__main__":
    main()
