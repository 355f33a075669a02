"""Traces of forward passes, for `chrome://tracing` and Perfetto."""

import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tokenspeed.core.errors import InvalidParameter, RequestError

__all__ = ["ForwardProfiler"]


class ForwardProfiler:
    """Records forwards between start and stop. torch records the thread that starts it, so every
    method is called on the thread of the forwards.
    """

    def __init__(self) -> None:
        self._profile: profile | None = None
        self._path: Path | None = None
        self._steps_left: int | None = None

    def start(self, output_dir: Path | None, steps: int | None) -> Path:
        """Begin to record.

        Args:
            output_dir: made if it is not there; None for a new temporary one.
            steps: forwards after which the trace is written; None to record until `stop`.

        Returns:
            Where the trace will be.

        Raises:
            RequestError: a trace is being recorded already.
            InvalidParameter: fewer than one step, or a directory that cannot be made.
        """
        if self._profile is not None:
            raise RequestError(f"a profile is being recorded to {self._path}; stop it first")
        if steps is not None and steps < 1:
            raise InvalidParameter(f"a profile records at least one step, not {steps}")
        if output_dir is None:
            output_dir = Path(tempfile.mkdtemp(prefix="tokenspeed-profile-"))
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidParameter(f"no directory can be made at {output_dir}: {error}") from error
        self._path = output_dir / f"forward-{time.time_ns()}.json"
        self._steps_left = steps
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()
        return self._path

    def stop(self) -> Path:
        """Write the trace, unless its steps were reached and it is written, and say where it is.

        Raises:
            RequestError: none was started, or it cannot be written.
        """
        if self._path is None:
            raise RequestError("no profile was started")
        if self._profile is not None:
            recorded, self._profile = self._profile, None
            recorded.stop()
            try:
                recorded.export_chrome_trace(str(self._path))
            except (OSError, RuntimeError) as error:
                raise RequestError(f"the profile cannot be written: {error}") from error
        return self._path

    def close(self) -> None:
        """Write the trace being recorded, if there is one."""
        if self._profile is not None:
            self.stop()

    @property
    def recording(self) -> bool:
        """Whether forwards are to show their ops."""
        return self._profile is not None

    def stepped(self) -> None:
        """Count a forward that ended, and end the recording after the last one asked for."""
        if self._profile is not None and self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                self.stop()
