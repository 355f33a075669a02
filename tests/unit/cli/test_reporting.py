"""How commands end."""

import os
import signal

import pytest

from tokenspeed.cli.reporting import ended_like_interrupted


def test_sigterm_unwinds_like_ctrl_c_and_only_within_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_like_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
