"""The order of merges gives each pair of pieces the place that the list of merges gives it, or there is none."""

from __future__ import annotations

import json
import lzma
from array import array
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.text import merge_order as module
from gemcutter.text.bpe import by_merges
from gemcutter.text.merge_order import find_order
from tests.real_tokenizer import fixtures

PIECES = [*"abc", "ab", "aa", "bc", "abc", "aaa", "aab", "aaaa", "abab", "cab", "ca", "bca", "x"]


def cuts(pieces: list[str]) -> list[str]:
    """Return all ways to put a piece together of two others, as a trainer lists them."""
    return [
        f"{piece[:n]} {piece[n:]}"
        for piece in pieces
        for n in range(len(piece) - 1, 0, -1)
        if piece[:n] in pieces and piece[n:] in pieces
    ]


def check_same(ids: dict[str, int], merges: list[str]) -> int:
    """Compare the places of all pairs with the list's; return how many pieces keep to no rule."""
    found = find_order(ids, merges)
    assert found is not None
    mine, listed = found.ranker(ids), by_merges(merges)
    pairs = [(left, right) for left in ids for right in ids]
    assert [mine(*pair) is None for pair in pairs] == [listed(*pair) is None for pair in pairs]
    known = [pair for pair in pairs if listed(*pair) is not None]
    assert sorted(known, key=lambda pair: listed(*pair)) == sorted(known, key=lambda pair: mine(*pair))
    return len(found.irregular)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_list_has_its_order(data: st.DataObject) -> None:
    pieces = data.draw(st.permutations(PIECES))
    merges = cuts(pieces)
    for _ in range(data.draw(st.integers(0, 4))):  # moved, left out, repeated
        at, to = data.draw(st.integers(0, len(merges) - 1)), data.draw(st.integers(0, len(merges) - 1))
        merge = merges[at] if data.draw(st.booleans()) else merges.pop(at)
        if data.draw(st.booleans()):
            merges.insert(to, merge)
    check_same({piece: id for id, piece in enumerate(pieces)}, merges)
    check_same({piece: id for id, piece in enumerate(pieces)}, data.draw(st.permutations(merges)))


def test_a_trainer_s_list_is_all_rule() -> None:
    assert check_same({piece: id for id, piece in enumerate(PIECES)}, cuts(PIECES)) == 0


def test_no_order_without_one_id_a_piece() -> None:
    ids = {piece: id for id, piece in enumerate(PIECES)}
    assert find_order(ids | {"x": 0}, cuts(PIECES)) is None
    assert find_order(ids | {"x": 10**12}, cuts(PIECES)) is None
    assert find_order(ids | {"x": -1}, cuts(PIECES)) is None
    assert find_order(ids | {"x" * 1001: 14}, cuts(PIECES)) is None


def test_no_order_where_most_are_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, merges = {piece: id for id, piece in enumerate(PIECES)}, cuts(PIECES)[::-1]
    assert find_order(ids, merges) is not None
    monkeypatch.setattr(module, "MOST_EXCEPTIONS", 5)
    assert find_order(ids, merges) is None


def test_the_released_vocabulary_s_half_million_merges_have_few_exceptions() -> None:
    folder = fixtures()
    pieces: list[str] = json.loads(lzma.decompress((folder / "gemma4_tokens.json.xz").read_bytes()))
    places = array("I", lzma.decompress((folder / "gemma4_merges.u32le.xz").read_bytes()))
    pairs = [(pieces[left], pieces[right]) for left, right in zip(places[::2], places[1::2], strict=True)]
    ids, pauses = {piece: id for id, piece in enumerate(pieces)}, [0]

    def pause() -> None:
        pauses[0] += 1

    found = find_order(ids, [" ".join(pair) for pair in pairs], pause)
    assert found is not None
    assert len(found.keys) < 2_000
    assert len(found.irregular) < 200
    rank = found.ranker(ids)
    keys = [rank(*pair) for pair in pairs]
    assert all(one is not None and other is not None and one < other for one, other in pairwise(keys))
    assert pauses[0] > 1_000
