"""KV that goes to another engine or comes from one."""

import pytest

from tests.unit.control.worlds import world
from tokenspeed.core.config import CacheGroup, CacheGroupKind
from tokenspeed.core.errors import EngineError, InvalidParameter
from tokenspeed.core.step import FinishReason, Handover

GROUPS = {
    "full": (CacheGroup(pages=64),),
    "window": (
        CacheGroup(pages=64),
        CacheGroup(kind=CacheGroupKind.WINDOW, pages=24, window=6),
    ),
    "recurrent": (CacheGroup(kind=CacheGroupKind.RECURRENT, pages=12, checkpoint_pages=2),),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_a_sender_ends_after_its_first_token_when_its_pages_are_gone(groups: str) -> None:
    w = world(groups=GROUPS[groups])
    client = w.submit(1, range(30), max_new_tokens=9, handover=Handover.SEND)
    while not w.transfers:
        w.step()
    assert client.finished is None and len(client.output) == 1
    (transfer,) = w.transfers
    w.transfer(transfer)  # Compares what the other engine reads.
    w.drain()
    assert client.finished is FinishReason.LENGTH


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_receiver_goes_on_from_what_it_was_sent(groups: str, depth: int) -> None:
    w = world(groups=GROUPS[groups], overlap_depth=depth)
    client = w.submit(1, range(30), max_new_tokens=9, handover=Handover.RECEIVE)
    plan = w.launch()
    assert plan is not None and len(plan.row_slots) == 0
    w.commit()
    assert w.launch() is None
    (transfer,) = w.transfers
    w.transfer(transfer)
    plan = w.launch()
    assert plan is not None and plan.context_lens.tolist() == [29]
    w.drain()
    assert client.output == client.expected


def test_a_transfer_that_fails_is_computed_or_ends_the_sender() -> None:
    w = world()
    receiver = w.submit(1, range(30), max_new_tokens=9, handover=Handover.RECEIVE)
    sender = w.submit(2, range(50, 80), max_new_tokens=9, handover=Handover.SEND)
    while len(w.transfers) < 2:
        w.step()
    for transfer in list(w.transfers):
        w.transfer(transfer, complete=False)
    w.drain()
    assert receiver.output == receiver.expected
    assert sender.finished is FinishReason.ABORT


def test_a_sender_that_is_aborted_ends_when_its_transfer_does() -> None:
    w = world()
    client = w.submit(2, range(50, 80), max_new_tokens=9, handover=Handover.SEND)
    while not w.transfers:
        w.step()
    w.abort(2)
    assert w.launch() is None
    assert client.finished is None
    (transfer,) = w.transfers
    w.transfer(transfer)
    w.drain()
    assert client.finished is FinishReason.LENGTH


def test_only_a_transfer_under_way_can_be_over() -> None:
    w = world()
    with pytest.raises(EngineError, match="no transfer 0 is under way"):
        w.scheduler.transferred(0, complete=True)
    w.submit(1, range(9), max_new_tokens=2, handover=Handover.RECEIVE)
    w.step()
    w.scheduler.transferred(0, complete=True)
    w.scheduler.transferred(0, complete=True)  # Nothing happened yet: it is still under way.
    (transfer,) = w.transfers
    plan, which = w.transfers.pop(transfer)
    for group in w.groups:
        group.receive(plan, 0, which, w.clients[1].prompt[:-1], 0)
    w.drain()
    with pytest.raises(EngineError, match="no transfer 0 is under way"):
        w.scheduler.transferred(0, complete=True)


def test_a_receiver_brings_the_token_after_its_prompt() -> None:
    w = world()
    with pytest.raises(InvalidParameter, match="the token sampled after it"):
        w.submit(1, [3], max_new_tokens=2, handover=Handover.RECEIVE)
