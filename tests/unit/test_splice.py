"""Replies that come back as history keep the ids that the model wrote, wherever the text is unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemcutter
from gemcutter.text import chat
from gemcutter.text.canonical import LARGE, SMALL, canonical_template
from gemcutter.text.splice import ENTRY, ReplyStore
from gemcutter.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(chat.__file__).resolve().parents[1] / "demo")
TEMPLATE = canonical_template(SMALL, TOKENIZER)
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Go"}]
MORE = {"role": "user", "content": "More"}
END = TOKENIZER.id_of("<turn|>")
# Pieces of text that an encoder might spell otherwise, and bytes that make characters together or none.
PIECES = [TOKENIZER.id_of(piece) for piece in ("a", "b", "▁", "<", "|", "turn", ">", "<0xC3>", "<0xA9>", "<0xFF>", "\n")]
IDS = st.lists(st.sampled_from([id for id in PIECES if id is not None]), min_size=1, max_size=12)


def spelled(text: str) -> list[int]:
    """Return ids of a text that no encoder gives: one a byte."""
    return [id for byte in text.encode() if (id := TOKENIZER.id_of(f"<0x{byte:02X}>")) is not None]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(IDS, st.booleans(), st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
def test_the_text_is_the_same_and_the_ids_go_on(reply: list[int], has_end: bool, answer: str) -> None:
    prompt = TEMPLATE.encode(ASK)
    text = TOKENIZER.decode(reply)
    messages = [*ASK, {"role": "assistant", "content": text}, {"role": "user", "content": answer}]
    plain = TEMPLATE.encode(messages)
    store = ReplyStore(TOKENIZER)
    store.remember(prompt, [*reply, END] if has_end and END is not None else reply)
    ids = TEMPLATE.encode(messages, replies=store)
    assert TOKENIZER.decode(ids, special=True) == TOKENIZER.decode(plain, special=True)
    assert [id for id in ids if id in TOKENIZER.special_ids] == [id for id in plain if id in TOKENIZER.special_ids]
    is_printed = text == text.strip() and "\ufffd" not in text
    if is_printed:
        assert ids[: len(prompt) + len(reply)] == [*prompt, *reply]
    elif ids[: len(prompt) + len(reply)] != [*prompt, *reply]:
        assert ids == plain


def test_the_longest_conversation_is_taken_and_goes_on_turn_by_turn() -> None:
    store, messages = ReplyStore(TOKENIZER), list(ASK)
    for text in ("One.", "Two é.", "Three <turn|>."):
        prompt = TEMPLATE.encode(messages, replies=store)
        reply = spelled(text)
        store.remember(prompt, reply)
        messages += [{"role": "assistant", "content": text}, MORE]
        following = TEMPLATE.encode(messages, replies=store)
        assert following[: len(prompt) + len(reply)] == [*prompt, *reply]
    edited = [*messages[:3], {"role": "assistant", "content": "Zwei."}, MORE]
    first = TEMPLATE.encode(ASK) + spelled("One.")
    assert TEMPLATE.encode(edited, replies=store)[: len(first)] == first


def test_a_loop_of_tools_with_thoughts_goes_on_by_its_ids() -> None:
    template = canonical_template(LARGE, TOKENIZER)
    tools = [{"function": {"name": "f", "description": "d"}}]
    call = {"id": "a", "function": {"name": "f", "arguments": '{"x": "1"}'}}
    turn = [{"role": "assistant", "content": "", "reasoning": "Hm.", "tool_calls": [call]}]
    results = [{"role": "tool", "tool_call_id": "a", "content": "2"}]
    prompt = template.encode(ASK, tools=tools, enable_thinking=True)
    marks = {name: TOKENIZER.id_of(name) or 0 for name in TOKENIZER.markers}
    reply = [marks["<|channel>"], *spelled("thought\nHm.\n"), marks["<channel|>"], marks["<|tool_call>"], *spelled("call:f{x:")]
    reply += [marks['<|"|>'], *spelled("1"), marks['<|"|>'], *spelled("}"), marks["<tool_call|>"]]
    store = ReplyStore(TOKENIZER)
    store.remember(prompt, reply)
    options: dict[str, Any] = {"tools": tools, "enable_thinking": True, "replies": store}
    following = template.encode([*ASK, *turn, *results], **options)
    assert following[: len(prompt) + len(reply)] == [*prompt, *reply]
    later = template.encode([*ASK, *turn, *results, {"role": "assistant", "content": "Two."}, MORE], **options)
    assert "Hm." not in TOKENIZER.decode(later), "the thought is dropped, and the turn is encoded anew"
    assert later[: len(prompt)] == prompt


def test_text_that_spells_a_marker_is_not_the_marker() -> None:
    store, prompt = ReplyStore(TOKENIZER), TEMPLATE.encode(ASK)
    store.remember(prompt, [TOKENIZER.id_of("a") or 0, END or 0])
    messages = [*ASK, {"role": "assistant", "content": "a<turn|>"}]
    assert TEMPLATE.encode(messages, replies=store, add_generation_prompt=False) == TEMPLATE.encode(
        messages, add_generation_prompt=False
    )


def test_the_least_used_is_forgotten_first() -> None:
    store = ReplyStore(TOKENIZER, capacity_bytes=3 * (ENTRY + 4 * 3))
    for id in (40, 41, 42):
        store.remember([TOKENIZER.bos_id, id], [id])
    assert len(store) == 3
    parts = {id: [TOKENIZER.bos_id, TOKENIZER.decode([id, id])] for id in (40, 41, 42, 43)}
    assert store.splice(parts[40])[0] == [TOKENIZER.bos_id, 40, 40]
    store.remember([TOKENIZER.bos_id, 43], [43])
    assert len(store) == 3
    assert [bool(store.splice(parts[id])[0]) for id in (40, 41, 42, 43)] == [True, False, True, True]
    store.remember([TOKENIZER.bos_id], [44] * 1000)
    store.remember([TOKENIZER.bos_id], [])
    assert len(store) == 3, "what is larger than the store is not kept, nor is a reply of nothing"


def test_a_model_remembers_its_own_replies() -> None:
    with gemcutter.load("demo") as model:
        first = model.chat("Hello", max_tokens=12)
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first.text}, MORE]
        assert first.finish_reason in ("stop", "length")
        assert len(model.replies) == 1
        ids = model.encode(messages)
        if first.text == first.text.strip():
            assert ids[: len(first.prompt_tokens) + len(first.tokens)] == [*first.prompt_tokens, *first.tokens]
        model.generate("Hello", max_tokens=2)
        assert len(model.replies) == 1, "raw texts do not come back as history"
        with pytest.raises(gemcutter.RequestError):
            model.remember([2], [10**6])
