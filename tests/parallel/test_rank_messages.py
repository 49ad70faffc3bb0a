"""Messages between ranks: whatever a step holds arrives as it was; what is cut off or is no message is told apart."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch

from gemcutter.errors import RankError
from gemcutter.ops.step import KVRange, MediaRows, Step
from gemcutter.parallel.messages import HEAD, encode, receive, step_content, step_of
from gemcutter.plan import GLOBAL_GROUP, group_of


def sent(command: str, content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what arrives of a message."""
    here, there = socket.socketpair()
    with here, there:
        thread = threading.Thread(target=here.sendall, args=(encode(command, content),))  # more than a socket's buffer
        thread.start()
        found = receive(there)
        thread.join()
    assert found is not None
    return found


def test_values_arrive_as_they_were() -> None:
    tensors = {"a": torch.arange(7), "b": torch.randn(3, 5), "c": torch.randn(2, 1).bfloat16(), "d": torch.empty(0, 4)}
    content = {"n": 3, "x": 1.5, "none": None, "text": "ä", "list": [1, [2, slice(3, 9)]], "map": {"k": tensors["a"]}, **tensors}
    command, found = sent("forward", content)
    assert command == "forward"
    assert found.keys() == content.keys()
    assert found["list"] == [1, [2, slice(3, 9)]]
    assert torch.equal(found["map"]["k"], tensors["a"])
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert (found["n"], found["x"], found["none"], found["text"]) == (3, 1.5, None, "ä")


def test_large_tensors_arrive_whole() -> None:
    big = torch.randn(500, 3000)
    assert torch.equal(sent("logits", {"states": big})[1]["states"], big)


def test_a_step_arrives_as_it_was() -> None:
    window = group_of(512)
    ids, positions = torch.tensor([4, 5, 6]), torch.tensor([0, 1, 9])
    step = Step(
        ids_N=ids,
        ple_ids_N=torch.tensor([4, 0, 6]),
        positions_N=positions,
        query_start=(0, 2, 3),
        kv_ranges={
            GLOBAL_GROUP: (KVRange(0, slice(16, 18), (1,), 16), KVRange(0, torch.arange(10), (0, 2), 16)),
            window: (KVRange(0, slice(0, 2)), KVRange(3, slice(5, 12))),
        },
        slot_mapping={GLOBAL_GROUP: torch.tensor([16, 17, 9]), window: torch.tensor([0, 1, 11])},
        logit_rows=(1, 2),
        rope={},
        last_visible={window: torch.tensor([1, 1, 9])},
        media=MediaRows(torch.tensor([1]), torch.randn(1, 8)),
        adapters=(None, "lamp"),
    )
    _, content = sent("forward", {"step": step_content(step)})
    found = step_of(content["step"], torch.device("cpu"))
    assert (found.query_start, found.logit_rows, found.adapters) == (step.query_start, step.logit_rows, step.adapters)
    for name in ("ids_N", "ple_ids_N", "positions_N"):
        assert torch.equal(getattr(found, name), getattr(step, name))
    assert found.kv_ranges[GLOBAL_GROUP][0] == step.kv_ranges[GLOBAL_GROUP][0]
    assert torch.equal(torch.as_tensor(found.kv_ranges[GLOBAL_GROUP][1].where), torch.arange(10))
    assert found.kv_ranges[window] == step.kv_ranges[window]
    assert {group: slots.tolist() for group, slots in found.slot_mapping.items()} == {
        GLOBAL_GROUP: [16, 17, 9],
        window: [0, 1, 11],
    }
    assert torch.equal(found.last_visible[window], step.last_visible[window])
    assert found.media is not None
    assert step.media is not None
    assert torch.equal(found.media.embeds_KD, step.media.embeds_KD)
    plain = step_of(
        sent("forward", {"step": step_content(Step(ids, ids, positions, (0, 3), {}, {}, None, {}))})[1]["step"],
        torch.device("cpu"),
    )
    assert plain.logit_rows is None
    assert plain.ple_ids_N is plain.ids_N


@pytest.mark.parametrize("cut", [0, 3, 20, -1])
def test_a_connection_that_ends_is_told_apart(cut: int) -> None:
    here, there = socket.socketpair()
    with there:
        with here:
            here.sendall(encode("logits", {"states": torch.ones(4)})[:cut])
        assert receive(there) is None


def test_what_is_no_message_is_refused() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(HEAD.pack(1 << 40, 5))
        with pytest.raises(RankError, match="is no message"):
            receive(there)
