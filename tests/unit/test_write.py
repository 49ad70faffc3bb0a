"""Writing checkpoints: what the safetensors library reads back, one tensor in memory at a time, whole or not at all."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from gemcutter.checkpoint import write
from gemcutter.checkpoint.source import DTYPES, INDEX_NAME, Source
from gemcutter.checkpoint.write import Chunk, Spec, write_json, write_safetensors, write_sharded
from gemcutter.errors import CheckpointError

SPELLINGS = {getattr(torch, torch_name): spelling for spelling, (_, torch_name) in DTYPES.items()}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[Spec]:
    return [(name, SPELLINGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "embed": torch.randn(7, 3).to(torch.bfloat16),
        "norm": torch.randn(5),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12, dtype=torch.int64).view(3, 4).t(),
        "mask": torch.tensor([True, False, True]),
        "packed": torch.arange(3, dtype=torch.uint8),
    }


def same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return read.keys() == expected.keys() and all(
        read[name].dtype == tensor.dtype and read[name].equal(tensor) for name, tensor in expected.items()
    )


def ours(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.torch() for name, tensor in Source.open(path).tensors.items()}


# ---- one file ----


def test_file_reads_back_in_the_reference_library_and_in_ours(tmp_path: Path) -> None:
    tensors = some_tensors()
    file = tmp_path / "model.safetensors"
    write_safetensors(file, specs_of(tensors), tensors.values())
    assert same(load_file(file), tensors)
    assert same(ours(file), tensors)
    with safe_open(str(file), "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    content = file.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    assert header_bytes % 8 == 0
    assert list(json.loads(content[8 : 8 + header_bytes])) == ["__metadata__", *tensors]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N", "P"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([spelling for spelling in DTYPES if spelling not in ("F8_E8M0", "BOOL")]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5).filter(lambda key: key.isprintable()), st.just("käse"), max_size=2),
)
def test_any_tensors_read_back(tmp_path: Path, kinds: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    file = tmp_path / "any.safetensors"
    specs = [(name, dtype, shape) for name, (dtype, shape) in kinds.items()]
    contents = [os.urandom(write.tensor_nbytes(dtype, shape)) for _, dtype, shape in specs]
    write_safetensors(file, specs, contents, metadata)
    source = Source.open(file)
    assert source.metadata == metadata
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in source.tensors.values()] == specs
    assert [bytes(tensor.raw().tolist()) for tensor in source.tensors.values()] == contents
    assert load_file(file).keys() == kinds.keys()


def test_a_tensor_may_come_in_chunks_of_any_kind(tmp_path: Path) -> None:
    table = torch.arange(24, dtype=torch.float32).view(6, 4)
    raw = table.numpy().tobytes()
    chunks: list[Chunk] = [table[:2], b"", raw[32:37], bytearray(raw[37:64]), memoryview(raw)[64:80], table[5:], b"xy", b""]
    write_safetensors(tmp_path / "m.safetensors", [("table", "F32", (6, 4)), ("tail", "U8", (2,))], iter(chunks), {})
    read = load_file(tmp_path / "m.safetensors")
    assert read["table"].equal(table)
    assert read["tail"].tolist() == list(b"xy")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def data() -> Iterator[torch.Tensor]:
        nonlocal most
        for _ in range(20):
            gc.collect()
            most = max(most, sum(ref() is not None for ref in made))
            tensor = torch.zeros(1000)
            made.append(weakref.ref(tensor))
            yield tensor
            del tensor

    write_safetensors(tmp_path / "m.safetensors", [(f"t{i}", "F32", (1000,)) for i in range(20)], data())
    assert len(made) == 20
    assert most == 0  # when the next one is made, the one before is gone


def test_writing_replaces_a_file_whose_old_mapping_stays_readable(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    write_safetensors(file, [("a", "F32", (2,))], [torch.ones(2)])
    old = Source.open(file).tensors["a"].torch()
    write_safetensors(file, [("a", "F32", (2,))], [old * 3])
    assert old.tolist() == [1, 1]
    assert ours(file)["a"].tolist() == [3, 3]


# ---- refusals ----


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([("a", "F32", (2,)), ("a", "F32", (2,))], "given twice"),
        ([("__metadata__", "F32", (2,))], "reserved"),
        ([("a\n", "F32", (2,))], "unprintable"),
        ([("a", "Q4_0", (2,))], "dtype 'Q4_0' is unknown"),
        ([("a", "F32", (-1,))], "not a list of non-negative integers"),
        ([("a", "F32", (2**62,))], "more than 2**63 bytes"),
    ],
)
def test_bad_specs_are_refused_before_a_file_is_made(tmp_path: Path, specs: list[Spec], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path / "m.safetensors", specs, [])
    assert expected in caught.value.problems[0]
    with pytest.raises(CheckpointError):
        write_sharded(tmp_path / "new", specs, [])
    assert list(tmp_path.iterdir()) == []


def test_all_bad_specs_and_metadata_come_at_once(tmp_path: Path) -> None:
    numbers: Any = {"step": 3}
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path / "m", [("a", "X", (1,)), ("b", "F32", (-1,)), ("b", "F32", (1,))], [], numbers)
    assert len(caught.value.problems) == 4


SPECS: list[Spec] = [("a", "F32", (2, 3)), ("b", "BF16", (4,))]
A, B = torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)


def interrupted() -> Iterator[Chunk]:
    yield A
    raise KeyboardInterrupt


def failing() -> Iterator[Chunk]:
    yield A
    raise OSError(errno.EIO, "the source's own trouble")


@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        ([A], CheckpointError, "the data ends 8 bytes before the end of tensor b"),
        ([A, B[:3]], CheckpointError, "the data ends 2 bytes before the end of tensor b"),
        ([A, B, B], CheckpointError, "goes on after the last tensor"),
        ([A, B, b"x"], CheckpointError, "goes on after the last tensor"),
        ([bytes(32)], CheckpointError, "tensor a got 32 bytes where 24 are missing"),
        ([A, A], CheckpointError, r"tensor b is announced as BF16 \[4\], the data is float32 \[2, 3\]"),
        ([A.t()], CheckpointError, r"tensor a is announced as F32 \[2, 3\], the data is float32 \[3, 2\]"),
        ([A.bfloat16()], CheckpointError, "the data is bfloat16"),
        (interrupted, KeyboardInterrupt, ""),
        (failing, OSError, "the source's own trouble"),
    ],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_failure_leaves_nothing_behind(tmp_path: Path, data: Any, error: type[Exception], expected: str, is_sharded: bool) -> None:
    chunks: Iterable[Chunk] = data() if callable(data) else data
    with pytest.raises(error, match=expected) as caught:
        if is_sharded:
            write_sharded(tmp_path, SPECS, chunks, max_shard_bytes=24)
        else:
            write_safetensors(tmp_path / "model.safetensors", SPECS, chunks)
    assert type(caught.value) is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, SPECS, [A, B])
    before = file.read_bytes()

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        real = write._write
        calls = iter([real, real, lambda *_: write._explained(file).__enter__() or full()])

        def third_fails(out: Any, path: Path, content: memoryview) -> None:
            with write._explained(path):
                next(calls)(out, path, content)

        monkeypatch.setattr(write, "_write", third_fails)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(CheckpointError, match="No space left on device; check that the folder"):
        write_safetensors(file, SPECS, [A + 1, B + 1])
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
