"""Conversations that grow: agents' loops of tool calls and long chats; how many tokens are computed again, counted.

The model of the loops is the demo, with a logits processor that makes it write what a script says. Read `test_prefix.py` for the
tree, `test_splice.py` for how a reply's own ids come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import gemcutter
from gemcutter import Model
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.engine.scheduler import ScheduledChunk, Scheduler
from gemcutter.tools import declarations, run_call, run_tools, turn_of
from tests.topologies import build_decoder, build_oracle, plan_of, prompt
from tests.unit.test_run_tools import CALL, END, Q, Script
from tests.unit.test_scheduler import TINY

TURNS = 20
OPENING = "<|channel>thought\n"  # which the prompt ends with after a tool's result
THOUGHT = "I should look that up, step by step, and then say what I found.\n<channel|>"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with gemcutter.load("demo", chat_template="canonical", max_num_seqs=2, max_batched_tokens=64) as loaded:
        yield loaded


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the rows of every step."""
    found, real = list[int](), Scheduler.schedule

    def schedule(self: Scheduler) -> list[ScheduledChunk]:
        chunks = real(self)
        found.append(sum(chunk.rows for chunk in chunks))
        return chunks

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    return found


def look_up(word: str, page: int) -> str:
    """Look a word up.

    Args:
        word: What to look for.
        page: Where.
    """
    return f"On page {page} the book says of the {word} that it is old, and that few have seen it. " * 2


def call(turn: int) -> str:
    return f"{CALL}call:look_up{{page:{turn},word:{Q}lantern{Q}}}{END}"


def test_an_agent_computes_nearly_nothing_twice(model: Model, rows: list[int]) -> None:
    """20 rounds of calls after one message: the thoughts of a running loop stay in the prompt."""
    script = Script(
        model, *[(THOUGHT if turn else OPENING + THOUGHT) + call(turn) for turn in range(TURNS)], f"{THOUGHT}It is old."
    )
    question = "What do you know of the lantern? " + "Here is what I have read myself. " * 4
    options: dict[str, Any] = {"enable_thinking": True, "logits_processors": [script], "max_tokens": 200}
    found = run_tools(model, question, [look_up], max_rounds=TURNS, **options)
    assert (found.text, found.tool_calls) == ("It is old.", ())
    assert len(script.prompts) == TURNS + 1
    computed, tokens = sum(rows), len(found.prompt_tokens) + len(found.tokens)
    assert tokens > 1500, "the test needs a conversation longer than windows"
    assert computed - tokens < 0.05 * tokens


def test_a_client_that_runs_the_tools_itself_computes_as_little(model: Model, rows: list[int]) -> None:
    """It sends the whole conversation again after each call."""
    script = Script(model, *map(call, range(TURNS)))
    tools, history = declarations([look_up]), list[Mapping[str, object]]([{"role": "user", "content": "What of the lamp?"}])
    for _ in range(TURNS):
        found = model.chat(history, tools=tools, logits_processors=[script], max_tokens=100)
        history += turn_of(found, [run_call(call, {"look_up": look_up}) for call in found.tool_calls])
    tokens = len(found.prompt_tokens) + len(found.tokens)
    assert sum(rows) - tokens < 0.05 * tokens


def test_only_the_turn_whose_thought_is_dropped_is_computed_twice(model: Model, rows: list[int]) -> None:
    """Templates drop the thought of a turn once the user speaks again, so that the ids part where that turn begins."""
    script = Script(model, *[f"{OPENING}{THOUGHT}It is old." for _ in range(TURNS)])
    history = list[Mapping[str, object]]()
    for turn in range(TURNS):
        history.append({"role": "user", "content": f"And what of page {turn}? I have read it twice. " * 4})
        del rows[:]
        found = model.chat(history, enable_thinking=True, logits_processors=[script], max_tokens=100)
        history.append({"role": "assistant", "content": found.text})
        new = len(model.tokenizer.encode(str(history[-2]["content"]), bos=False)) + len(found.tokens)
        assert sum(rows) <= new + (40 if turn else 60), turn  # the answer without its thought, and markers
    assert len(found.prompt_tokens) > 1000, "the test needs a conversation longer than windows"


def test_a_turn_after_30000_tokens_computes_its_own_rows_and_at_most_a_window(rows: list[int]) -> None:
    config: dict[str, Any] = TINY | {"max_position_embeddings": 40_000, "num_kv_shared_layers": 0}
    plan = plan_of(config)
    engine = Engine(build_decoder(build_oracle(config), plan), 31_000, 1024, prefix_cache_bytes=None)
    history: tuple[int, ...] = ()

    def computed(ids: tuple[int, ...]) -> int:
        del rows[:]
        engine.submit(Request(ids, max_tokens=3))
        while engine.has_work:
            engine.step()
        return sum(rows)

    for length in (1_000, 29_000, 100, 1):
        history += prompt(length, len(history))
        assert computed(history) <= length + 3
    elsewhere = prompt(50, 1)
    assert computed((*history[:17_000], *elsewhere)) <= len(elsewhere) + 3 + 64  # a window of 6, in pages of 64
