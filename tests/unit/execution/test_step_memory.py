"""Where the tensors of a recorded step lie."""

import random

import pytest
import torch

from tokenspeed.execution.step_memory import PlannedMemory, StepMemory, TrialMemory

SIZES = (1, 7, 64, 300, 5000)


def forward(memory: StepMemory, seed: int, steps: int = 200) -> tuple[int, list[torch.Tensor]]:
    """Make, use and drop tensors, looking whether each keeps what was written to it until its last
    use; some are held for longer.

    Returns:
        the most bytes that were needed at once, and what is held at the end.
    """
    draw = random.Random(seed)
    held: list[tuple[int, torch.Tensor]] = []
    unread: list[torch.Tensor] = []
    most = 0
    written = isinstance(memory, PlannedMemory)
    for step in range(steps):
        if held and draw.random() < 0.5:
            value, tensor = held.pop(draw.randrange(len(held)))
            # A view is of the same memory, and begins elsewhere.
            tensor = tensor[-1:] if draw.random() < 0.5 else tensor
            assert not written or bool((tensor == value).all()), f"seed {seed}, step {step}"
            memory.use(tensor.data_ptr())
            if draw.random() < 0.3:
                unread.append(tensor)
            del tensor
        if unread and draw.random() < 0.3:
            unread.pop()
        shape = (draw.choice(SIZES), draw.choice((1, 3)))
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.uint8))
        tensor = memory.tensor(shape, dtype)
        assert tensor.shape == shape and tensor.dtype == dtype
        if written:
            assert tensor.data_ptr() % 64 == 0
            tensor.fill_(step % 100)
        memory.use(tensor.data_ptr())
        held.append((step % 100, tensor))
        del tensor
        most = max(most, sum(-(-tensor.nbytes // 64) * 64 for _, tensor in held))
    unread.clear()
    for value, tensor in held if written else ():
        assert bool((tensor == value).all()), f"seed {seed}, at the end"
    return most, [tensor for _, tensor in held]


@pytest.mark.parametrize("seed", range(10))
def test_tensors_that_are_needed_at_once_lie_apart_and_others_share_places(seed: int) -> None:
    trial = TrialMemory()
    most, left = forward(trial, seed)
    planned = trial.planned()
    assert left
    assert most <= planned.size_bytes <= 1.3 * most
    assert forward(planned, seed)[0] == most


def test_what_is_large_is_placed_first_whichever_was_asked_for_first() -> None:
    trial = TrialMemory()
    first = trial.tensor((64,), torch.uint8)
    beside = trial.tensor((64,), torch.uint8)
    trial.use(beside.data_ptr())
    trial.use(first.data_ptr())
    del first
    # In the order of asking it would lie above both, of which only one is still needed.
    large = trial.tensor((4096,), torch.uint8)
    assert trial.planned().size_bytes == large.nbytes + beside.nbytes


def test_memory_does_not_grow_with_layers() -> None:
    trial = TrialMemory()
    x = trial.tensor((64, 64), torch.float32)
    for _ in range(100):
        y = trial.tensor((64, 64), torch.float32)
        trial.use(x.data_ptr())
        trial.use(y.data_ptr())
        x = y
    assert trial.planned().size_bytes == 2 * x.nbytes


def test_what_nobody_reads_any_more_gives_way_though_it_is_held() -> None:
    trial = TrialMemory()
    read = trial.tensor((4000,), torch.uint8)
    trial.use(read.data_ptr())
    trial.use(trial.tensor((4000,), torch.uint8).data_ptr())
    del read
    assert trial.planned().size_bytes == 4032


def test_what_lies_behind_a_tensor_is_not_a_use_of_it() -> None:
    trial = TrialMemory()
    read = trial.tensor((4032,), torch.uint8)
    trial.use(read.data_ptr())
    trial.use(trial.tensor((4032,), torch.uint8).data_ptr())
    trial.use(read.data_ptr() + read.nbytes)
    del read
    assert trial.planned().size_bytes == 4032


def test_what_a_step_leaves_shares_its_place_with_what_came_before() -> None:
    trial = TrialMemory()
    trial.tensor((1000,), torch.uint8)
    last = trial.tensor((4000,), torch.uint8)
    assert trial.planned().size_bytes == 4032 > last.nbytes


def test_an_empty_tensor_has_a_place_too() -> None:
    trial = TrialMemory()
    assert trial.tensor((0, 4), torch.float32).numel() == 0
    assert trial.planned().tensor((0, 4), torch.float32).shape == (0, 4)


def test_another_forward_is_noticed() -> None:
    trial = TrialMemory()
    trial.tensor((3,), torch.float32)
    with pytest.raises(AssertionError, match="the same each time"):
        trial.planned().tensor((300,), torch.float32)
