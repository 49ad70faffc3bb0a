"""Repacked weights on disk: what is kept is what was made, and no file, disk or neighbour can harm a load."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.load import packed_weight_cache as module
from gemcutter.checkpoint.load import packed_weight_files
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.load.packed_weight_cache import PackedWeightCache
from gemcutter.checkpoint.load.packed_weight_files import make_room
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.quant import Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.cpu_packing import pack_for_cpu
from gemcutter.quant.gguf_blocks import TYPES, Blocks
from gemcutter.quant.packing import CpuPacker

CPU = torch.device("cpu")
Disk = namedtuple("Disk", "total used free")


def give_room(monkeypatch: pytest.MonkeyPatch, free: int = 1 << 40, total: int = 1 << 40) -> None:
    """Let the disk be of a size and have bytes free, whatever the real one has."""
    monkeypatch.setattr(packed_weight_files.shutil, "disk_usage", lambda _: Disk(total, total - free, free))


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test fail on a full disk."""
    give_room(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the demo as Q4_0."""
    path = tmp_path_factory.mktemp("model") / "demo.gguf"
    convert(DEMO_FOLDER, path, "gguf", "Q4_0")
    return path


def load(model: Path, folder: Path, quant: str | None = None) -> list[CpuPackedWeight]:
    """Load with a cache in `folder`, wait until it is written, and give the repacked weights."""
    checkpoint = open_checkpoint(model)
    params = load_params(
        checkpoint, torch.float32, CPU, None, quant, CpuPacker(), PackedWeightCache.of(checkpoint, quant, folder)
    )
    for thread in threading.enumerate():
        if thread.name == "packed weight cache":
            thread.join()
    return [
        part
        for param in params.values()
        if isinstance(param, Weight)
        for part in param.parts
        if isinstance(part, CpuPackedWeight)
    ]


def kept(model: Path, folder: Path) -> dict[str, CpuPackedWeight]:
    return PackedWeightCache.of(open_checkpoint(model), folder=folder).read()


def same(some: list[CpuPackedWeight], others: list[CpuPackedWeight]) -> bool:
    return all(
        (one.layout, one.shape, one.scheme) == (other.layout, other.shape, other.scheme) and torch.equal(one.data, other.data)
        for one, other in zip(some, others, strict=True)
    )


def test_the_second_load_maps_what_the_first_has_made(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(model, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("demo-")
    monkeypatch.setattr("gemcutter.quant.packing.pack_for_cpu", lambda *_: pytest.fail("repacked again"))
    second = load(model, tmp_path)
    assert len(first) > 20
    assert same(first, second)
    assert all(part.data.data_ptr() % 64 == 0 for part in second)
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["IQ4_XS", "MXFP4"])
def test_tables_of_codes_are_kept_with_them(name: str, model: Path, tmp_path: Path) -> None:
    kind = TYPES[name]
    data = torch.randint(0, 256, (16, kind.row_bytes(256)), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = pack_for_cpu(Blocks(data, kind))
    assert made is not None
    cache = PackedWeightCache.of(open_checkpoint(model), folder=tmp_path)
    writer = cache.write({"a": made})
    assert writer is not None
    writer.join()
    found = cache.read()["a"]
    assert len(made.layout.levels) == 16
    assert same([found], [made])


def test_what_is_quantized_at_load_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four, eight = load(DEMO_FOLDER, tmp_path, "q4"), load(DEMO_FOLDER, tmp_path, "q8")
    monkeypatch.setattr("gemcutter.quant.packing.join", lambda *_: pytest.fail("quantized again"))
    assert same(load(DEMO_FOLDER, tmp_path, "q4"), four)
    assert same(load(DEMO_FOLDER, tmp_path, "q8"), eight)


def test_a_changed_checkpoint_is_repacked(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "demo.gguf"
    copy.write_bytes(model.read_bytes())
    load(copy, tmp_path / "cache")
    assert kept(copy, tmp_path / "cache")
    os.utime(copy, ns=(0, copy.stat().st_mtime_ns + 1))
    assert not kept(copy, tmp_path / "cache")
    load(copy, tmp_path / "cache")
    assert kept(copy, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the older file is replaced"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "foreign": lambda raw: b"GIF89a" + raw[6:],
    "cut in its head": lambda raw: raw[:20],
    "cut in its header": lambda raw: raw[:200],
    "cut in its panels": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0",
    "another header": lambda raw: raw.replace(b'"offset": ', b'"offset":1', 1),
    "a block of its panels is zero": lambda raw: raw[: len(raw) // 2] + bytes(4096) + raw[len(raw) // 2 + 4096 :],
    "a bit of its panels is turned": lambda raw: raw[:-300] + bytes([raw[-300] ^ 1]) + raw[-299:],
    "a header of many bytes": lambda raw: raw[:40] + b"\xff" * 8 + raw[48:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_counts_as_none_and_is_replaced(name: str, model: Path, tmp_path: Path) -> None:
    first = load(model, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    assert kept(model, tmp_path) == {}
    assert same(load(model, tmp_path), first)
    assert len(kept(model, tmp_path)) == len(first)


def test_another_version_counts_as_none(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model, tmp_path)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert kept(model, tmp_path) == {}


def test_a_full_disk_is_one_warning(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [0]

    def write(file: int, data: memoryview) -> int:
        written[0] += 1
        if written[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(file, data[: len(data) // 2 + 1])

    made = load(model, tmp_path / "good")
    monkeypatch.setattr(packed_weight_files, "_write", write)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(load(model, tmp_path / "full"), made)
    assert [str(each.message) for each in caught if "repacked weights are not kept" in str(each.message)] == [
        f"repacked weights are not kept in {tmp_path / 'full'}: {os.strerror(errno.ENOSPC)}"
    ]
    assert list((tmp_path / "full").iterdir()) == []


def test_a_folder_that_can_t_be_is_one_warning(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load(model, tmp_path / "file" / "cache")
    assert sum("repacked weights are not kept" in str(each.message) for each in caught) == 1


def test_partial_writes_are_continued(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weight_files, "_write", lambda file, data: os.write(file, data[: max(1, len(data) // 3)]))
    made = load(model, tmp_path)
    assert same(load(model, tmp_path), made)
    assert len(kept(model, tmp_path)) == len(made)


def test_writers_and_readers_at_once_never_meet(model: Path, tmp_path: Path) -> None:
    made = load(model, tmp_path / "first")
    cache = PackedWeightCache.of(open_checkpoint(model), folder=tmp_path)
    weights = kept(model, tmp_path / "first")
    writers = [cache.write(weights) for _ in range(4)]
    seen = [0]
    while any(writer is not None and writer.is_alive() for writer in writers) or not seen[-1]:
        seen.append(len(cache.read()))
    assert set(seen) <= {0, len(weights)}
    assert len(weights) == len(made)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [cache.path]


def test_what_a_killed_writer_left_is_removed_after_a_day(model: Path, tmp_path: Path) -> None:
    old, new = (tmp_path / f"{name}{packed_weight_files.UNFINISHED}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - packed_weight_files.STALE_S - 9,) * 2)
    load(model, tmp_path)
    assert not old.exists()
    assert new.exists()


def unasked(model: Path, folder: Path) -> PackedWeightCache:
    return PackedWeightCache.of(open_checkpoint(model), folder=folder, is_asked=False)


def finished(thread: threading.Thread | None) -> bool:
    if thread is not None:
        thread.join()
    return thread is not None


def test_small_weights_are_not_kept_unasked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model, tmp_path / "first")
    weights = kept(model, tmp_path / "first")
    assert not finished(unasked(model, tmp_path / "second").write(weights))
    monkeypatch.setattr(module, "LEAST_BYTES", sum(each.nbytes for each in weights.values()))
    assert finished(unasked(model, tmp_path / "second").write(weights))
    assert len(unasked(model, tmp_path / "second").read()) == len(weights)


def test_nothing_is_said_or_kept_unasked_where_there_is_no_room(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, tmp_path / "first")
    weights = kept(model, tmp_path / "first")
    monkeypatch.setattr(module, "LEAST_BYTES", 1)
    (tmp_path / "file").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert finished(unasked(model, tmp_path / "file" / "cache").write(weights))  # no folder can be made there
        monkeypatch.setattr(packed_weight_files, "LEAST_FREE", 1.0)
        assert finished(unasked(model, tmp_path / "full").write(weights))
    assert not list(tmp_path.glob("full/*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unasked_file_is_given_up_when_the_program_ends(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model, tmp_path / "first")
    weights = kept(model, tmp_path / "first")
    monkeypatch.setattr(module, "LEAST_BYTES", 1)
    monkeypatch.setattr(packed_weight_files.threading, "main_thread", lambda: threading.Thread())  # one that does not run
    assert finished(unasked(model, tmp_path / "second").write(weights))
    assert not list(tmp_path.glob("second/*"))
    assert finished(PackedWeightCache.of(open_checkpoint(model), folder=tmp_path / "second").write(weights))
    assert len(list(tmp_path.glob("second/*"))) == 1


def test_the_folder_is_bounded_and_what_was_used_longest_ago_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_room(monkeypatch, 10_000, 10_000)
    monkeypatch.setattr(packed_weight_files, "MOST_SHARE", 0.1)
    own, paths = tmp_path / f"own{module.SUFFIX}", [tmp_path / f"{age}{module.SUFFIX}" for age in (3, 1, 2)]
    for path in paths:
        path.write_bytes(bytes(300))
        os.utime(path, (time.time() - 1000 * int(path.stem),) * 2)
    (tmp_path / f"other{packed_weight_files.UNFINISHED}").write_bytes(bytes(300))
    assert not make_room(tmp_path, 1001, own)
    assert len(list(tmp_path.iterdir())) == 4
    assert make_room(tmp_path, 500, own)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["1", "other"]
    own.write_bytes(bytes(600))
    assert make_room(tmp_path, 700, own)  # in the place of its older self
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["1", "other", "own"]
    give_room(monkeypatch, 400, 10_000)
    assert not make_room(tmp_path, 600, tmp_path / "new")  # a tenth of the disk stays free


def test_a_load_marks_what_it_maps_as_used(model: Path, tmp_path: Path) -> None:
    load(model, tmp_path)
    (path,) = tmp_path.iterdir()
    os.utime(path, (1000, 1000))
    assert kept(model, tmp_path)
    assert path.stat().st_mtime > 1000


def test_the_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packed_weight_files.user_folder() == tmp_path / "gemcutter" / "packed-weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packed_weight_files.user_folder() == tmp_path / "home" / ".cache" / "gemcutter" / "packed-weights"
