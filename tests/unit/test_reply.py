"""Replies as they stream: whatever the cuts between ids, one ends as the one-shot result, and takes back nothing that it showed.

Read `test_tool_calls.py` for calls.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gemcutter.errors import RequestError
from gemcutter.text import reply as module
from gemcutter.text.quoted_text import SPACE
from gemcutter.text.reply import ReplyParser, ReplyPiece, ends_at_turn_start, ends_in_reasoning
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tokenizer_parts import TokenizerParts
from tests.real_tokenizer import golden_chats, real_template, real_tokenizer

DEMO = Path(module.__file__).resolve().parents[1] / "demo"
TOKENIZER = Tokenizer.load(DEMO)
OPEN, CLOSE = "<|channel>", "<channel|>"


def id_of(piece: str) -> int:
    id = TOKENIZER.id_of(piece)
    assert id is not None
    return id


def as_bytes(text: str | bytes) -> list[int]:
    return [id_of(f"<0x{byte:02X}>") for byte in (text.encode() if isinstance(text, str) else text)]


def run(ids: list[int], **options: Any) -> ReplyParser:
    """Push all ids, finish, and check that the pieces are what the stream says its texts are."""
    stream = ReplyParser(TOKENIZER, **options)
    pieces = [piece for id in ids for piece in stream.push(id)] + stream.finish()
    assert all(piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == stream.text
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == stream.reasoning
    return stream


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the stop string that is complete first, the longest of those; by trying every stretch."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[:start], text[start:end]
    return text, None


# Every id but those that switch lanes or end a call: ordinary pieces, single bytes, other markers.
LANE_IDS = tuple(id_of(piece) for piece in (OPEN, CLOSE, "<|tool_call>"))
CONTENT_IDS = st.lists(
    st.one_of(
        st.integers(id_of("<0x00>"), id_of("<0xFF>")),
        st.integers(0, TOKENIZER.vocab_size - 1).filter(lambda id: id not in LANE_IDS),
    ),
    max_size=40,
)
SCRIPTS = st.text(
    st.one_of(st.characters(codec="utf-8", exclude_characters="▁<"), st.sampled_from("ab \n日本é́🙂👩‍👩‍👧🇫🇷\u200d")), max_size=12
)


@st.composite
def ids_of_text(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[str, list[int]]:
    """Return a text and ids for it, some of its stretches as ordinary pieces and some as single bytes."""
    stretches = draw(st.lists(st.tuples(texts, st.booleans()), max_size=6))
    ids = [id for text, is_bytes in stretches for id in (as_bytes(text) if is_bytes else TOKENIZER.encode_plain(text))]
    return "".join(text for text, _ in stretches), ids


@given(CONTENT_IDS, st.booleans())
def test_any_ids_stream_to_what_they_decode_to(ids: list[int], show_special: bool) -> None:
    assert run(ids, show_special=show_special).text == TOKENIZER.decode(ids, special=show_special)


@given(ids_of_text(SCRIPTS))
def test_characters_are_never_shown_in_halves(case: tuple[str, list[int]]) -> None:
    text, ids = case
    stream = ReplyParser(TOKENIZER)
    for id in ids:
        stream.push(id)
        assert text.startswith(stream.text)
        assert stream.text == text[: len(stream.text)].rstrip(SPACE)
    assert [piece for piece in stream.finish() if piece.text.strip(SPACE)] == []
    assert stream.text == text


@given(ids_of_text(SCRIPTS), st.data())
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(case: tuple[str, list[int]], data: st.DataObject) -> None:
    text, ids = case
    inner = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 8)).map(lambda c: text[c[0] : c[0] + c[1]] or "x")
    stops = data.draw(st.lists(st.one_of(inner, st.text(min_size=1, max_size=4)), max_size=3))
    expected, met = cut_at_first_stop(text, stops)
    stream = ReplyParser(TOKENIZER, stop=stops)
    for id in ids:
        stream.push(id)
        assert expected.startswith(stream.text)
    stream.finish()
    assert (stream.text, stream.stopped) == (expected, met)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), st.booleans())
def test_overlapping_stop_strings(text: str, stops: list[str], is_bytes: bool) -> None:
    stream = run(as_bytes(text) if is_bytes else TOKENIZER.encode_plain(text), stop=stops)
    assert (stream.text, stream.stopped) == cut_at_first_stop(text, stops)


@given(st.lists(st.tuples(st.booleans(), CONTENT_IDS), max_size=6), st.booleans())
def test_channels_keep_both_texts_apart(segments: list[tuple[bool, list[int]]], is_last_open: bool) -> None:
    ids: list[int] = []
    content, thoughts = "", list[str]()
    segments = [each for place, each in enumerate(segments) if each[0] or not place or segments[place - 1][0]]
    for place, (is_channel, inner) in enumerate(segments):
        text = TOKENIZER.decode(inner, special=False)
        if is_channel:
            ids += [id_of(OPEN), *inner, id_of(CLOSE)]
            thoughts.append(text.removeprefix("thought\n").strip(SPACE) if text != "thought" else "")
            continue
        ids += inner
        text = text.lstrip(SPACE) if place else text
        content += text.rstrip(SPACE) if place + 1 < len(segments) and segments[place + 1][0] else text
    if is_last_open and segments and segments[-1][0]:
        ids.pop()
    parser = run(ids)
    assert parser.reasoning == "\n".join(filter(None, thoughts))
    assert parser.text.strip(SPACE) == content.strip(SPACE)


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        (f"{OPEN}thought\nHm.\n{CLOSE}Yes.", "Yes.", "Hm."),
        (f"{OPEN}thoughtHm.{CLOSE}Yes.", "Yes.", "thoughtHm."),
        (f"{OPEN}thought{CLOSE}Yes.", "Yes.", ""),
        (f"{OPEN}thought\n{CLOSE}Yes.", "Yes.", ""),
        (f"{OPEN}{CLOSE}{CLOSE}Yes.", "Yes.", ""),
        (f"{OPEN}thou{CLOSE}Yes.", "Yes.", "thou"),
        (f"{OPEN}Hm, thought\n{CLOSE}Yes.", "Yes.", "Hm, thought"),
        (f"A{CLOSE}B", "AB", ""),
        (f"A {CLOSE} B", "A  B", ""),
        (f"A \n{OPEN}thought\n{CLOSE}\n B \n", "AB \n", ""),
        (f"{OPEN}thought\nA{OPEN}thought\nB{CLOSE}C", "C", "A\nB"),
        (f"{OPEN}thou{OPEN}thought\nB{CLOSE}C", "C", "thou\nB"),
        (f"{OPEN}thought\nA{CLOSE}B{OPEN}thought\n \n{CLOSE}{OPEN}thought\nC\n\n{CLOSE}D", "BD", "A\nC"),
        (f"{OPEN}thought\nnever \n ends\n", "", "never \n ends"),
        (f"{OPEN}thou", "", "thou"),
        (f"{OPEN}thought", "", ""),
        (f"{OPEN}thought\nA<turn|>B{CLOSE} C<turn|>", "C", "AB"),
        ("  thought\nYes.", "  thought\nYes.", ""),
        ("thought\nYes.", "thought\nYes.", ""),
    ],
)
def test_channel_rules(text: str, content: str, reasoning: str) -> None:
    for ids in (TOKENIZER.encode(text, bos=False), split_to_bytes(text)):
        stream = run(ids)
        assert (stream.text, stream.reasoning) == (content, reasoning)


def split_to_bytes(text: str) -> list[int]:
    """Return the ids of `text` with everything but its markers as single bytes."""
    ids = TOKENIZER.encode(text, bos=False)
    return [part for id in ids for part in ([id] if id in TOKENIZER.special_ids else as_bytes(TOKENIZER.bytes_of(id)))]


def test_an_unfinished_character_is_replaced_where_its_channel_ends() -> None:
    half = as_bytes("é")[:1]
    stream = run([id_of(OPEN), *half, id_of(CLOSE), *half])
    assert (stream.text, stream.reasoning) == ("\ufffd", "\ufffd")


def test_a_reply_may_start_in_reasoning() -> None:
    ids = TOKENIZER.encode(f"thought is free{CLOSE}Yes.", bos=False)
    stream = run(ids, in_reasoning=True)
    assert (stream.text, stream.reasoning) == ("Yes.", "thought is free")
    ids = TOKENIZER.encode(f"thought\nfree{CLOSE}Yes.", bos=False)
    assert run(ids, in_reasoning=True, with_header=True).reasoning == "free"


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        (f"thought\nHm.{CLOSE}Yes.", "Yes.", "Hm."),
        (f"thought{CLOSE}Yes.", "Yes.", ""),
        ("thought\nHm.", "", "Hm."),
        ("thoughtful", "thoughtful", ""),
        ("thought", "thought", ""),
        ("thou", "thou", ""),
        ("\nthought\n", "\nthought\n", ""),
        (f"{OPEN}thought\nHm.{CLOSE}thought\nYes.", "thought\nYes.", "Hm."),
        (f"A{OPEN}thought\nHm.{CLOSE}thought\nYes.", "Athought\nYes.", "Hm."),
        ("", "", ""),
    ],
)
def test_a_thought_line_at_the_start_of_a_turn_is_a_channel(text: str, content: str, reasoning: str) -> None:
    for ids in (TOKENIZER.encode(text, bos=False), split_to_bytes(text)):
        parser = run(ids, at_turn_start=True)
        assert (parser.text, parser.reasoning) == (content, reasoning)


def test_stop_strings_do_not_end_reasoning() -> None:
    stream = run(TOKENIZER.encode(f"{OPEN}thought\nEND{CLOSE}a END b", bos=False), stop=["END"])
    assert (stream.text, stream.reasoning, stream.stopped) == ("a ", "END", "END")


def test_a_stop_string_may_straddle_a_channel_and_end_at_the_last_byte() -> None:
    assert run(TOKENIZER.encode(f"aE{OPEN}x{CLOSE}ND", bos=False), stop=["END"]).text == "a"
    assert run(as_bytes("a\u00e9")[:-1], stop=["\ufffd"]).stopped == "\ufffd"


def test_nothing_follows_a_stop_or_the_finish() -> None:
    stopped = ReplyParser(TOKENIZER, stop=["b"])
    assert stopped.push(as_bytes("a")[0]) == [ReplyPiece("content", "a")]
    assert stopped.push(as_bytes("b")[0]) == []
    assert stopped.stopped == "b"
    assert [stopped.push(id) for id in [*as_bytes("c"), id_of(OPEN), *as_bytes("d")]] == [[], [], []]
    assert stopped.finish() == []
    assert (stopped.text, stopped.reasoning) == ("a", "")
    finished = run(as_bytes("a"))
    assert finished.push(as_bytes("b")[0]) == []
    assert finished.finish() == []
    assert finished.text == "a"


def test_text_that_may_become_a_stop_string_is_held_back_until_it_can_not() -> None:
    stream = ReplyParser(TOKENIZER, stop=["abcd"])
    emitted = [[piece.text for piece in stream.push(id)] for id in as_bytes("xabcabx")]
    assert emitted == [["x"], [], [], [], ["abc"], [], ["abx"]]


def test_markers_are_printed_on_demand() -> None:
    ids = TOKENIZER.encode(f'<|tool_call>call:f{{a:<|"|>x<|"|>}}<tool_call|>{CLOSE}<turn|>', bos=False)
    assert run(ids).text == ""
    assert run(ids, show_special=True).text == '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|><turn|>'


def test_a_tokenizer_without_channels_has_one_text() -> None:
    content = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    text = json.dumps(content).replace(OPEN, "<unused98>").replace(CLOSE, "<unused99>")
    tokenizer = Tokenizer(TokenizerParts(tokenizers.Tokenizer.from_str(text), {}))
    stream = ReplyParser(tokenizer)
    for id in tokenizer.encode(f"{OPEN}thought\nHm.{CLOSE}", bos=False):
        stream.push(id)
    assert (stream.text, stream.reasoning) == (f"{OPEN}thought\nHm.{CLOSE}", "")
    assert not ends_in_reasoning(tokenizer, tokenizer.encode(f"<|turn>model\n{OPEN}thought\n", bos=True))


def test_every_id_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = TOKENIZER.encode("some text that goes on and on ", bos=False) * 50
    seen: list[int] = []

    def count(id: int) -> bytes:
        seen.append(id)
        return Tokenizer.bytes_of(TOKENIZER, id)

    monkeypatch.setattr(TOKENIZER, "bytes_of", count)
    assert run(ids, stop=["nowhere"]).text.startswith("some text")
    assert seen == ids


@pytest.mark.parametrize("id", [-1, 4096])
def test_ids_outside_the_vocabulary_are_refused(id: int) -> None:
    with pytest.raises(RequestError, match="is not in the vocabulary"):
        ReplyParser(TOKENIZER).push(id)


@pytest.mark.parametrize(
    ("stop", "found"),
    [
        ("END", r"stop is the string 'END', expected a list of strings: write \['END'\]"),
        (["END", "", 5], r"stop\[1\] is '', expected a non-empty string\n +stop\[2\] is 5, expected"),
    ],
)
def test_unusable_stop_strings_are_named(stop: Any, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        ReplyParser(TOKENIZER, stop=stop)


@pytest.mark.parametrize(
    ("prompt", "is_reasoning", "is_start"),
    [
        ("", False, False),
        ("<bos><|turn>user\nHello<turn|>\n<|turn>model\n", False, True),
        ("<bos><|turn>user\nHello<turn|>\n<|turn>model\nI had a ", False, False),
        (f"<|turn>model\n{OPEN}thought\n", True, False),
        (f"<|turn>model\n{OPEN}thought\n{CLOSE}", False, True),
        (f"<|turn>model\n{OPEN}{CLOSE}", False, True),
        (f"<|turn>model\n{OPEN}thought\nHm.{CLOSE}", False, True),
        (f"<|turn>model\n{CLOSE}", False, True),
        (f"<|turn>model\n{OPEN}thought\nHm.<|tool_call>call:f{{}}<tool_call|>", False, False),
        (f"<|turn>model\n{OPEN}thought\nHm.<|tool_response>", False, False),
        ("<|tool_response>response:f{}<tool_response|>", False, True),
        (f"<|tool_response>response:f{{}}<tool_response|>{OPEN}thought\n", True, False),
        (f"<|turn>user\nWhat does {OPEN} mean?<turn|>\n<|turn>model\n", False, True),
    ],
)
def test_where_a_prompt_leaves_the_model(prompt: str, is_reasoning: bool, is_start: bool) -> None:
    ids = TOKENIZER.encode(prompt, bos=False)
    assert ends_in_reasoning(TOKENIZER, ids) is is_reasoning
    assert ends_at_turn_start(TOKENIZER, ids) is is_start
    stream = ReplyParser.after(ids, TOKENIZER)
    for id in TOKENIZER.encode("thought\nYes.", bos=False):
        stream.push(id)
    text = "thought\nYes."
    stream.finish()
    assert stream.reasoning == (text if is_reasoning else "Yes." if is_start else "")
    assert stream.text == ("" if is_reasoning or is_start else text)


@pytest.mark.parametrize(
    ("name", "size", "is_reasoning", "is_start"),
    [
        ("plain", "large", False, True),
        ("plain", "e-series", False, True),
        ("think", "large", False, True),
        ("after_tool_response_think", "large", True, False),
        ("after_tool_response_think", "e-series", True, False),
        ("after_tool_response_nothink", "large", False, True),
    ],
)
def test_where_golden_prompts_leave_the_model(name: str, size: str, is_reasoning: bool, is_start: bool) -> None:
    golden = next(chat for chat in golden_chats() if chat["name"] == name)
    ids = real_template(f"{size}.canonical-2026-07-09").encode(**golden["input"])
    assert ends_in_reasoning(real_tokenizer(), ids) is is_reasoning
    assert ends_at_turn_start(real_tokenizer(), ids) is is_start


def test_the_real_vocabulary_streams_a_thought_and_an_answer() -> None:
    tokenizer = real_tokenizer()
    stream = ReplyParser(tokenizer, stop=["\n\nUser:"])
    for id in tokenizer.encode(f"{OPEN}thought\n我想 🦙‍⬛\n{CLOSE}  Oui, ça va 🌫️!\n\nUser: x", bos=False):
        stream.push(id)
    assert (stream.reasoning, stream.text) == ("我想 🦙‍⬛", "Oui, ça va 🌫️!")
