"""Grammars and masks by themselves: limits, the order of arguments, drafts, triggers, vocabularies without files.

Read `test_constrained.py` for replies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

import gemcutter
from bench import grammar_masks
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.engine.engine import Engine
from gemcutter.engine.grammar_mask import GrammarMask, MarkerIds, Thoughts
from gemcutter.engine.memory import page_counts
from gemcutter.engine.request import Request, SequenceState
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.errors import RequestError
from gemcutter.text.grammar import Constraint, build_grammar
from gemcutter.text.grammar_compiler import CompiledGrammar, GrammarCompiler
from gemcutter.text.reply import ReplyParser
from gemcutter.text.tokenizer import Tokenizer
from gemcutter.text.tokenizer_parts import parts_of

pytest.importorskip("llguidance")
ABC = Constraint("choice", ("abc", "abd", "xyz", "x"))


@pytest.fixture(scope="module")
def model() -> Iterator[gemcutter.Model]:
    with gemcutter.load("demo", kernels="reference", dtype="float32") as loaded:
        yield loaded


def tool(name: str, schema: Any, **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def compiled(model: gemcutter.Model, constraint: Constraint | None, *tools: dict[str, Any], **more: Any) -> CompiledGrammar:
    grammar = build_grammar(constraint, tools, **more)
    assert grammar is not None
    return model.grammars.compile(grammar)


def mask_of(found: CompiledGrammar, **more: Any) -> GrammarMask:
    return GrammarMask(found.matcher, found.first, "test", **more)


def allowed(mask: GrammarMask, reply: Sequence[int], size: int) -> set[int]:
    logits_V = mask([2], reply, torch.zeros(size))
    return set(torch.isfinite(logits_V).nonzero().flatten().tolist())


# ---- grammars ----


def accepts(model: gemcutter.Model, found: CompiledGrammar, text: str) -> bool:
    """Return whether a text, whose markers are special tokens, is one that a grammar accepts."""
    matcher = found.matcher.deep_copy()
    ids = model.tokenizer.encode(text, bos=False)
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())


def test_arguments_come_in_the_order_of_the_declaration(model: gemcutter.Model) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "C": {"const": 1}, "a": {"enum": ["x"]}}, "required": ["C"]}
    found = compiled(model, None, tool("f", schema), choice="required")
    call = "<|tool_call>call:f{{{}}}<tool_call|>"
    good = ['a:<|"|>x<|"|>,b:null,C:1', "b:null,C:1", "C:1", 'a:<|"|>x<|"|>,C:1']
    bad = ["", "b:null", "C:1,b:null", "C:1,C:1", 'a:"x",C:1', "C:1,d:2", "C: 1", ",C:1"]
    assert [text for text in good if not accepts(model, found, call.format(text))] == []
    assert [text for text in bad if accepts(model, found, call.format(text))] == []
    assert accepts(model, found, call.format("C:1") * 2)
    assert not accepts(model, compiled(model, None, tool("f", schema), choice="required", parallel=False), call.format("C:1") * 2)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "array", "items": {"const": 1}, "maxItems": 1}, ["[]", "[1]"], ["[1,1]", "[2]"]),
        ({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}, ["[1,1]"], ["[1]", "[]", "[1,1,1]"]),
        ({"type": "array", "items": {"const": 1}, "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "array", "items": {"const": 1}, "minItems": 1}, ["[1]", "[1,1,1]"], ["[]"]),
        (
            {"type": "string", "minLength": 2, "maxLength": 3},
            ['<|"|>aé<|"|>', '<|"|>a\nb<|"|>'],
            ['<|"|>a<|"|>', '<|"|>abcd<|"|>'],
        ),
        ({"type": "string", "pattern": "b/"}, ['<|"|>ab/c<|"|>'], ['<|"|>b<|"|>']),
        ({"type": "string", "format": "date"}, ['<|"|>2026-02-28<|"|>'], ['<|"|>2026-13-01<|"|>']),
        ({"type": "integer"}, ["0", "-7"], ["07", "1.5", "1" * 25]),
        ({"type": "number"}, ["0.5", "-1e5"], ["1.", "1e999"]),
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["2", "13"]),
        ({"type": ["string", "null"]}, ["null", '<|"|><|"|>'], ["1"]),
        ({"type": "BOOLEAN", "nullable": True}, ["true", "null"], ["1"]),
        ({"anyOf": [{"const": "a"}, {"type": "object"}]}, ['<|"|>a<|"|>', "{}", "{k:1,ä:[{}]}"], ["{:1}", "[]"]),
        ({}, ["1", "[true,{a:null}]", '<|"|>}<|"|>'], ["maybe"]),
    ],
)
def test_values(model: gemcutter.Model, schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    whole = {"type": "object", "properties": {"v": schema}, "required": ["v"]}
    found = compiled(model, None, tool("f", whole, strict=True), choice="required")
    call = "<|tool_call>call:f{{v:{}}}<tool_call|>"
    assert [text for text in good if not accepts(model, found, call.format(text))] == []
    assert [text for text in bad if accepts(model, found, call.format(text))] == []


def test_keys_that_look_like_something_else_are_strings_and_read_back(model: gemcutter.Model) -> None:
    keys = ["a:b", "x y", '"q"', "{", "plain"]
    schema = {"type": "object", "properties": {key: {"const": 1} for key in keys}, "required": keys}
    found = compiled(model, None, tool("f", schema), choice="required")
    matcher, ids = found.matcher.deep_copy(), list[int]()
    while forced := matcher.compute_ff_tokens():
        matcher.consume_tokens(forced)
        ids += forced
    parser = ReplyParser(model.tokenizer, tools=[tool("f", schema)])
    for id in ids:
        parser.push(id)
    parser.finish()
    assert parser.tool_calls[0].parsed == dict.fromkeys(keys, 1)


def test_white_space_is_bounded(model: gemcutter.Model) -> None:
    found = compiled(model, Constraint("json_schema", '{"type":"object","properties":{"a":{"const":1}},"required":["a"]}'))
    assert accepts(model, found, '{"a":1}')
    assert accepts(model, found, '{\n  "a": 1\n}')
    assert not accepts(model, found, "{" + " " * 9 + '"a":1}')


def test_thousands_of_choices(model: gemcutter.Model) -> None:
    found = compiled(model, Constraint("choice", tuple(f"{number:05d}" * 4 for number in range(10000))))
    assert accepts(model, found, "01234" * 4)
    assert not accepts(model, found, "1" + "01234" * 4)
    assert not accepts(model, found, "01234" * 3)


def test_limits() -> None:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        nested = {"type": "array", "items": nested}
    wide = {"type": "object", "properties": {f"p{each}": {} for each in range(4001)}}
    lost = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}
    round_trip = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"$ref": "#/$defs/b"}}}
    unordered = {"type": "object", "properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}}
    for schema, match in (
        ({"properties": {"a": nested}}, "deep"),
        (wide, "4000 properties"),
        (lost, "names nothing"),
        (round_trip, "leads back to itself"),
        (unordered, "minLength 3 is greater than maxLength 2"),
        ({"properties": {"a": {"type": "array", "minItems": "two"}}}, "minItems: expected a count"),
    ):
        with pytest.raises(RequestError, match=f"tools: f: .*{match}"):
            build_grammar(None, [tool("f", schema)], "required")
    with pytest.raises(RequestError, match="characters of grammar"):
        build_grammar(Constraint("choice", ("a" * (1 << 20),)), [])


# ---- masks ----


def test_a_mask_follows_any_reply(model: gemcutter.Model) -> None:
    found, size = compiled(model, ABC), model.plan.vocab
    a, b, c, x = (model.tokenizer.encode(letter, bos=False)[0] for letter in "abcx")
    mask = mask_of(found, gives_way=True)
    for reply in ([], [a], [a, b], [a, b, c], [a], [x], [], [a, b], [a, b, c], [a, b, c], [x], [x, a], [x], [a, x, b], [a, b]):
        assert allowed(mask, reply, size) == allowed(mask_of(found, gives_way=True), reply, size)
    assert allowed(mask, [a, b, c], size) == set(model.defaults.stop_ids)
    assert len(allowed(mask, [a, x], size)) == size  # after a draft that is forbidden nothing is ever taken


def test_a_mask_follows_a_reply_that_grows_among_drafts(model: gemcutter.Model) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 9}},
    }
    found, size, chooser = compiled(model, Constraint("json_schema", json.dumps(schema))), model.plan.vocab, random.Random(5)
    for _ in range(6):
        prototype = mask_of(found)
        mask, reply = prototype.for_sequence(), list[int]()
        for _ in range(25):
            drafts = list[int]()
            for _ in range(3):
                fits = sorted(allowed(mask, [*reply, *drafts], size))
                drafts.append(chooser.choice(fits if chooser.random() < 0.7 else range(size)))
            expected = allowed(prototype.for_sequence(), reply, size)
            assert allowed(mask, reply, size) == expected
            following = chooser.choice(sorted(expected))
            if following in model.defaults.stop_ids:
                break
            # Several tokens at once, where drafts were right.
            reply.append(following)
            mask.observe(reply)


def test_a_reply_that_left_the_grammar_is_an_error_or_let_go(model: gemcutter.Model) -> None:
    found, size = compiled(model, ABC), model.plan.vocab
    strict, gentle = mask_of(found), mask_of(found, gives_way=True)
    for mask in (strict, gentle):
        mask.observe([500, 501])
    with pytest.raises(RequestError, match="test: another logits processor"):
        allowed(strict, [500, 501], size)
    assert len(allowed(gentle, [500, 501], size)) == size


def test_a_mask_waits_for_its_trigger(model: gemcutter.Model) -> None:
    opening, size = model.tokenizer.id_of("<|tool_call>"), model.plan.vocab
    assert opening is not None
    mask = mask_of(compiled(model, None, tool("f", {}), parallel=False), trigger=opening)
    assert len(allowed(mask, [40, 41], size)) == size
    texts = {model.tokenizer.piece(id) for id in allowed(mask, [40, 41, opening], size)}
    assert texts
    assert all("call:f".startswith(text) or text == "<0x63>" for text in texts)


def test_thoughts_stand_between_calls(model: gemcutter.Model) -> None:
    def id_of(piece: str) -> int:
        found = model.tokenizer.id_of(piece)
        assert found is not None
        return found

    opening, closing, size = id_of("<|channel>"), id_of("<channel|>"), model.plan.vocab
    markers = MarkerIds(opening, closing, (), id_of("<tool_call|>"), model.tokenizer.special_ids)
    found = compiled(model, None, tool("f", {}), choice="required")
    mask = mask_of(found, markers=markers, thoughts=Thoughts.FREE)
    call = model.tokenizer.encode("<|tool_call>call:f{}<tool_call|>", bos=False)
    assert opening in allowed(mask, [], size)
    thought = allowed(mask, [opening, 300], size)
    assert thought == set(range(size)) - model.tokenizer.special_ids | {closing}
    assert allowed(mask, [opening, 300, closing], size) == {call[0]}
    after = allowed(mask, [opening, 300, closing, *call], size)
    assert after == {call[0], opening, *model.defaults.stop_ids}
    assert allowed(mask, [*call, opening, 300, closing], size) == {call[0], *model.defaults.stop_ids}
    assert opening not in allowed(mask, call[:2], size)


def test_drafts_change_nothing_but_the_number_of_steps(model: gemcutter.Model) -> None:
    class Oracle:
        def propose(self, sequence: SequenceState, limit: int) -> tuple[int, ...]:
            known = answer[len(sequence.reply) :][:3]
            return tuple(id if index < 2 else id ^ 1 for index, id in enumerate(known))[:limit]

    request = model.prepare("Say:", constraint=Constraint("regex", "([a-z]{1,6} ){5,9}"), max_tokens=40).request
    answer = list[int]()
    plain, plain_steps = run(Engine(model.decoder, 128), request)
    answer = plain
    drafted, steps = run(Engine(model.decoder, 128, speculator=Speculator(Oracle(), draft_tokens=3)), request)
    assert drafted == plain
    assert len(plain) > 10
    assert steps < plain_steps


def run(engine: Engine, request: Request) -> tuple[list[int], int]:
    """Return the tokens of a request, and the number of steps that they took."""
    engine.submit(request)
    tokens, steps = list[int](), 0
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens += [] if event.token is None else [event.token]
        steps += 1
    return tokens, steps


def test_a_preempted_reply_goes_on_where_it_was(model: gemcutter.Model) -> None:
    request = model.prepare("Say:", constraint=Constraint("regex", "[a-z ]{60,90}"), max_tokens=40).request
    alone, _ = run(Engine(model.decoder, 128), request)
    engine = Engine(model.decoder, 40, max_batched_tokens=16, max_num_seqs=2)
    counts = page_counts(model.plan, 40, 16, page_tokens=4)  # enough for one of them
    engine.pool = engine.scheduler.pool = engine.runner.pool = PagedKVCache(model.plan, counts, model.decoder.dtype)
    first, second = engine.submit(request), engine.submit(replace(request, priority=1))
    tokens: dict[int, list[int]] = {first: [], second: []}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens[event.request] += [] if event.token is None else [event.token]
    assert engine.stats().preemptions
    assert tokens == {first: alone, second: alone}


# ---- vocabularies ----


def test_a_vocabulary_without_files_gives_the_same_masks(model: gemcutter.Model) -> None:
    files = model.tokenizer
    raw = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    pieces = [files.piece(id) for id in range(files.vocab_size)]
    made = Tokenizer(parts_of(pieces, merges, markers=sorted(files.special_ids)), files.num_ids + 64)
    grammar = build_grammar(ABC, [])
    assert grammar is not None
    here, there = (GrammarCompiler(each, model.defaults.stop_ids).compile(grammar).first for each in (files, made))
    assert there[: len(here)] == here
    assert not any(there[len(here) :])


def test_threads_share_one_vocabulary_and_one_grammar(model: gemcutter.Model) -> None:
    compiler, grammar = GrammarCompiler(model.tokenizer, model.defaults.stop_ids), build_grammar(ABC, [])
    assert grammar is not None
    with ThreadPoolExecutor(8) as pool:
        vocabularies = [each.result() for each in [pool.submit(compiler.vocabulary) for _ in range(8)]]
        firsts = [each.result().first for each in [pool.submit(compiler.compile, grammar) for _ in range(8)]]
    assert len({id(each) for each in vocabularies}) == 1
    assert len(set(firsts)) == 1
    assert compiler.compile(grammar) is compiler.compile(grammar)


def test_the_benchmark_times_every_scene(capsys: pytest.CaptureFixture[str]) -> None:
    assert grammar_masks.main([str(DEMO_FOLDER), "--steps", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["scenes"]) == set(grammar_masks.scenes())
    assert all(scene["masks"]["mask"]["median_us"] > 0 for scene in found["scenes"].values())
    grammar_masks.show(found)
    assert "120 tools" in capsys.readouterr().out
    assert grammar_masks.main(["no-such-folder"]) == 1
