"""`python -m tokenspeed.bench.worker`: simulates one share, read from stdin, written to stdout."""

import sys
from pathlib import Path

import msgspec

from tokenspeed.bench.replay import Share, simulate
from tokenspeed.bench.trace import read_trace

__all__ = ["main"]


def main() -> None:
    """Run the share to its end."""
    share = msgspec.json.decode(sys.stdin.buffer.read(), type=Share)
    trace = read_trace(Path(share.path), limit=share.limit)
    results = simulate(trace, share.config, groups=share.groups)
    sys.stdout.buffer.write(results.to_bytes())


if __name__ == "__main__":
    main()
