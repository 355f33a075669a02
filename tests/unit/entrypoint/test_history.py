"""Served tokens in place of a gateway's: the same text, more of the cache."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.core.sampling import SamplingParams
from tokenspeed.entrypoint.history import Prompt, TokenHistory, served_tokens_max
from tokenspeed.entrypoint.spelling import TokenSpelling
from tokenspeed.loader import ModelFiles, Tokenizer
from tokenspeed.loader.detokenizer import TokenBytes

from .scripted_engine import ScriptedEngine

# A small vocabulary in which every text can be cut in many ways. Byte tokens come twice, as where
# bytes are a fallback; characters come whole and in parts.
TEXTS = [
    *(bytes([byte]) for byte in b"ab"),
    *(bytes([byte]) for byte in b"ab"),
    *(first + second for first in (b"a", b"b") for second in (b"a", b"b")),
    b"aba",
    b"<a>",
    *(bytes([byte]) for byte in "é€<>".encode()),
    "é".encode(),
    b"b\xc3",
    b"\xa9a",
    b"\xff",
    b"",
    b"<a>",
    b"ab",
]
# The last two are control tokens whose text can be written in others.
CONTROL = frozenset({len(TEXTS) - 2, len(TEXTS) - 1})
TOKENS_MAX = 1 << 30

TOKENS = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=24)


def history(size_max_bytes: int = 1 << 20) -> TokenHistory:
    spelling = TokenSpelling(TEXTS.__getitem__, control=CONTROL, vocab_size=len(TEXTS))
    return TokenHistory(spelling, size_max_bytes=size_max_bytes, block_size_bytes=4)


def recalled(memory: TokenHistory, ids: list[int], tenant: str | None = None) -> Prompt:
    return memory.recall(np.array(ids, np.int64), tenant=tenant, tokens_max=TOKENS_MAX)


def served(
    memory: TokenHistory, ids: list[int], answer: list[int], tenant: str | None = None
) -> None:
    memory.remember(recalled(memory, ids, tenant), answer)


def meaning(ids: Any) -> list[object]:
    """What a reader and a model's template take tokens for: bytes, and tokens that are no text."""
    found: list[object] = []
    for token in map(int, ids):
        text = TEXTS[token]
        if token in CONTROL or not text or b"\xff" in text:
            found.append(("token", token))
        else:
            found += text
    return found


