"""`python -m tokenspeed.bench.worker`: simulates one share, read from stdin, written to stdout."""

import os
import sys
from pathlib import Path

import msgspec

from tokenspeed.bench.replay import Share, simulate
from tokenspeed.bench.results import merge_results
from tokenspeed.bench.trace import read_trace

__all__ = ["main"]


def main() -> None:
    """Run the share to its end."""
    parent_pid = os.getppid()
    share = msgspec.json.decode(sys.stdin.buffer.read(), type=Share)
    trace = read_trace(Path(share.path), limit=share.limit)
    parts = []
    for group in share.groups:
        if os.getppid() != parent_pid:
            # Nobody is left to read the results.
            sys.exit(1)
        parts.append(simulate(trace, share.config, groups=(group,)))
    sys.stdout.buffer.write(merge_results(parts).to_bytes())


if __name__ == "__main__":
    main()
