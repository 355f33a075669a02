"""What a run measured, answer by answer, as it is kept in files. Times are whole microseconds."""

from dataclasses import dataclass

__all__ = ["AnswerRecord", "Calibration", "ProcessUsage", "Run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecord:
    """One turn of one session.

    Attributes:
        session: its name; with a `#` and a number where the sessions were gone through again.
        turn: counted from 0.
        sent_us: since the run began.
        piece_us: [P] since `sent_us`, when each piece of text came.
        ended_us: since `sent_us`.
        asked_tokens: the length that the answer was to have.
        output_tokens, prompt_tokens, cached_tokens: as the server counted; None where it did not.
        error: None where the answer is whole.
    """

    session: str
    turn: int
    sent_us: int
    piece_us: tuple[int, ...]
    ended_us: int
    asked_tokens: int
    output_tokens: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Of the answer: the server's count, and one a piece where it gave none."""
        return len(self.piece_us) if self.output_tokens is None else self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """What the server's processes took during a run.

    Attributes:
        pids: of all that were seen.
        cpu_s: of user and system time.
        rss_max_bytes: the most that all of them held together, pages that they share counted in
            each.
    """

    pids: tuple[int, ...]
    cpu_s: float
    rss_max_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Time to the first token of a prompt alone: `base_us` and `token_us` for each token."""

    base_us: float
    token_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One pass over the workload with so many users.

    Attributes:
        users: sessions open at once; None in an open loop.
        repeat: which of the runs with so many users, counted from 0.
        salt: what stood at the head of each session, so that no run finds another's cache.
        began_at: seconds since 1970.
        window_us: the time that rates are over, from the first request: to the deadline, or to the
            end of the last answer.
        full_load_us: until one user found no session left to take up.
        client_cpu_s: of this process.
        server: None where its processes are not known.
        calibration: None where the server was not measured alone.
        stopped: why the run ended before its time; None if it did not.
        answers: in order of `sent_us`.
        launch: how the server was started; None where it was not started for the run.
    """

    users: int | None
    repeat: int
    salt: str
    began_at: float
    window_us: int
    full_load_us: int
    client_cpu_s: float
    server: ProcessUsage | None
    calibration: Calibration | None
    stopped: str | None
    answers: tuple[AnswerRecord, ...]
    launch: str | None = None
