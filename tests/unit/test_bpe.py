"""The encoder in plain Python against the library, id for id, and which files it leaves to the library."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.text import tokenizer as module
from gemcutter.text.bpe import BYTES, read_bpe
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tokenizer_parts import parts_of

RAW: dict[str, Any] = json.loads((DEMO_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
DEMO = Tokenizer.load(DEMO_FOLDER)
MARKERS = ("<bos>", "<|turn>", "<turn|>", "<|channel>", "<")
# Pieces of the vocabulary beside each other make many merges; markers and odd characters cut them.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([piece.replace("▁", " ") for piece in RAW["model"]["vocab"]]),
        st.sampled_from(MARKERS),
        st.text(max_size=12),
        st.sampled_from(["aaaaaaa", "          ", "\n\n\n\n", "the then there", "▁▁"]),
    ),
    max_size=12,
).map("".join)


def both(tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[list[int]]]:
    """Encode in plain Python, then by the library."""
    quick = [tokenizer.encode(text, bos=False), tokenizer.encode_plain(text)]
    with monkeypatch.context() as patch:
        patch.setattr(module, "LONG_TEXT", 0)
        return quick, [tokenizer.encode(text, bos=False), tokenizer.encode_plain(text)]


@settings(deadline=None, max_examples=100)
@given(TEXTS)
def test_the_demo_s_texts_have_the_library_s_ids(text: str) -> None:
    quick, library = both(DEMO, text, pytest.MonkeyPatch())
    assert quick == library


SCORED = ["<pad>", "<bos>", "<unk>", *BYTES, "▁", *"abcde", "ab", "bc", "abc", "▁a", "cd", "de", "cde", "aa", "aaa", "▁▁", "  x"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(-3, 0), min_size=len(SCORED), max_size=len(SCORED)),
    st.text(alphabet="abcde é", max_size=30),
)
def test_equal_scores_are_merged_in_the_library_s_order(scores: list[int], text: str) -> None:
    plain = {piece: float(score) for piece, score in zip(SCORED, scores, strict=True) if not piece.startswith(("<", "  "))}
    tokenizer = Tokenizer(parts_of(SCORED, plain, markers=[0, 1, 2], literals=[SCORED.index("  x")]))
    quick, library = both(tokenizer, text + "  x" + text, pytest.MonkeyPatch())
    assert quick == library


def test_the_library_is_not_needed_for_a_short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Tokenizer.load(DEMO_FOLDER)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", lambda path: pytest.fail("the library was asked"))
    assert fresh.decode(fresh.encode("A short text.", bos=True), special=False) == "A short text."


UNUSUAL: dict[str, Callable[[dict[str, Any]], object]] = {
    "model": lambda raw: raw.update(model={"type": "Unigram", "vocab": [["a", 0.0]]}),
    "normalizer": lambda raw: raw.update(normalizer=None),
    "pre-tokenizer": lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}),
    "no bytes": lambda raw: raw["model"].update(byte_fallback=False),
    "a byte missing": lambda raw: raw["model"]["vocab"].pop("<0xFF>"),
    "dropout": lambda raw: raw["model"].update(dropout=0.1),
    "prefix": lambda raw: raw["model"].update(continuing_subword_prefix="##"),
    "stripping token": lambda raw: raw["added_tokens"][3].update(lstrip=True),
    "normalized token": lambda raw: raw["added_tokens"][3].update(normalized=True),
    "token of another id": lambda raw: raw["added_tokens"][3].update(id=70_000),
    "token outside the vocabulary": lambda raw: raw["added_tokens"].append(raw["added_tokens"][3] | {"content": "<new>"}),
    "merge of nothing": lambda raw: raw["model"]["merges"].append(["no", "merge"]),
    "merge of three": lambda raw: raw["model"]["merges"].append(["a", "b", "c"]),
    "ids that are texts": lambda raw: raw["model"]["vocab"].update(a="1"),
    "tokens that are texts": lambda raw: raw.update(added_tokens=["<bos>"]),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_are_left_to_the_library(name: str) -> None:
    changed = copy.deepcopy(RAW)
    UNUSUAL[name](changed)
    assert read_bpe(RAW) is not None
    assert read_bpe(changed) is None
