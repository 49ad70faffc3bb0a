"""Calls in replies: samples of real output, the repairs, and random streams, of which nothing is lost.

The samples of `goldens/tool_calls.json` were collected from public reports; their results are written by hand. Every reply is
read several times, cut into other tokens. GEMCUTTER_STREAMS=100000 reads more random streams than the 2,000 of a usual run.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import gemcutter
from gemcutter.text.reply import MOST_CALLS, ReplyParser, ReplyPiece
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tool_calls import ToolCall
from tests.real_tokenizer import real_tokenizer

TOKENIZER = Tokenizer.load(Path(gemcutter.__file__).parent / "demo")
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "tool_calls.json").read_text(encoding="utf-8"))["cases"]
NUM_STREAMS = int(os.environ.get("GEMCUTTER_STREAMS", "2000"))
Q, CALL, END, OPEN, CLOSE = '<|"|>', "<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>"
SEARCH = {
    "type": "object",
    "properties": {
        "q": {"type": "string"},
        "n": {"$ref": "#/$defs/Count"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "ok": {"type": "BOOLEAN"},
        "rate": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "level": {"enum": [1, 2, 3]},
        "where": {"allOf": [{"type": "object", "properties": {"zip": {"type": "string"}}}, {"required": ["zip"]}]},
    },
    "$defs": {"Count": {"type": "integer"}},
}
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": SEARCH}}]


def declared(schemas: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [{"function": {"name": name, "parameters": schema}} for name, schema in (schemas or {}).items()]


def pieces_of(output: str | list[Any]) -> list[tuple[str, bool]]:
    """Return the stretches of an output and whether markers in them are read."""
    parts = [output] if isinstance(output, str) else output
    return [(part, True) if isinstance(part, str) else (part["literal"], False) for part in parts]


def encode(output: str | list[Any], tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    stretches = pieces_of(output)
    return [
        id for text, marked in stretches for id in (tokenizer.encode(text, bos=False) if marked else tokenizer.encode_plain(text))
    ]


def as_bytes(ids: list[int], tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    """Return ids for the same reply with every text cut into single bytes."""
    found = list[int]()
    for id in ids:
        is_marker = id in tokenizer.special_ids
        spelled = [id] if is_marker else [tokenizer.id_of(f"<0x{byte:02X}>") for byte in tokenizer.bytes_of(id)]
        found += [one for one in spelled if one is not None]
    return found


def cuts(output: str | list[Any]) -> Iterator[list[int]]:
    """Yield the ids of an output, as bytes, and cut in two at every character, so that its tokens end there."""
    ids = encode(output)
    yield ids
    yield as_bytes(ids)
    for place, (text, marked) in enumerate(pieces_of(output)):
        before, after = pieces_of(output)[:place], pieces_of(output)[place + 1 :]
        for cut in range(1, len(text)):
            if any(found.start() < cut < found.end() for found in re.finditer(r'<\|?[a-z_"|]+\|?>', text)) and marked:
                continue
            stretches = [*before, (text[:cut], marked), (text[cut:], marked), *after]
            yield encode([part if is_marked else {"literal": part} for part, is_marked in stretches])


def read(ids: list[int], *, is_natural: bool = True, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> ReplyParser:
    """Push ids, and check that the pieces add up to what the parser says."""
    parser = ReplyParser(tokenizer, **options)
    pieces = [piece for id in ids for piece in parser.push(id)] + parser.finish(is_natural)
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == parser.text
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == parser.reasoning
    calls = list[list[ReplyPiece]]()
    for piece in pieces:
        if piece.kind == "tool_call":
            calls += [[]] if piece.name is not None else []
            assert piece.index == len(calls) - 1
            calls[-1].append(piece)
    streamed = [ToolCall(call[0].name or "", "".join(piece.text for piece in call)) for call in calls]
    assert streamed[: len(parser.tool_calls)] == list(parser.tool_calls)
    assert len(streamed) <= len(parser.tool_calls) + (parser.cut_call is not None)
    return parser


def result(parser: ReplyParser) -> tuple[Any, ...]:
    return parser.reasoning, parser.text, parser.tool_calls


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case["id"])
def test_samples_at_every_cut(case: dict[str, Any]) -> None:
    expected = case["expect"]
    in_reasoning = case.get("start") == "reasoning"
    options = {
        "tools": declared(case.get("tools")),
        "in_reasoning": in_reasoning,
        "at_turn_start": not in_reasoning,
        "parallel": case.get("parallel_tool_calls", True),
        "is_natural": case.get("finish", "stop") == "stop",
    }
    for ids in cuts(case["output"]):
        parser = read(ids, **options)
        assert parser.reasoning == (expected["reasoning"] or "")
        assert parser.text == (expected["content"] or "")
        found = [{"name": call.name, "arguments": call.parsed} for call in parser.tool_calls]
        assert json.dumps(found) == json.dumps(expected["tool_calls"])  # in which 1 and 1.0 differ
        assert ("tool_calls" if found and options["is_natural"] else case.get("finish", "stop")) == expected["finish_reason"]


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case["id"])
def test_samples_in_the_real_vocabulary(case: dict[str, Any]) -> None:
    tokenizer = real_tokenizer()
    options = {"tools": declared(case.get("tools")), "in_reasoning": case.get("start") == "reasoning"}
    ids = encode(case["output"], tokenizer)
    for each in (ids, as_bytes(ids, tokenizer)):
        parser = read(each, tokenizer=tokenizer, is_natural=case.get("finish", "stop") == "stop", **options)
        assert (parser.reasoning or None, parser.text or None) == (case["expect"]["reasoning"], case["expect"]["content"])
        assert [call.name for call in parser.tool_calls][:1] == [call["name"] for call in case["expect"]["tool_calls"]][:1]


REPAIRS = [
    # the opening delimiter is missing
    (f"{CALL}call:f{{q:red, blue boots{Q},n:5}}{END}", {"q": "red, blue boots", "n": 5}),
    (f"{CALL}call:f{{q:5{Q},n:5}}{END}", {"q": "5", "n": 5}),
    (f"{CALL}call:f{{q:[red{Q},blue{Q}]}}{END}", {"q": ["red", "blue"]}),
    # words without delimiters
    (f"{CALL}call:f{{q:red, n:5}}{END}", {"q": "red", "n": 5}),
    (f"{CALL}call:f{{q:Paris, unit:{Q}celsius{Q}}}{END}", {"q": "Paris", "unit": "celsius"}),
    (f"{CALL}call:f{{q:sin(x, 2), n:1}}{END}", {"q": "sin(x, 2)", "n": 1}),
    (f"{CALL}call:f{{q:007,r:1_000}}{END}", {"q": "007", "r": "1_000"}),
    # the closing delimiter, brackets or the end are missing
    (f"{CALL}call:f{{q:{Q}it is}}{END}<|tool_response>", {"q": "it is"}),
    (f"{CALL}call:f{{q:{Q}it is{END}<|tool_response>", {"q": "it is"}),
    (f"{CALL}call:f{{q:{Q}it is", {"q": "it is"}),
    (f"{CALL}call:f{{q:{{r:[1,{{s:{Q}x}} ] }}}}{END}", {"q": {"r": [1, {"s": "x"}]}}),
    (f"{CALL}call:f{{q:[1,2{END}", {"q": [1, 2]}),
    (f"{CALL}call:f{{q:[1,{{a:2]}}{END}", {"q": [1, {"a": 2}]}),
    (f"{CALL}call:f{{q:", {"q": None}),
    (f"{CALL}call:f{{q:1<eos>", {"q": 1}),
    (f"{CALL}call:f{{q:1{OPEN}thought\n{CLOSE}", {"q": 1}),
    # literals
    (f"{CALL}call:f{{a:True,b:None,c:false}}{END}", {"a": True, "b": None, "c": False}),
    (f"{CALL}call:f{{a:1e3,b:9007199254740993,c:-0.5}}{END}", {"a": 1000.0, "b": 9007199254740993, "c": -0.5}),
    # plain quotes
    (f'{CALL}call:f{{"a": "say \\"hi\\" \\u00e9\\ud83d\\ude00", \'b\': \'it\\\'s\'}}{END}', {"a": 'say "hi" é😀', "b": "it's"}),
    (f'{CALL}call:f{{"a":"x"{Q},b:[{{\'c\':"y"{Q}}}]}}{END}', {"a": "x", "b": [{"c": "y"}]}),
    (f'{CALL}call:f{{a:"he "said" so",b:1}}{END}', {"a": 'he "said" so', "b": 1}),
    (f'{CALL}call:f{{a:"never closed}}{END}', {"a": "never closed"}),
    (f'{CALL}call:f{{a:"\\ud800\\d\\n"}}{END}', {"a": "\ufffd\\d\n"}),
    # keys
    (f'{CALL}call:f{{my key:1,{Q}é.b{Q}:2,"c\\"d":3}}{END}', {"my key": 1, "é.b": 2, 'c"d': 3}),
    (f"{CALL}call:f{{a:1,a:2,b:3}}{END}", {"a": 1, "b": 3}),
    # brackets and signs of other languages
    (f"{CALL}call:f(q={Q}x{Q}, n=5){END}", {"q": "x", "n": 5}),
    (f'{CALL}call:f({{"q": "x"}}){END}', {"q": "x"}),
    (f'{CALL}call:f{{{{"q": "x"}}}}{END}', {"q": "x"}),
    # the name
    (f"{CALL}:f{{q:1}}{END}", {"q": 1}),
    (f"{CALL}call:f{END}", {}),
    (f"{CALL} call : f {{\n q : 1 ,\n n : {Q}x{Q} ,\n}}\n{END}{END}\n", {"q": 1, "n": "x"}),
    # markers in strings are text
    (f"{CALL}call:f{{q:{Q}a {CALL}call:g{{}}b{END} {OPEN} c{Q}}}{END}", {"q": f"a {CALL}call:g{{}}b{END} {OPEN} c"}),
]


@pytest.mark.parametrize(("output", "arguments"), REPAIRS)
def test_repairs_at_every_cut(output: str, arguments: dict[str, Any]) -> None:
    for ids in cuts(output):
        parser = read(ids)
        assert [(call.name, call.parsed) for call in parser.tool_calls] == [("f", arguments)]
        assert (parser.text, parser.reasoning) == ("", "")


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        (f"q:12345,n:{Q}7{Q},ok:{Q}true{Q}", {"q": "12345", "n": 7, "ok": True}),
        ("q:true,n:+07,ok:TRUE", {"q": "true", "n": 7, "ok": True}),
        (f"q:{Q}7{Q},tags:[1,null,{Q}a{Q}]", {"q": "7", "tags": ["1", "null", "a"]}),
        (f'tags:{Q}["a", "b"]{Q},rate:.5,level:{Q}2{Q}', {"tags": ["a", "b"], "rate": 0.5, "level": 2}),
        (f"rate:{Q}None{Q},n:seven", {"rate": None, "n": "seven"}),
        (f"where:{{zip:0150,zap:0150}},tags:{Q}[1{Q}", {"where": {"zip": "0150", "zap": "0150"}, "tags": "[1"}),
        ("where:{zip:150},other:150", {"where": {"zip": "150"}, "other": 150}),
    ],
)
def test_schemas_decide_what_scalars_are(written: str, arguments: dict[str, Any]) -> None:
    for ids in cuts(f"{CALL}call:search{{{written}}}{END}"):
        (call,) = read(ids, tools=TOOLS).tool_calls
        assert json.dumps(call.parsed) == json.dumps(arguments)


@pytest.mark.parametrize(
    ("output", "name", "content"),
    [
        (f"{CALL}search{{q:1}}{END}", "search", ""),
        (f"{CALL}call:default_api:search{{q:1}}{END}", "search", ""),
        (f"{CALL}call:a:other{{q:1}}{END}", "a:other", ""),
        ("call:search{q:1}<turn|>", "search", ""),
        (" \ncall:search{q:1}", "search", ""),
        ("call:search{q:1}\n\nDone.", "search", "Done."),
        (f"{OPEN}thought\n{CLOSE}call:search(q=1)", "search", ""),
        ("Write call:search{q:1}", None, "Write call:search{q:1}"),
        ("call:find{q:1}", None, "call:find{q:1}"),
        ("call: me", None, "call: me"),
        (f"Hi {CALL}call:search{{q:1}}{END} there", "search", "Hithere"),
        (f"{CALL}call:search{{q:1}} and more{END} after", "search", "and more after"),
        (f"{CALL}call:search{{q:1, what else}}{END}", "search", "what else"),
        (f"{CALL}find{{q:1}}{END} after", None, f"{CALL}find{{q:1}}{END} after"),
        (f"Hi {CALL}call:search{{q red}}{END}", None, f"Hi {CALL}call:search{{q red}}{END}"),
        (f"{CALL}call:f{{BEGIN_ARG q:{Q}x{Q} END_ARG}}{END}", None, f"{CALL}call:f{{BEGIN_ARG q:{Q}x{Q} END_ARG}}{END}"),
        (f"{CALL}I would call {Q}it{Q}.<turn|>", None, f"{CALL}I would call {Q}it{Q}."),
        (f"{CALL}{END}", None, f"{CALL}{END}"),
        (f"{CALL}" + "x" * 1000, None, f"{CALL}" + "x" * 1000),
    ],
)
def test_what_is_a_call_and_what_is_content(output: str, name: str | None, content: str) -> None:
    for ids in [encode(output), as_bytes(encode(output))]:
        parser = read(ids, tools=TOOLS, at_turn_start=True)
        assert [call.name for call in parser.tool_calls] == ([] if name is None else [name])
        assert parser.text == content
        assert parser.num_unreadable == (1 if CALL in content else 0)


def test_names_and_strings_stream_at_once() -> None:
    parser = ReplyParser(TOKENIZER)
    ids = encode(f"{CALL}call:log{{msg:{Q}one two}}three{Q},n:12}}{END}")
    seen = [
        (TOKENIZER.decode([id], special=True), [(piece.name, piece.text) for piece in parser.push(id)]) for id in as_bytes(ids)
    ]
    fragments = "".join(text for _, pieces in seen for _, text in pieces)
    assert fragments == '{"msg":"one two}three","n":12}'
    steps = [(spelled, pieces) for spelled, pieces in seen if pieces]
    assert steps[0] == (":", [("log", '{"msg":')])
    assert [spelled for spelled, _ in steps[1:9]] == ['<|"|>', "o", "n", "e", " ", "t", "w", "o"]
    assert ("t", [(None, "}t")]) in steps  # a bracket may be the call's
    assert ("1", []) in seen  # a number may go on
    assert ("2", []) in seen


def test_a_cut_call_is_reported_only_if_it_is_balanced() -> None:
    for output, is_complete in ((f"{CALL}call:f{{a:1}}", True), (f"{CALL}call:f{{a:b}}", True), (f"{CALL}call:f{{a:1", False)):
        parser = read(encode(output), is_natural=False)
        assert [call.arguments for call in parser.tool_calls] == (
            [f'{{"a":{"1" if "1" in output else chr(34) + "b" + chr(34)}}}'] if is_complete else []
        )
        assert parser.cut_call == (None if is_complete else output)
    assert read(encode(f"{CALL}call:f"), is_natural=False).cut_call == f"{CALL}call:f"


def test_a_single_call_and_the_most_calls_end_the_reply() -> None:
    calls = f"{CALL}call:f{{}}{END}" * (MOST_CALLS + 2)
    parser = ReplyParser(TOKENIZER, parallel=False)
    for id in encode(calls):
        parser.push(id)
    assert (len(parser.tool_calls), parser.is_finished, parser.stopped) == (1, True, None)
    assert len(read(encode(calls)).tool_calls) == MOST_CALLS


def test_stop_strings_are_sought_in_content_only() -> None:
    parser = read(encode(f"{OPEN}thought\nSTOP{CLOSE}a{CALL}call:f{{q:{Q}STOP{Q}}}{END}b STOP c"), stop=["STOP"])
    assert (parser.text, parser.reasoning, parser.stopped) == ("ab ", "STOP", "STOP")
    assert parser.tool_calls == (ToolCall("f", '{"q":"STOP"}'),)
    held = ReplyParser(TOKENIZER, stop=["STOP"])
    pieces = [piece for id in encode(f"ST{CALL}call:f{{}}{END}") for piece in held.push(id)]
    assert [(piece.kind, piece.text) for piece in pieces] == [("content", "ST"), ("tool_call", "{}")]


def test_tokens_of_reasoning_are_counted() -> None:
    thought = encode("thought\nI think so.")
    parser = read([*encode(OPEN), *thought, *encode(f"{CLOSE}Yes."), *encode(OPEN), *thought])
    assert parser.num_reasoning_tokens == 2 * len(thought)


FRAGMENTS = [Q, Q, Q, CALL, CALL, END, OPEN, CLOSE, "<turn|>", "<|tool_response>", *"{{}}[]()::,,=\"'\\ \n"]
FRAGMENTS += [
    "call:",
    "thought\n",
    "thought",
    "true",
    "null",
    "1.5",
    "7",
    "é",
    "call:search{",
    f"{CALL}call:search{{",
    f"{CALL}call:f{{",
]


def draw_stream(rng: random.Random) -> tuple[list[str], list[str]]:
    """Return the fragments of a random reply, and the words in it, each of which is there once."""
    words = [f"w{number}w" for number in range(rng.randrange(1, 25))]
    fragments = [rng.choice(FRAGMENTS) if rng.random() < 0.7 else "" for _ in range(3 * len(words))]
    for place, word in zip(sorted(rng.sample(range(len(fragments)), len(words))), words, strict=True):
        fragments[place] += word
    return fragments, words


def test_nothing_of_a_random_stream_is_lost() -> None:
    for seed in range(NUM_STREAMS):
        rng = random.Random(seed)
        fragments, words = draw_stream(rng)
        ids = [id for fragment in fragments for id in TOKENIZER.encode(fragment, bos=False)]
        options = {
            "tools": TOOLS if rng.random() < 0.7 else None,
            "in_reasoning": rng.random() < 0.1,
            "at_turn_start": rng.random() < 0.7,
            "is_natural": rng.random() < 0.7,
        }
        parser = read(ids, **options)
        calls = [text for call in parser.tool_calls for text in (call.name, json.dumps(call.parsed))]
        shown = " ".join([parser.text, parser.reasoning, *calls, parser.cut_call or "", *parser.dropped])
        assert [word for word in words if word not in shown] == [], (seed, fragments)
        assert result(read(as_bytes(ids), **options)) == result(parser), (seed, fragments)


def test_random_ids_raise_nothing() -> None:
    markers = [TOKENIZER.id_of(piece) for piece in (Q, CALL, END, OPEN, CLOSE, "{", "}", ":", ",")]
    for seed in range(NUM_STREAMS // 4):
        rng = random.Random(seed)
        ids = [rng.choice(markers) if rng.random() < 0.4 else rng.randrange(TOKENIZER.vocab_size) for _ in range(60)]
        for call in read(ids, tools=TOOLS, stop=["e"] if rng.random() < 0.2 else ()).tool_calls:
            assert isinstance(call.parsed, dict)


LONG = {
    "string": (f"{CALL}call:f{{a:{Q}", "some text, ", f"{Q}}}{END}"),
    "brackets in a string": (f"{CALL}call:f{{a:{Q}", "}] ", f"{Q}}}{END}"),
    "plain string": (f'{CALL}call:f{{a:"', 'a\\n}" ', f'"}}{END}'),
    "words": (f"{CALL}call:f{{a:b", ", c:d", f"}}{END}"),
    "stray delimiters": (f"{CALL}call:f{{a:b", f", (c:{Q}d", f"}}{END}"),
    "missing openers": (f"{CALL}call:f{{a:[b", f"{Q}, c", f"}}{END}"),
    "nesting": (f"{CALL}call:f{{a:", "[", f"{END}"),
    "closers": (f"{CALL}call:f{{a:1", "}", f"{END}"),
    "space": ("", " \n", "x"),
    "channels": ("", f"{OPEN}a{CLOSE} ", "x"),
    "header": (f"{CALL}", "call ", f"{END}"),
    "garbage": (f"{CALL}call:f{{a:1", f", x{Q}", f"}}{END}"),
}


@pytest.mark.parametrize("kind", LONG)
def test_work_is_linear(kind: str) -> None:
    """Count the calls of functions, and the characters that `_read` is given: both grow no faster than the reply."""
    assert count_work(kind, 4000) <= 2.3 * count_work(kind, 2000)


def count_work(kind: str, repeats: int) -> int:
    start, middle, end = LONG[kind]
    ids = [*encode(start), *encode(middle) * repeats, *encode(end)]
    work = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal work
        if event == "call":
            text = frame.f_locals.get("text") if frame.f_code.co_name in ("_read", "feed", "say", "_say", "decode") else None
            work += 1 + (len(text) if isinstance(text, str) else 0)

    parser = ReplyParser(TOKENIZER, tools=TOOLS)
    sys.setprofile(count)
    try:
        for id in ids:
            parser.push(id)
        parser.finish()
    finally:
        sys.setprofile(None)
    return work
