"""Adapters chosen per request, against transformers with the same changes in its weights.

Owns the claim that a request gets its own adapter's numbers, whatever runs beside it in a step: other adapters, none, chunks
longer than the window, reader rows that are dropped, preemption, reused prefixes. How adapters are read and merged is
`tests/formats/test_lora.py`'s.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gemcutter.checkpoint.formats.lora import open_adapter
from gemcutter.checkpoint.load.adapters import attach
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.errors import RequestError
from gemcutter.model.text import Decoder
from gemcutter.ops import reference
from gemcutter.ops.types import Param
from gemcutter.plan import Proj
from tests.adapters import Changes, adapted, draw, places, tensors_of, write_adapter
from tests.parity.batches import Answer, Job, drive, errors
from tests.parity.test_batch_invariance import assert_same_bits
from tests.topologies import SIZES, TOLERANCE, build_decoder, build_oracle, plan_of, prompt

CONTEXT = 192
CPU = torch.device("cpu")

# Lengths lie around a page of 64 positions and a window of 8; every kind of neighbour meets every other.
JOBS = (
    Job(prompt(130, 1), adapter="a"),
    Job(prompt(33, 2)),
    Job(prompt(65, 3), adapter="b", wants_logprobs=True),
    Job(prompt(9, 4), adapter="a", joins=2, wants_states=True),
    Job(prompt(17, 5), joins=3, wants_logprobs=True, wants_states=True),
    Job(prompt(70, 6), adapter="b", joins=4, max_tokens=12),
    Job(prompt(1, 7), adapter="a", joins=5),
)


@functools.cache
def model(size: str) -> PreTrainedModel:
    """Build the oracle of a size once."""
    return build_oracle(SIZES[size], seed=3)


@functools.cache
def changes(size: str) -> dict[str, Changes]:
    """Draw two adapters: one changes every matrix, the other a few, of another rank."""
    plan = plan_of(SIZES[size])
    some = [place for place in places(plan) if place[1] in ("k", "up") or place[0].endswith("attn.out")]
    return {"a": draw(plan, places(plan), seed=1), "b": draw(plan, some, rank=5, seed=2)}


@functools.cache
def oracles(size: str) -> dict[str | None, PreTrainedModel]:
    """Add each adapter's changes to a copy of the oracle."""
    found = changes(size)
    return {None: model(size), "a": adapted(model(size), found["a"]), "b": adapted(model(size), found["b"], scale=2.0 / 5)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Write the adapters of all sizes."""
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for size in SIZES:
        first, second = (tensors_of(changes(size)[name]) for name in "ab")
        found[size, "a"] = write_adapter(root / size / "a", first)
        found[size, "b"] = write_adapter(root / size / "b", second, r=5, lora_alpha=2)
    return found


def decoder(
    size: str, folders: dict[tuple[str, str], Path], kernels: str = "auto", dtype: torch.dtype = torch.float32, names: str = "ab"
) -> Decoder:
    """Build a decoder over the oracle's weights, with the adapters beside them."""
    plan = plan_of(SIZES[size])
    params: dict[str, Param] = dict(build_decoder(model(size), plan, dtype).params)
    for name in names:
        params = attach(params, open_adapter(folders[size, name], plan), name, CPU)
    return Decoder(plan, params, dtype, "cpu", kernels)


def too_far(size: str, jobs: tuple[Job, ...], answers: list[Answer]) -> dict[tuple[int, str], float]:
    """List what lies outside the tolerance of the oracle that has the job's adapter."""
    found = {
        (index, what): error
        for index, (job, answer) in enumerate(zip(jobs, answers, strict=True))
        for what, error in errors(oracles(size)[job.adapter], job, answer).items()
    }
    return {place: error for place, error in found.items() if not error <= TOLERANCE}


@pytest.mark.parametrize(("max_rows", "kernels"), [(7, "auto"), (64, "reference")])
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_every_request_of_a_mixed_batch_equals_its_own_oracle(
    size: str, max_rows: int, kernels: str, folders: dict[tuple[str, str], Path]
) -> None:
    running = Engine(decoder(size, folders, kernels), CONTEXT, max_batched_tokens=max_rows, max_num_seqs=4)
    answers = drive(running, JOBS)
    assert not too_far(size, JOBS, answers)
    for book in running.pool.allocators.values():
        assert book.free == len(book.ref_counts), "pages were leaked"


def test_one_row_a_step(folders: dict[tuple[str, str], Path]) -> None:
    jobs = JOBS[3:5]
    assert not too_far("E2B", jobs, drive(Engine(decoder("E2B", folders), CONTEXT, max_batched_tokens=1, max_num_seqs=2), jobs))


@pytest.mark.parametrize("size", ["E4B", "12B", "31B"])
def test_the_other_sizes(size: str, folders: dict[tuple[str, str], Path]) -> None:
    """The global layers of 12B and 31B have no values of their own: a change of their keys changes both."""
    layers = plan_of(SIZES[size]).layers
    assert size == "E4B" or any(layer.proj is Proj.QK_ONLY for layer in layers)
    running = Engine(decoder(size, folders), CONTEXT, max_batched_tokens=64, max_num_seqs=4)
    assert not too_far(size, JOBS, drive(running, JOBS))


def test_a_change_of_keys_alone_is_also_one_of_values(tmp_path: Path) -> None:
    plan = plan_of(SIZES["31B"])
    (layer,) = [layer.index for layer in plan.layers if layer.proj is Proj.QK_ONLY][:1]
    found = draw(plan, [(f"layers.{layer}.attn.in", "k")], seed=4)
    params = build_decoder(model("31B"), plan).params
    params = attach(params, open_adapter(write_adapter(tmp_path, tensors_of(found)), plan), "keys", CPU)
    job = Job(prompt(40, 1), adapter="keys", wants_logprobs=True)
    (answer,) = drive(Engine(Decoder(plan, params), CONTEXT), [job])
    wrong = errors(adapted(model("31B"), found), job, answer)
    assert max(wrong.values()) <= TOLERANCE
    assert max(errors(model("31B"), replace(job, max_tokens=0), Answer(report=answer.report)).values()) > 0.01


@pytest.fixture
def _short_key_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "KEY_BLOCK", 16)


