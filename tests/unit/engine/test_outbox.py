"""When the outputs of an engine's steps are sent."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import FinishReason
from tokenspeed.engine.outbox import Outbox, tick_s
from tokenspeed.engine.wire import CacheEventBatch, FromEngine, Refused, StepOutputs, Submit

LIVE = 20
INTERVAL_MAX_S = 0.4
TICK_S = 0.1
EVENTS = CacheEventBatch(1, b"", b"", b"", b"", b"")


class Box:
    """An outbox whose clock stands where a test puts it."""

    def __init__(self, interval_max_s: float = INTERVAL_MAX_S) -> None:
        self.now_s = 7.0
        self.sent: list[FromEngine] = []
        self.outbox = Outbox(
            self.sent.extend, interval_max_s=interval_max_s, clock=lambda: self.now_s
        )

    def step(
        self, at_s: float, requests: Sequence[int] = range(LIVE), **fields: Any
    ) -> StepOutputs:
        """A step that ends at a time, and gives each of these requests a token."""
        self.now_s = at_s
        live = fields.pop("live", len(requests))
        outputs = step_outputs(requests, **fields)
        self.outbox.step(outputs, live=live)
        return outputs

    def take(self) -> list[FromEngine]:
        """What was sent since the last call."""
        sent, self.sent[:] = list(self.sent), []
        return sent

    def steady(self) -> None:
        """Two steps of the same requests, of which the second is kept; both are then gone."""
        self.step(7.000)
        self.step(7.010)
        self.outbox.flush()
        self.take()


def step_outputs(requests: Sequence[int], **fields: Any) -> StepOutputs:
    columns = dict.fromkeys(StepOutputs.__struct_fields__, b"")
    ids = np.array(requests, dtype=np.int64)
    columns["requests"] = ids.tobytes()
    columns["tokens"] = columns["cached_counts"] = np.zeros(len(ids), np.int32).tobytes()
    return StepOutputs(**{**columns, "logprobs": None, **fields})  # type: ignore[arg-type]


def submit(request: int, **params: Any) -> Submit:
    return Submit(request, b"", SamplingParams(**params), 8, None, 0, 0, None)


def test_ticks_are_a_quarter_of_the_interval_with_many_streams_and_none_with_few() -> None:
    assert [tick_s(streams, 0.4) for streams in (0, 10, 20, 64)] == [0.0, 0.05, 0.1, 0.1]
    # A timer of a few milliseconds would cost more than it saves.
    assert tick_s(1, 0.05) == 0.0
    assert tick_s(64, 0.0) == 0.0


def test_plain_steps_are_sent_together_at_the_last_one_before_the_tick() -> None:
    box = Box()
    box.steady()
    kept = [box.step(7.0 + ms / 1000) for ms in (30, 50, 70)]
    assert box.take() == []
    # The step after this one would end behind the tick at 7.1 s.
    kept.append(box.step(7.090))
    assert box.take() == kept
    assert box.step(7.110) not in box.sent


def test_a_message_has_two_milliseconds_to_reach_the_client_before_the_tick() -> None:
    # The step after it would end 3 ms before the tick at 7.1 s, and 1 ms before it.
    for ended_s, sent in ((7.0535, False), (7.0545, True)):
        box = Box()
        box.steady()
        outputs = box.step(ended_s)
        assert (outputs in box.sent) is sent


def test_what_missed_its_tick_goes_with_the_next_step() -> None:
    box = Box()
    box.steady()
    kept = [box.step(7.030), box.step(7.050)]
    assert box.take() == []
    kept.append(box.step(7.180))
    assert box.take() == kept


def test_steps_as_long_as_the_ticks_are_sent_as_they_come() -> None:
    box = Box()
    box.steady()
    for number in range(1, 5):
        outputs = box.step(7.01 + number * TICK_S)
        assert box.take() == [outputs]


def test_a_first_token_an_end_and_who_waits_are_told_at_once() -> None:
    box = Box()
    box.steady()
    finished = {
        "finished": np.array([3], np.int64).tobytes(),
        "reasons": np.array([FinishReason.LENGTH], np.int32).tobytes(),
    }
    assert box.step(7.011, **finished) in box.take()
    # The same requests, another one with its first token, then one that is still computed.
    box.steady()
    assert box.step(7.012, range(LIVE + 1)) in box.take()
    assert box.step(7.013, range(LIVE + 1), live=LIVE + 2) in box.take()
    assert box.step(7.014, range(LIVE + 1)) not in box.take()
    box.steady()
    assert box.step(7.015, admitted=np.array([3], np.int64).tobytes()) in box.take()


def test_a_request_that_comes_and_every_other_message_take_along_what_was_kept() -> None:
    box = Box()
    for other in (
        lambda: box.outbox.submitted(submit(99)),
        lambda: box.outbox.put(Refused(99, "RequestError", "no")),
        box.outbox.flush,
    ):
        box.steady()
        kept = box.step(7.02)
        assert box.take() == []
        other()
        assert box.take()[0] == kept


def test_while_a_stop_string_is_watched_for_nothing_is_kept() -> None:
    box = Box()
    box.outbox.submitted(submit(3, stop=("END",)))
    box.steady()
    assert box.step(7.02) in box.take()
    box.step(7.03, finished=np.array([3], np.int64).tobytes())
    box.steady()
    assert box.step(7.02) not in box.take()
    # One that was refused is watched no longer.
    box.outbox.submitted(submit(4, stop=("END",)))
    box.outbox.put(Refused(4, "RequestError", "no"))
    box.steady()
    assert box.step(7.02) not in box.take()


def test_cache_events_go_with_their_step_and_at_once_without_one() -> None:
    box = Box()
    box.steady()
    box.outbox.cache_events(EVENTS)
    assert box.take() == [EVENTS]
    outputs = box.step(7.02)
    box.outbox.cache_events(EVENTS)
    assert box.take() == []
    box.outbox.flush()
    assert box.take() == [outputs, EVENTS]


def test_guesses_that_were_right_do_not_make_a_step_less_plain() -> None:
    box = Box()
    box.steady()
    assert box.step(7.02, [request for request in range(LIVE) for _ in range(2)], live=LIVE)
    assert box.take() == []


def test_without_an_interval_everything_is_sent_at_once() -> None:
    box = Box(0.0)
    for ms in range(0, 50, 10):
        outputs = box.step(7.0 + ms / 1000)
        assert box.take() == [outputs]
