"""What a text repeats, against a search through all of it."""

import random

import pytest

from tokenspeed._control import SuffixAutomaton


def longest_by_search(text: list[int]) -> int:
    """Tokens of the longest suffix that ends somewhere earlier too."""
    for length in range(len(text) - 1, 0, -1):
        suffix = text[-length:]
        if any(text[i : i + length] == suffix for i in range(len(text) - length)):
            return length
    return 0


def texts(rng: random.Random) -> list[int]:
    """Random tokens of few or many kinds, or pieces of what was there with changes."""
    kinds = rng.choice([1, 2, 3, 20])
    text = [rng.randrange(kinds) for _ in range(rng.choice([1, 5, 40]))]
    while len(text) < 80 and rng.random() < 0.95:
        begin = rng.randrange(len(text))
        text += text[begin : begin + rng.randrange(1, 20)]
        if rng.random() < 0.5:
            text.append(rng.randrange(kinds))
    return text[:120]


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_earlier_occurrence_is_found_after_each_token(seed: int) -> None:
    print(f"seed {seed}")
    text = texts(random.Random(seed))
    automaton = SuffixAutomaton()
    for end, token in enumerate(text):
        automaton.append(token)
        known = text[: end + 1]
        length, place = automaton.longest()
        assert length == longest_by_search(known)
        if length == 0:
            continue
        assert place < end
        assert known[place - length + 1 : place + 1] == known[-length:]
        # What comes after it, and from the end on as it went on since.
        after = known[place + 1 :]
        assert [automaton.after(i) for i in range(9)] == [after[i % len(after)] for i in range(9)]


def test_the_occurrence_is_the_latest_one_but_for_deep_nesting() -> None:
    automaton = SuffixAutomaton()
    for token in [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]:
        automaton.append(token)
    assert automaton.longest() == (3, 6)
    assert automaton.after(0) == 5


@pytest.mark.parametrize("kinds", [1, 2, 50, 50_000])
def test_a_token_takes_a_bounded_number_of_bytes(kinds: int) -> None:
    rng = random.Random(kinds)
    automaton = SuffixAutomaton()
    count = 20_000
    for _ in range(count):
        automaton.append(rng.randrange(kinds))
    each = automaton.size_bytes() / count
    print(f"{kinds} kinds of tokens: {each:.0f} bytes each")
    assert each < 140


@pytest.mark.parametrize("seed", range(20))
def test_it_never_takes_more_than_it_was_said_to(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    kinds = rng.choice([1, 2, 5, 50_000])
    automaton = SuffixAutomaton()
    for _ in range(40):
        more = rng.randrange(1, 200)
        most = automaton.size_bytes_after(more)
        for _ in range(more):
            automaton.append(rng.randrange(kinds))
        assert automaton.size_bytes() <= most
        assert most < 3 * automaton.size_bytes() + 200 * more