@pytest.mark.usefixtures("_short_key_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_kernels_keep_every_bit_in_any_batch(dtype: torch.dtype, folders: dict[tuple[str, str], Path]) -> None:
    both = decoder("26B-A4B", folders, "reference", dtype)
    jobs = tuple(replace(job, joins=min(job.joins, 2)) for job in JOBS[1:5])
    alone = [drive(Engine(both, CONTEXT, max_batched_tokens=CONTEXT), [replace(job, joins=0)])[0] for job in jobs]
    assert_same_bits(drive(Engine(both, CONTEXT, max_batched_tokens=16, max_num_seqs=4), jobs), alone)
    (changed,) = drive(Engine(both, CONTEXT), [replace(jobs[0], adapter="a")])
    assert changed.logprobs != alone[0].logprobs


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float32, "auto"), (torch.bfloat16, "reference")], ids=str)
def test_requests_without_an_adapter_keep_every_bit(
    dtype: torch.dtype, kernels: str, folders: dict[tuple[str, str], Path]
) -> None:
    jobs = tuple(replace(job, adapter=None) for job in JOBS)
    with_them, without = (
        drive(Engine(decoder("E2B", folders, kernels, dtype, names), CONTEXT, max_batched_tokens=64, max_num_seqs=4), jobs)
        for names in ("ab", "")
    )
    assert_same_bits(with_them, without)


def test_a_prefix_is_reused_by_its_own_adapter_only(folders: dict[tuple[str, str], Path]) -> None:
    running = Engine(decoder("E2B", folders), CONTEXT, max_batched_tokens=64, prefix_cache_bytes=1 << 20)
    ids = prompt(90, 12)
    jobs = tuple(Job(ids, adapter=adapter) for adapter in ("a", None, "b", "a", None, "b"))
    answers = [drive(running, [job])[0] for job in jobs]
    assert not too_far("E2B", jobs, answers)
    assert [answer.report.cached_tokens for answer in answers if answer.report] == [0, 0, 0, 89, 89, 89]


def test_preempted_requests_keep_their_adapter(folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    running = Engine(decoder("E2B", folders), CONTEXT, max_batched_tokens=64, max_num_seqs=2)
    running.scheduler.max_num_seqs = 5  # more than the pages are for
    left: list[int] = []
    leave = running.scheduler.leave
    monkeypatch.setattr(running.scheduler, "leave", lambda sequence: (left.append(sequence.number), leave(sequence)))
    adapters = ("a", None, "b", "b", "a")
    jobs = tuple(Job(prompt(50 + index, 20 + index), max_tokens=90, adapter=each) for index, each in enumerate(adapters))
    answers = drive(running, jobs)
    assert len(left) > len(jobs), "nothing was preempted: the test needs fewer pages or longer replies"
    assert not too_far("E2B", jobs, answers)


@pytest.mark.parametrize("name", [3, ["a"]], ids=repr)
def test_what_is_no_name_of_an_adapter_is_refused_as_such(name: Any, folders: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(RequestError, match=r"request\.adapter: expected the name of one adapter"):
        Engine(decoder("E2B", folders), CONTEXT).submit(Request(prompt(3), adapter=name))


@pytest.mark.parametrize("name", ["c", "A", ""], ids=repr)
def test_unknown_adapters_are_refused_with_the_names_of_those_there_are(name: str, folders: dict[tuple[str, str], Path]) -> None:
    running = Engine(decoder("E2B", folders), CONTEXT)
    with pytest.raises(RequestError, match="loaded are: a, b"):
        running.submit(Request(prompt(3), adapter=name))
    with pytest.raises(RequestError, match="loaded are: none"):
        Engine(decoder("E2B", folders, names=""), CONTEXT).submit(Request(prompt(3), adapter=name))
    assert not running.has_work
