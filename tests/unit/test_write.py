"""Writing checkpoints: what the safetensors library reads back, one tensor in memory at a time, whole or not at all."""

from __future__ import annotations

import errno
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

from gemcutter.checkpoint.container.lazy_tensor import DTYPES, tensor_nbytes
from gemcutter.checkpoint.container.shard_index import INDEX_NAME
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.write.write_safetensors import Chunk, Spec, write_json, write_safetensors, write_sharded
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
        "strided": torch.arange(10, dtype=torch.float64)[::3],
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
    contents = [os.urandom(tensor_nbytes(dtype, shape)) for _, dtype, shape in specs]
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


def write_either(folder: Path, specs: list[Spec], data: Iterable[Chunk], is_sharded: bool) -> None:
    """Write one file, or a shard for each tensor."""
    if is_sharded:
        write_sharded(folder, specs, data, max_shard_bytes=1)
    else:
        write_safetensors(folder / "model.safetensors", specs, data)


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
        ([A, A], CheckpointError, "tensor b is announced as BF16 [4], the data is float32 [2, 3]"),
        ([A.t()], CheckpointError, "tensor a is announced as F32 [2, 3], the data is float32 [3, 2]"),
        ([A.bfloat16()], CheckpointError, "the data is bfloat16"),
        (interrupted, KeyboardInterrupt, ""),
        (failing, OSError, "the source's own trouble"),
    ],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_failure_leaves_nothing_behind(
    tmp_path: Path, data: Any, error: type[Exception], expected: str, is_sharded: bool
) -> None:
    chunks: Iterable[Chunk] = data() if callable(data) else data
    with pytest.raises(error) as caught:
        write_either(tmp_path, SPECS, chunks, is_sharded)
    assert type(caught.value) is error
    assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_the_end_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "model.safetensors"
    write_safetensors(file, SPECS, [A, B])
    before = file.read_bytes()
    monkeypatch.setattr(os, step, full)
    with pytest.raises(CheckpointError, match="No space left on device; check that the folder"):
        write_safetensors(file, SPECS, [A + 1, B + 1])
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, is_sharded: bool) -> None:
    resource = pytest.importorskip("resource", reason="limits file sizes to make a real write fail")
    specs: list[Spec] = [("a", "U8", (10,)), ("b", "U8", (100_000,))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="can't be written: File too large"):
            write_either(tmp_path, specs, [bytes(10), bytes(100_000)], is_sharded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_fit_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def data() -> Iterator[Chunk]:
        asked.append(True)
        yield A

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=31))
    with pytest.raises(CheckpointError, match="has 31 bytes free, the tensors take 32"):
        write_safetensors(tmp_path / "m.safetensors", SPECS, data())
    with pytest.raises(CheckpointError, match="has 31 bytes free, the tensors take 32"):
        write_sharded(tmp_path, SPECS, data(), max_shard_bytes=24)
    assert not asked
    assert list(tmp_path.iterdir()) == []


def test_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=rf"{folder}\S* can't be written: .*; check that the folder exists"):
            write_safetensors(folder / "m.safetensors", SPECS, [A, B])
        with pytest.raises(CheckpointError, match=f"{folder}/config.json can't be written: .*; check that the folder exists"):
            write_json(folder / "config.json", {})
    with pytest.raises(CheckpointError, match="check that the folder exists"):
        write_sharded(tmp_path / "file", SPECS, [A, B])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"Permission denied; check that the folder"):
        write_safetensors(tmp_path / "m.safetensors", SPECS, [A, B])


# ---- shards ----


def test_shards_and_index_read_back(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.randn(10, i + 1) for i in range(8)}
    sizes = [40 * (i + 1) for i in range(8)]
    folder = tmp_path / "made" / "here"
    written = write_sharded(folder, specs_of(tensors), iter(tensors.values()), {"format": "pt"}, max_shard_bytes=250)
    names = [f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)]
    assert written == tuple(folder / name for name in [*names, INDEX_NAME])
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, INDEX_NAME])
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": sum(sizes)}
    read = {name: tensor for file in names for name, tensor in load_file(folder / file).items()}
    assert same(read, tensors)
    assert same(ours(folder), tensors)
    assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())
    assert index["weight_map"].keys() == tensors.keys()
    for file in names:
        held = [tensor.nbytes for tensor in load_file(folder / file).values()]
        assert sum(held) <= 250 or len(held) == 1  # the two tensors of 280 and 320 bytes have a shard each


def test_one_shard_is_a_plain_file_without_index(tmp_path: Path) -> None:
    assert write_sharded(tmp_path, SPECS, [A, B]) == (tmp_path / "model.safetensors",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(ours(tmp_path), {"a": A, "b": B})


def test_a_tensor_above_the_shard_size_has_a_shard_of_its_own(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX_NAME]
    assert [path.name for path in write_sharded(tmp_path, SPECS, [A, B], max_shard_bytes=1)] == names


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", INDEX_NAME])
def test_shards_never_join_an_older_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(CheckpointError, match=f"already holds {name}; choose another folder"):
        write_sharded(tmp_path, SPECS, [A, B])
    assert (tmp_path / name).read_text() == "old"


# ---- JSON ----


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_json(file, {"name": "käse", "sizes": [1, 2]})
    assert json.loads(file.read_text(encoding="utf-8")) == {"name": "käse", "sizes": [1, 2]}
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(file, bad)
    assert json.loads(file.read_text(encoding="utf-8"))["sizes"] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
