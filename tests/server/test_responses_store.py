"""The store behind `previous_response_id` forgets by age, number and bytes."""

from __future__ import annotations

from typing import Any

from gemcutter.server.responses_store import ResponsesStore


def response(id: str, text: str = "x") -> dict[str, Any]:
    return {"id": id, "output": [{"type": "message", "role": "assistant", "content": text}]}


def asked(text: str = "Hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_grows_by_input_and_output() -> None:
    store = ResponsesStore(10_000)
    assert store.put(response("a"), [], asked("1"))
    first = store.get("a")
    assert first is not None
    assert store.put(response("b"), first.items, asked("2"))
    second = store.get("b")
    assert second is not None
    assert [item["role"] for item in second.items] == ["user", "assistant"] * 2
    assert second.items[: len(first.items)] == first.items
    assert store.get("c") is None


def test_the_oldest_go_first() -> None:
    by_number = ResponsesStore(10_000, max_responses=2)
    for id in "abc":
        by_number.put(response(id), [], asked())
    assert [by_number.get(id) is not None for id in "abc"] == [False, True, True]
    by_bytes = ResponsesStore(3_000)
    for id in "abc":
        by_bytes.put(response(id, "x" * 600), [], asked())
    assert [by_bytes.get(id) is not None for id in "abc"] == [False, True, True]
    assert by_bytes.bytes <= 3_000


def test_what_is_larger_than_the_store_is_not_kept_and_costs_nobody_a_place() -> None:
    store = ResponsesStore(3_000)
    store.put(response("a"), [], asked())
    assert not store.put(response("b", "x" * 4_000), [], asked())
    assert store.get("a") is not None
    assert store.get("b") is None


def test_responses_expire() -> None:
    now = [0.0]
    store = ResponsesStore(10_000, ttl_s=60, clock=lambda: now[0])
    store.put(response("a"), [], asked())
    now[0] = 30.0
    store.put(response("b"), [], asked())
    now[0] = 60.0
    assert store.get("a") is None
    assert store.get("b") is not None
    now[0] = 90.0
    assert store.get("b") is None
    assert (len(store), store.bytes) == (0, 0)


def test_a_response_may_be_deleted_once() -> None:
    store = ResponsesStore(10_000)
    store.put(response("a"), [], asked())
    assert store.delete("a")
    assert not store.delete("a")
    assert store.bytes == 0
