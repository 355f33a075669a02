"""The world's mistakes get typed errors, and the scheduler goes on."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.scenario.simulation import i32
from tests.unit.control.worlds import world
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, CacheGroupKind
from tokenspeed.core.errors import ConfigError, ContextOverflow, EngineError, InvalidParameter


def submit(w, request=1, prompt=(1, 2), **changes):
    wishes = {"max_new_tokens": 4, "stop_token_ids": i32(), **changes}
    w.scheduler.submit(request, i32(*prompt), **wishes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": ()}, InvalidParameter, "at least one token"),
        ({"prompt": (3, -1)}, InvalidParameter, "position 1 of the prompt holds -1"),
        ({"max_new_tokens": 0}, InvalidParameter, "max_new_tokens must be at least 1"),
        ({"min_new_tokens": -1}, InvalidParameter, "min_new_tokens must be at least 0"),
        ({"prompt": range(128)}, ContextOverflow, "128 tokens.*context of 128.*--max-context"),
    ],
)
def test_a_wrong_request_is_refused(changes, error, message) -> None:
    w = world()
    with pytest.raises(error, match=message):
        submit(w, **changes)
    w.submit(1, [1, 2], max_new_tokens=2)
    w.drain()


def test_an_id_in_use_is_refused() -> None:
    w = world()
    w.submit(1, [1, 2], max_new_tokens=9)
    with pytest.raises(InvalidParameter, match="request id 1 is in use"):
        submit(w)
    w.step()
    with pytest.raises(InvalidParameter, match="request id 1 is in use"):
        submit(w)
    w.drain()


@pytest.mark.parametrize("prompt", [np.arange(4.0), np.arange(4), np.zeros((2, 2), np.int32), [1]])
def test_a_prompt_of_another_type_is_refused(prompt) -> None:
    w = world()
    with pytest.raises(TypeError):
        w.scheduler.submit(1, prompt, max_new_tokens=1, stop_token_ids=i32())


def test_tokens_of_a_request_that_is_not_live() -> None:
    w = world()
    with pytest.raises(InvalidParameter, match="request 5 is not live"):
        w.scheduler.tokens(5)
    w.submit(5, [1], max_new_tokens=1)
    w.drain()
    with pytest.raises(InvalidParameter, match="request 5 is not live"):
        w.scheduler.tokens(5)


def test_steps_are_committed_in_order_and_once() -> None:
    w = world(overlap_depth=1)
    with pytest.raises(EngineError, match="no step is in flight"):
        w.scheduler.commit(0, i32(), 0)
    w.submit(1, [1, 2], max_new_tokens=9)
    first, second = w.launch(), w.launch()
    with pytest.raises(EngineError, match=f"wanted step {first.step}, but got {second.step}"):
        w.scheduler.commit(second.step, i32(1), 0)
    with pytest.raises(EngineError, match="samples 1 tokens, but got 2"):
        w.scheduler.commit(first.step, i32(1, 2), 0)
    with pytest.raises(EngineError, match="negative token"):
        w.scheduler.commit(first.step, i32(-1), 0)
    w.commit()
    with pytest.raises(EngineError, match="wanted step"):
        w.scheduler.commit(first.step, i32(1), 0)
    w.drain()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"overlap_depth": -1}, "overlap_depth must be at least 0"),
        ({"step_tokens_max": 7}, "step_tokens_max .7. must be at least slots_max .8."),
        ({"groups": (CacheGroup(pages=2**30),)}, "must be below 2.31"),
        ({"groups": ()}, "at least one cache group"),
        ({"tps_floor": 0.0}, "tps_floor must be above 0"),
        ({"queue_timeout_us": 0}, "queue_timeout_us must be at least 1"),
        ({"step_drafts_max": -1}, "step_drafts_max must be at least 0"),
        ({"step_proposals_max": 8}, "must both be 0, or both at least 1, but are 8 and 0"),
        ({"proposal_window": -1}, "proposal_window must be at least 0, but is -1"),
        ({"proposal_length_max": -1}, "must both be 0, or both at least 1, but are 0 and -1"),
        ({"groups": (CacheGroup(pages=9), CacheGroup(pages=9))}, "two full cache groups"),
        (
            {"groups": (CacheGroup(kind=CacheGroupKind.WINDOW, pages=4, window=9),)},
            "window cache group must have at least 8 pages",
        ),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message) -> None:
    good = vars(world().config)
    with pytest.raises(ConfigError, match=message):
        Scheduler(SimpleNamespace(**{**good, **changes}))
