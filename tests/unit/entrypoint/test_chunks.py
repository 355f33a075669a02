"""Where the chunks of a stream end."""

from itertools import chain

from tokenspeed.entrypoint.chunks import ALONE_AFTER_MARK, ChunkCutter

MARKS = frozenset({7, 8})


def cut(*deltas: list[int]) -> list[list[int]]:
    cutter = ChunkCutter(MARKS)
    return [ids[part] for ids in deltas for part in cutter.cut(ids)]


def test_plain_text_stays_in_one_piece() -> None:
    assert cut([1, 2, 3], [4], []) == [[1, 2, 3], [4]]


def test_a_mark_and_what_follows_it_stand_alone() -> None:
    assert cut([1, 2, 7, 3], [4, 8]) == [[1, 2], [7], [3], [4], [8]]


def test_long_after_a_mark_tokens_share_chunks_again() -> None:
    follow = list(range(100, 100 + ALONE_AFTER_MARK + 3))
    assert cut([7, *follow]) == [[7], *([t] for t in follow[:-3]), follow[-3:]]


def test_nothing_is_lost_or_put_in_another_order() -> None:
    deltas = [[1, 7], [7, 8, 1], list(range(20, 90)), [8]]
    assert list(chain(*cut(*deltas))) == list(chain(*deltas))