def cut_anew(ids: list[int], choose: Callable[[int], int]) -> list[int]:
    """Other tokens of the same meaning; `choose(n)` picks one of n."""
    rest, found = meaning(ids), []
    while rest:
        fits = [
            token for token in range(len(TEXTS)) if (one := meaning([token])) == rest[: len(one)]
        ]
        found.append(fits[choose(len(fits))])
        rest = rest[len(meaning([found[-1]])) :]
    return found


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Sequences that were served, and a prompt that begins with a part of one, cut anew."""
    first = draw(TOKENS)
    sequences = [first]
    for _ in range(draw(st.integers(0, 3))):
        old = draw(st.sampled_from(sequences))
        sequences.append(old[: draw(st.integers(0, len(old)))] + draw(TOKENS))
    old = draw(st.sampled_from(sequences))
    head = cut_anew(
        old[: draw(st.integers(0, len(old)))], lambda count: draw(st.integers(0, count - 1))
    )
    return sequences, (head + draw(TOKENS))


@settings(deadline=None)
@given(conversations())
def test_a_recalled_prompt_means_what_it_meant(
    conversation: tuple[list[list[int]], list[int]],
) -> None:
    sequences, prompt = conversation
    memory = history()
    for sequence in sequences:
        served(memory, sequence[:1], sequence[1:] or [0])
    found = recalled(memory, prompt)
    assert meaning(found.ids) == meaning(prompt)
    assert found.sent_tokens == len(prompt)


@settings(deadline=None)
@given(conversations())
def test_recalling_twice_is_recalling_once(conversation: tuple[list[list[int]], list[int]]) -> None:
    sequences, prompt = conversation
    memory = history()
    for sequence in sequences:
        served(memory, sequence[:1], sequence[1:] or [0])
    once = recalled(memory, prompt)
    twice = recalled(memory, once.ids.tolist())
    assert twice.ids.tolist() == once.ids.tolist()
    assert twice.replaced_tokens == 0


@settings(deadline=None)
@given(TOKENS, TOKENS, st.data())
def test_a_text_that_goes_on_is_served_as_it_was(
    sequence: list[int], new: list[int], data: st.DataObject
) -> None:
    memory = history()
    # At least a block, which a shorter text is not found by.
    sequence = [*sequence, 0, 1, 0, 1]
    served(memory, sequence[:1], sequence[1:])
    anew = cut_anew(sequence, lambda count: data.draw(st.integers(0, count - 1)))
    found = recalled(memory, anew + new)
    assert found.ids.tolist() == [*sequence, *new]
    assert (found.replaced_tokens > 0) == (anew != sequence)


@settings(deadline=None)
@given(conversations())
def test_cached_tokens_are_counted_as_the_prompt_came(
    conversation: tuple[list[list[int]], list[int]],
) -> None:
    sequences, prompt = conversation
    memory = history()
    for sequence in sequences:
        served(memory, sequence[:1], sequence[1:] or [0])
    found = recalled(memory, prompt)
    ends = np.cumsum([len(meaning([token])) for token in prompt])
    for cached in range(len(found.ids) + 1):
        reach = len(meaning(found.ids[:cached]))
        assert found.in_sent_tokens(cached) == np.count_nonzero(ends <= reach)


def test_tokens_that_meet_inside_another_token_stay_as_they_came() -> None:
    memory = history()
    served(memory, [0, 1, 0, 1], [0])
    # The text goes on as "baba", "a|b" as one token: they meet for the last time before it.
    assert recalled(memory, [4 + 1, 4 + 1, 4 + 1]).ids.tolist() == [0, 1, 0, 1, 5]


def test_a_control_token_is_no_text_and_no_text_is_a_control_token() -> None:
    control, written = len(TEXTS) - 2, TEXTS.index(b"<a>")
    for kept, came in ((control, written), (written, control)):
        memory = history()
        served(memory, [0, 1, 0, 1], [kept, 0, 0])
        # "ab" as one token shows that the rest was found.
        assert recalled(memory, [5, 5, came, 0]).ids.tolist() == [0, 1, 0, 1, came, 0]


def test_bytes_that_are_no_text_cannot_pass_for_a_control_token() -> None:
    # The control token is 3; the bytes before it are how it might be written down.
    texts = [b"\xff", b"\x00", b"\x03", b"<a>", b"abab"]
    spelling = TokenSpelling(texts.__getitem__, control=frozenset({3}), vocab_size=len(texts))
    for raw in ([0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]):
        memory = TokenHistory(spelling, block_size_bytes=4)
        served(memory, [4], raw)
        assert recalled(memory, [4, 3]).ids.tolist() == [4, 3]


def test_a_part_of_a_character_is_compared_by_its_bytes() -> None:
    whole, parts = TEXTS.index("é".encode()), [TEXTS.index(b"b\xc3"), TEXTS.index(b"\xa9a")]
    memory = history()
    served(memory, [0, 1, 0, 1], parts)
    assert recalled(memory, [5, 5, 1, whole, 0, 1]).ids.tolist() == [0, 1, 0, 1, *parts, 1]


def test_leading_spaces_are_spaces_whatever_a_vocabulary_writes() -> None:
    words = ["\u2581Hello", "\u2581", "Hello", "<0x20>", "<0x0A>", "\n"]
    token_bytes = TokenBytes(
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        text_of=dict(enumerate(words)).get,
        added={},
        special=frozenset(),
    )
    spelling = TokenSpelling(token_bytes.__getitem__, control=frozenset(), vocab_size=len(words))
    memory = TokenHistory(spelling, block_size_bytes=4)
    served(memory, [1, 2, 4], [3, 2])
    assert recalled(memory, [0, 5, 0, 5]).ids.tolist() == [1, 2, 4, 3, 2, 5]


@settings(deadline=None)
@given(conversations())
def test_nothing_is_recalled_of_another_tenant(
    conversation: tuple[list[list[int]], list[int]],
) -> None:
    sequences, prompt = conversation
    memory = history()
    for sequence in sequences:
        served(memory, sequence[:1], sequence[1:] or [0], tenant="a")
    for tenant in ("b", None, ""):
        assert recalled(memory, prompt, tenant).ids.tolist() == prompt


@settings(deadline=None)
@given(st.lists(st.tuples(TOKENS, st.sampled_from([None, "a", "b"])), max_size=40))
def test_memory_is_bounded_and_adds_up(turns: list[tuple[list[int], str | None]]) -> None:
    memory = history(size_max_bytes=3000)
    for ids, tenant in turns:
        served(memory, ids, [0, 1, 0, 1], tenant)
        stats = memory.stats
        assert stats.size_bytes <= 3000
        assert stats.sequences == len(memory._sequences)
        assert stats.size_bytes == sum(entry.size_bytes for entry in memory._sequences)
        for name, owner in memory._tenants.items():
            assert owner.size_bytes == sum(entry.size_bytes for entry in owner.sequences)
            assert all(entry.tenant == name for entry in owner.sequences)
            # What was forgotten is found no more.
            assert all(entry in owner.sequences for entry in owner.index.values())


def test_a_tenant_of_many_texts_makes_room_by_itself() -> None:
    memory = history(size_max_bytes=4000)
    served(memory, [0, 1, 0, 1], [0, 1], tenant="quiet")
    for number in range(200):
        served(memory, [int(bit) for bit in f"{number:08b}"], [0, 1], tenant="busy")
    assert memory.stats.forgotten > 20
    assert recalled(memory, [5, 5, 5, 0], "quiet").ids.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_a_conversation_is_remembered_once() -> None:
    memory = history()
    prompt = [0, 1, 0, 1]
    for _ in range(20):
        served(memory, prompt, [0, 1, 1])
        # The same turn again, and a shorter answer, add nothing.
        served(memory, prompt, [0, 1, 1])
        served(memory, prompt, [0])
        prompt += [0, 1, 1, 0]
    assert memory.stats.sequences == 1


def test_a_text_that_went_two_ways_is_remembered_both_ways() -> None:
    memory = history()
    served(memory, [0, 1, 0, 1], [0] * 8)
    served(memory, [0, 1, 0, 1], [1] * 8)
    aa, bb = TEXTS.index(b"aa"), TEXTS.index(b"bb")
    assert recalled(memory, [5, 5, aa, aa, aa, aa]).ids.tolist() == [0, 1, 0, 1, *[0] * 8]
    assert recalled(memory, [5, 5, bb, bb, bb, bb]).ids.tolist() == [0, 1, 0, 1, *[1] * 8]


def test_what_cannot_be_spelled_stays_as_it_came() -> None:
    memory = history()
    for ids in ([], [-1], [len(TEXTS)], [1 << 40]):
        prompt = recalled(memory, ids)
        assert prompt.ids.tolist() == ids
        memory.remember(prompt, [1, 2, 3])
    memory.remember(recalled(memory, [0, 1, 0, 1]), [len(TEXTS)])
    assert memory.stats.sequences == 0


def test_a_prompt_that_would_grow_too_long_stays_as_it_came() -> None:
    memory = history()
    served(memory, [0, 1, 0, 1], [0])
    ids = np.array([5, 5, 1])
    assert memory.recall(ids, tenant=None, tokens_max=5).ids.tolist() == [0, 1, 0, 1, 1]
    assert memory.recall(ids, tenant=None, tokens_max=4).ids.tolist() == [5, 5, 1]


@settings(deadline=None)
@given(
    st.integers(1, 600), st.none() | st.integers(1, 600), st.integers(0, 600), st.integers(0, 300)
)
def test_the_answer_keeps_its_room(
    sent: int, max_new_tokens: int | None, min_new_tokens: int, growth: int
) -> None:
    info = ScriptedEngine().info
    limit = min(info.context_max, info.pages * info.page_size)
    if max_new_tokens is not None:
        min_new_tokens = min(min_new_tokens, max_new_tokens)
    params = SamplingParams(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
    if sent + growth > served_tokens_max(sent, params, info):
        return
    before, after = limit - sent, limit - sent - growth
    assert after >= 1
    asked = before if max_new_tokens is None else min(max_new_tokens, before)
    assert after >= min(asked, before * 9 // 10)
    assert after >= min_new_tokens


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of Python a call runs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "kind", ["every token differs", "nothing in common", "the end differs", "many branches"]
)
def test_hostile_prompts_cost_no_more_than_their_length(kind: str) -> None:
    def cost(length: int) -> int:
        memory = history()
        served(memory, [0, 1] * (length // 2), [0])
        prompt = {
            "every token differs": [5] * (length // 2),
            "nothing in common": [1, 1] * (length // 2),
            "the end differs": [0, 1] * (length // 2 - 1) + [1, 1],
            "many branches": [5] * (length // 2),
        }[kind]
        if kind == "many branches":
            for cut in range(0, length, length // 16):
                served(memory, [0, 1] * (cut // 2), [1] * 20)
        recalled(memory, prompt)
        return lines_run(lambda: served(memory, prompt, [0, 0]))

    assert cost(8000) <= 2.2 * cost(4000)


def test_a_real_tokenizer_text_in_other_tokens(smollm2: ModelFiles) -> None:
    tokenizer = Tokenizer(smollm2.tokenizer_dir)
    memory = TokenHistory(
        TokenSpelling(
            tokenizer.bytes_of,
            control=tokenizer.control_token_ids,
            vocab_size=tokenizer.vocab_size,
        )
    )
    head = tokenizer.encode("<|im_start|>user\nWrite a poem: 🐧 naïve café<|im_end|>\n")
    answer = "def poem():\n    return 'Été, 🐧 and foo bar'\n" * 4
    # Each character by itself, of which some are several tokens.
    odd = [token for character in answer for token in tokenizer.encode(character)]
    assert odd != tokenizer.encode(answer)
    served(memory, head, odd)
    tail = tokenizer.encode("<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n")
    again = head + tokenizer.encode(answer) + tail
    found = recalled(memory, again)
    assert found.ids.tolist() == head + odd + tail
    assert tokenizer.decode(found.ids.tolist()) == tokenizer.decode(again)
    assert found.in_sent_tokens(len(found.ids)) == len(again)
