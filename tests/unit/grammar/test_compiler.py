"""Constraints are compiled beside the engine, in processes that may be killed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.grammars import SLOW, TABLE, compiler, takes, wait
from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.errors import InvalidParameter, Overloaded, RequestError
from tokenspeed.grammar import ConstraintCompiler, Grammar, Refusal, TokenTable
from tokenspeed.grammar.compiler import KEPT_MAX, WAITING_MAX

FOO = StructuredOutputs(regex="foo")
LARGE = StructuredOutputs(regex="|".join(f"w{n}x{n * 7}" for n in range(20_000)))


@pytest.fixture
def subject() -> Iterator[ConstraintCompiler]:
    made = compiler(time_max_s=1)
    yield made
    made.close()


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "tokenspeed.grammar.worker" in child.cmdline()
    ]


def worker_of() -> psutil.Process:
    (found,) = workers()
    return found


def test_nothing_runs_before_the_first_constraint(subject: ConstraintCompiler) -> None:
    assert not workers()
    assert len(subject) == 0
    assert subject.take() == []


def test_a_request_gets_its_grammar_and_the_next_one_at_once(subject: ConstraintCompiler) -> None:
    subject.submit(1, FOO)
    assert len(subject) == 1
    (first,) = wait(subject)
    assert first.request == 1
    assert isinstance(first.outcome, Grammar)
    assert takes(first.outcome, [TABLE.texts.index(b"foo")])
    subject.submit(2, FOO)
    (second,) = subject.take()
    assert (second.request, second.outcome) == (2, first.outcome)
    assert len(subject) == 0


def test_requests_that_want_the_same_share_one_trial(subject: ConstraintCompiler) -> None:
    for request in (3, 1, 2):
        subject.submit(request, FOO)
    ready = wait(subject)
    assert [item.request for item in ready] == [1, 2, 3]
    assert len({id(item.outcome) for item in ready}) == 1


def test_a_refusal_names_kind_and_reason_and_is_kept(subject: ConstraintCompiler) -> None:
    wrong = StructuredOutputs(json={"uniqueItems": True})
    subject.submit(1, wrong)
    (first,) = wait(subject)
    assert isinstance(first.outcome, Refusal)
    assert isinstance(first.outcome.error(), InvalidParameter)
    assert "json_schema" in first.outcome.reason
    assert "uniqueItems" in first.outcome.reason
    subject.submit(2, wrong)
    assert subject.take()[0].outcome is first.outcome


@pytest.mark.parametrize("limits", [{"time_max_s": 1}, {"memory_max_bytes": 1 << 20}], ids=str)
def test_a_trial_that_takes_too_much_ends_and_no_other_does(limits: dict[str, int]) -> None:
    subject = compiler(**limits)
    try:
        subject.submit(1, SLOW if "time_max_s" in limits else LARGE)
        (ended,) = wait(subject)
        assert isinstance(ended.outcome, Refusal)
        assert isinstance(ended.outcome.error(), InvalidParameter)
        assert "do not suffice" in str(ended.outcome)
        worker = worker_of()
        subject.submit(2, FOO)
        (other,) = wait(subject)
        assert isinstance(other.outcome, Grammar)
        assert worker_of() == worker
        assert not worker.children()
    finally:
        subject.close()


def test_others_pass_a_slow_trial(subject: ConstraintCompiler) -> None:
    subject.submit(1, SLOW)
    subject.submit(2, FOO)
    (first,) = wait(subject)
    assert (first.request, len(subject)) == (2, 1)
    (second,) = wait(subject)
    assert second.request == 1


def test_a_request_that_is_cancelled_ends_its_trial_unless_another_waits() -> None:
    subject = compiler(time_max_s=300)
    subject.submit(1, FOO)
    wait(subject)
    worker = worker_of()
    subject.submit(2, SLOW)
    subject.submit(3, SLOW)
    while not worker.children():
        pass
    (trial,) = worker.children()
    assert subject.cancel(2)
    assert not subject.cancel(2)
    assert trial.is_running()
    assert subject.cancel(3)
    trial.wait(30)
    assert len(subject) == 0
    subject.submit(4, StructuredOutputs(regex="bar"))
    assert [item.request for item in wait(subject)] == [4]
    subject.close()


def test_a_worker_that_dies_is_replaced() -> None:
    subject = compiler(time_max_s=300)
    subject.submit(1, FOO)
    wait(subject)
    worker = worker_of()
    subject.submit(2, SLOW)
    while not worker.children():
        pass
    (trial,) = worker.children()
    os.kill(worker.pid, signal.SIGKILL)
    # That its trial goes on until its limits keeps nobody waiting.
    (lost,) = wait(subject)
    assert trial.is_running()
    trial.kill()
    assert isinstance(lost.outcome, Refusal)
    assert type(lost.outcome.error()) is RequestError
    subject.submit(3, StructuredOutputs(regex="bar"))
    (found,) = wait(subject)
    assert isinstance(found.outcome, Grammar)
    assert worker_of() != worker
    subject.close()


def test_the_worker_ends_with_its_engine() -> None:
    subject = compiler()
    subject.submit(1, FOO)
    wait(subject)
    worker = worker_of()
    threads = psutil.Process().num_threads()
    subject.close()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert psutil.Process().num_threads() < threads


def test_the_worker_loads_neither_torch_nor_a_tokenizer(subject: ConstraintCompiler) -> None:
    subject.submit(1, FOO)
    wait(subject)
    mapped = Path(f"/proc/{worker_of().pid}/maps").read_text()
    assert "libtorch" not in mapped
    assert "tokenizers" not in mapped


def test_what_is_kept_and_who_waits_is_bounded(subject: ConstraintCompiler) -> None:
    for number in range(KEPT_MAX + 3):
        subject.submit(number, StructuredOutputs(regex=f"a{number}"))
    left = KEPT_MAX + 3
    while left:
        left -= len(wait(subject))
    subject.submit(0, StructuredOutputs(regex="a0"))
    assert subject.take() == []
    subject.submit(1, StructuredOutputs(regex=f"a{KEPT_MAX}"))
    assert len(subject.take()) == 1
    for number in range(2, WAITING_MAX + 1):
        subject.submit(number, SLOW)
    with pytest.raises(Overloaded):
        subject.submit(WAITING_MAX + 1, SLOW)


def test_a_model_without_an_end_gets_no_constraints() -> None:
    table = TokenTable(texts=[b"a"], special=[], ends=[])
    subject = ConstraintCompiler(lambda: table, list)
    try:
        subject.submit(1, FOO)
        (refused,) = wait(subject)
        assert "ends a text" in str(refused.outcome)
    finally:
        subject.close()
