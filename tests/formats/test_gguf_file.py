"""The GGUF container: headers of every kind, hostile ones above all, split models, and tensors that are views of the file."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemcutter.checkpoint.container import gguf_file
from gemcutter.checkpoint.container.gguf_file import TENSOR_TYPES, Array
from gemcutter.checkpoint.container.source import Source
from gemcutter.errors import CheckpointError
from gemcutter.quant.gguf_blocks import TYPES

Tensor = tuple[str, tuple[int, ...], int, int]  # name, dimensions as stored (columns first), type, offset


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def integer(key: str, value: int) -> bytes:
    return entry(key, 4, struct.pack("<I", value))


ARCHITECTURE = entry("general.architecture", 8, text("gemma4"))


def container(
    entries: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[Tensor, ...] = (("a", (4,), 0, 0),),
    data: bytes = bytes(16),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a GGUF file; `counts` are the numbers of tensors and entries that its head claims."""
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(entries)))) + b"".join(entries)
    for name, dims, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % alignment) + data


def write(folder: Path, raw: bytes, name: str = "model.gguf") -> Path:
    (folder / name).write_bytes(raw)
    return folder / name


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Source.open(path)
    return caught.value


# ---- what is read ----


@pytest.mark.parametrize("name", ["model.gguf", "sha256-0a1b2c"])  # Ollama keeps its files under their hashes
def test_everything_that_a_writer_writes_comes_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70_000)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e-300)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**40))
    writer.add_bool("yes", True)
    writer.add_string("text", "▁a\n🙂")
    writer.add_array("texts", ["", "▁", "b" * 300, "é"])
    writer.add_array("flags", [True, False])
    writer.add_array("numbers", [3, -4])
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("b.weight", values)
    writer.add_tensor("c", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Source.open(path)
    found = {key: value.decode() if isinstance(value, Array) else value for key, value in source.metadata.items()}
    assert found == {
        "general.architecture": "gemma4", "u8": 200, "i8": -3, "u16": 60_000, "i16": -300, "i32": -70_000, "f32": 0.5,
        "f64": 1e-300, "u64": 2**63, "i64": -(2**40), "yes": True, "text": "▁a\n🙂", "texts": ["", "▁", "b" * 300, "é"],
        "flags": [True, False], "numbers": [3, -4],
    }  # fmt: skip
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()} == {
        "b.weight": ("F32", (2, 3)),
        "c": ("F16", (2, 3)),
    }
    assert source.tensors["b.weight"].torch().equal(torch.from_numpy(values))
    assert source.tensors["c"].torch().equal(torch.from_numpy(values).half())
    assert source.files == (path,)


def test_types_are_the_library_s() -> None:
    """Every type here has the library's number and sizes, and every block type that is decoded has its decoder's."""
    sizes = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: sizes[number] for number in TENSOR_TYPES} == TENSOR_TYPES
    ours = {name: (values, nbytes) for name, values, nbytes in TENSOR_TYPES.values()}
    assert {kind.name: (kind.values, kind.nbytes) for kind in TYPES.values()}.items() <= ours.items()


def test_blocks_are_sized_and_placed(tmp_path: Path) -> None:
    blocks = bytes(range(36)) * 2
    tensors = (("q", (64, 2), 2, 0), ("e", (32, 1, 2), 8, 96))
    path = write(tmp_path, container(tensors=tensors, data=blocks + bytes(24) + bytes(68)))
    source = Source.open(path)
    assert (source.tensors["q"].dtype, source.tensors["q"].shape, source.tensors["q"].nbytes) == ("Q4_0", (2, 64), 72)
    assert bytes(source.tensors["q"].raw().numpy()) == blocks
    assert (source.tensors["e"].shape, source.tensors["e"].nbytes) == ((2, 1, 32), 68)
    with pytest.raises(CheckpointError, match="stored as Q4_0"):
        source.tensors["q"].torch()


def test_strings_across_chunks_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a chunk, the same is found; a string may be longer than a chunk."""
    words = [("w" * (index % 90)) for index in range(300)]
    array = entry("words", 9, struct.pack("<IQ", 8, len(words)) + b"".join(map(text, words)))
    path = write(tmp_path, container((ARCHITECTURE, array, integer("after", 7))))
    for size in (1, 9, 64, 1 << 20):
        monkeypatch.setattr(gguf_file, "_FIRST_CHUNK_BYTES", size)
        monkeypatch.setattr(gguf_file, "_CHUNK_BYTES", size)
        source = Source.open(path)
        assert source.metadata["after"] == 7
        assert source.metadata["words"].decode() == words


def test_a_vocabulary_costs_little(tmp_path: Path) -> None:
    """Gemma 4's size: 262,144 pieces and 514,906 merges are located without being decoded or held."""
    pieces = struct.pack("<IQ", 8, 262_144) + text("▁piece") * 262_144
    merges = struct.pack("<IQ", 8, 514_906) + text("▁pie ce") * 514_906
    path = write(tmp_path, container((ARCHITECTURE, entry("tokens", 9, pieces), entry("merges", 9, merges), integer("n", 1))))
    started = time.process_time()
    source = Source.open(path)
    spent = time.process_time() - started
    assert len(source.metadata["merges"]) == 514_906
    assert source.metadata["n"] == 1
    assert spent < 1, "a sixth of a second is usual"


def test_a_header_is_never_held_whole(tmp_path: Path) -> None:
    array = entry("words", 9, struct.pack("<IQ", 8, 30_000) + text("w" * 1000) * 30_000)
    path = write(tmp_path, container((ARCHITECTURE, array)))
    tracemalloc.start()
    assert len(Source.open(path).metadata["words"]) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, "a chunk or two of 8 MB, and not 30 MB"


def test_headers_need_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = write(tmp_path, container())
    code = (
        "import sys; from pathlib import Path; from gemcutter.checkpoint.container.source import Source; "
        f"Source.open(Path({str(path)!r})); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- hostile headers ----

HUGE = 2**64 - 1
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is truncated: 0 bytes"),
    "head cut": (container()[:20], "is truncated: 20 bytes"),
    "another file": (b"PK\3\4" + bytes(60), "is not a GGUF file"),
    "version 1": (container(version=1), "of version 1"),
    "version of tomorrow": (container(version=4), "of version 4"),
    "big-endian": (container(version=3 << 24), "is big-endian"),
    "absurd number of tensors": (container(counts=(HUGE, 1)), "would hold 18,446,744,073,709,551,615 tensors"),
    "absurd number of entries": (container(counts=(1, HUGE)), "metadata entries"),
    "more tensors than bytes": (container(counts=(200_000, 1)), "is truncated"),
    "more entries than bytes": (container(counts=(1, 60_000)), "is "),
    "key of 2**64 bytes": (container((struct.pack("<Q", HUGE),)), "a metadata key would take"),
    "text of 2**64 bytes": (container((entry("k", 8, struct.pack("<Q", HUGE)),)), "would take"),
    "text beyond the end": (container((entry("k", 8, struct.pack("<Q", 5000)),)), "is truncated"),
    "array of 2**64 texts": (container((entry("k", 9, struct.pack("<IQ", 8, HUGE)),)), "can't lie in"),
    "array of 2**64 numbers": (container((entry("k", 9, struct.pack("<IQ", 12, HUGE)),)), "is truncated"),
    "text of 2**63 in an array": (container((entry("k", 9, struct.pack("<IQQ", 8, 1, 2**63)),)), "is truncated"),
    "array of arrays": (container((entry("k", 9, struct.pack("<IQ", 9, 1)),)), "array of arrays"),
    "array of unknowns": (container((entry("k", 9, struct.pack("<IQ", 77, 1)),)), "unknown type 77"),
    "unknown value type": (container((entry("k", 13, b""),)), "unknown type 13"),
    "key that is no text": (container((text(b"\xff") + struct.pack("<I", 4),)), "not valid UTF-8"),
    "key twice": (container((integer("k", 1), integer("k", 2))), "repeats the metadata key 'k'"),
    "alignment 0": (container((integer("general.alignment", 0),)), "is not a power of two"),
    "alignment 24": (container((integer("general.alignment", 24),)), "is not a power of two"),
    "alignment 2**31": (container((integer("general.alignment", 1 << 31),)), "is not a power of two"),
    "alignment as text": (container((entry("general.alignment", 8, text("32")),)), "is not a power of two"),
    "unknown type": (container(tensors=(("a", (4,), 99, 0),)), "model.gguf:a: type 99 is unknown"),
    "retired type": (container(tensors=(("a", (4,), 4, 0),)), "type 4 is unknown"),
    "five dimensions": (container(tensors=(("a", (1, 1, 1, 1, 1), 0, 0),)), "would have 5 dimensions"),
    "no dimension": (container(tensors=(("a", (), 0, 0),)), "holds nothing"),
    "empty dimension": (container(tensors=(("a", (4, 0), 0, 0),)), "holds nothing"),
    "absurd shape": (container(tensors=(("a", (2**63, 2**63), 0, 0),)), "more than 2**63 bytes"),
    "rows cut through a block": (container(tensors=(("a", (48, 2), 2, 0),)), "not made of Q4_0's blocks of 32"),
    "offset 2**64": (container(tensors=(("a", (4,), 0, 2**64 - 32),)), "is truncated"),
    "crooked offset": (container(tensors=(("a", (4,), 0, 8),), data=bytes(40)), "offset 8 is not a multiple of 32"),
    "overlap": (container(tensors=(("a", (16,), 0, 0), ("b", (4,), 0, 32)), data=bytes(64)), "model.gguf:b: overlaps a"),
    "the same place": (container(tensors=(("a", (4,), 0, 0), ("b", (4,), 0, 0))), "overlaps a"),
    "tensor twice": (container(tensors=(("a", (4,), 0, 0), ("a", (4,), 0, 32)), data=bytes(48)), "a: is there twice"),
    "data cut": (container(data=bytes(15)), "1 of 1 tensors are cut"),
    "no data": (container(data=b""), "is truncated"),
    "name with a terminal escape": (container(tensors=(("\x1b[2J", (4,), 0, 0),)), "unprintable"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case: str, tmp_path: Path) -> None:
    raw, expected = HOSTILE[case]
    tracemalloc.start()
    error = str(refusal(write(tmp_path, raw)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "model.gguf" in error
    assert expected in error
    assert peak < 5e6, "nothing is allocated by a header's word"


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    tensors = (("a", (4,), 99, 0), ("b", (33,), 2, 8), ("c", (4,), 0, 64))
    error = refusal(write(tmp_path, container((integer("k", 1), integer("k", 1)), tensors)))
    assert len(error.problems) == 5
    assert str(error).startswith(f"{tmp_path / 'model.gguf'} can't be opened (5 problems, nothing was mapped)")


WHOLE = container(
    (
        ARCHITECTURE,
        integer("n", 3),
        entry("words", 9, struct.pack("<IQ", 8, 3) + text("a") + text("bc") + text("")),
        entry("numbers", 9, struct.pack("<IQ2f", 6, 2, 1.0, 2.0)),
        entry("flag", 7, b"\1"),
    ),
    (("a.weight", (32, 2), 8, 0), ("b", (4,), 0, 96)),
    bytes(range(112)),
)


@pytest.mark.parametrize("length", range(0, len(WHOLE), 3))
def test_a_file_cut_anywhere_is_refused(length: int, tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE[:length])
    assert "truncated" in str(refusal(path))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_are_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(WHOLE)
    for place, value in changes:
        raw[place] = value
    survive(write(tmp_path, bytes(raw)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.integers(0, 40), st.integers(0, 40))
def test_any_bytes_after_a_head_are_read_or_refused(tmp_path: Path, raw: bytes, tensors: int, entries: int) -> None:
    survive(write(tmp_path, struct.pack("<4sIQQ", b"GGUF", 3, tensors, entries) + raw))


def survive(path: Path) -> None:
    """Open a file and read all that is in it, or get a CheckpointError."""
    try:
        source = Source.open(path)
    except CheckpointError:
        return
    for tensor in source.tensors.values():
        assert len(tensor.raw()) == tensor.nbytes
    for value in source.metadata.values():
        if isinstance(value, Array):
            with contextlib.suppress(UnicodeDecodeError):  # found out when it is decoded
                assert len(value.decode()) == len(value)


def test_a_file_that_changes_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE)
    source = Source.open(path)
    path.write_bytes(WHOLE[:100])
    with pytest.raises(ValueError, match="has become shorter"):
        source.metadata["numbers"].decode()
    with pytest.raises(CheckpointError, match="changed"):
        source.tensors["b"].raw()


# ---- split models and folders ----


def part(number: int, count: int, total: int = 2, **more: int) -> tuple[bytes, ...]:
    keys = {"split.no": number, "split.count": count, "split.tensors.count": total} | more
    return (ARCHITECTURE, *(integer(key, value) for key, value in keys.items()))


def split(folder: Path, entries: dict[str, tuple[bytes, ...]], **options: Any) -> list[Path]:
    """Write parts with one tensor each, called after their place."""
    return [
        write(folder, container(found, ((options.get("tensor", f"t{index}"), (4,), 0, 0),)), name)
        for index, (name, found) in enumerate(entries.items())
    ]


NAMES = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


@pytest.mark.parametrize("opened", [*NAMES, ""])
def test_any_part_opens_the_whole(opened: str, tmp_path: Path) -> None:
    paths = split(tmp_path, {NAMES[0]: (*part(0, 2), integer("first", 1)), NAMES[1]: part(1, 2)})
    write(tmp_path, b"", "mmproj-m.gguf")
    source = Source.open(tmp_path / opened)
    assert (source.files, set(source.tensors)) == (tuple(paths), {"t0", "t1"})
    assert source.metadata["first"] == 1
    assert source.metadata["split.no"] == 0
    assert source.folder == tmp_path


SPLITS: dict[str, tuple[dict[str, tuple[bytes, ...]], str]] = {
    "a part is missing": ({NAMES[0]: part(0, 2)}, "1 of 2 parts are absent: ['m-00002-of-00002.gguf']"),
    "the same part twice": ({NAMES[0]: part(0, 2), NAMES[1]: part(0, 2)}, "holds part 1 and stands in the place of part 2"),
    "parts in a circle": ({NAMES[0]: part(1, 2), NAMES[1]: part(0, 2)}, "holds part 2 and stands in the place of part 1"),
    "parts of another split": ({NAMES[0]: part(0, 3), NAMES[1]: part(1, 3)}, "is one of 3 parts, and 2 were found"),
    "a part under another name": ({"model.gguf": part(0, 2)}, "is one of 2 parts, and 1 were found; keep the parts' own names"),
    "whole files under parts' names": ({NAMES[0]: (ARCHITECTURE,), NAMES[1]: (ARCHITECTURE,)}, "is one of 1 parts"),
    "fewer tensors than promised": ({NAMES[0]: part(0, 2, 9), NAMES[1]: part(1, 2, 9)}, "hold 2 tensors, [9] are promised"),
    "a number beyond the count": ({"m-00003-of-00002.gguf": part(2, 2)}, "there is no part 3 of 2"),
    "part 0": ({"m-00000-of-00002.gguf": part(0, 2)}, "there is no part 0 of 2"),
    "no parts": ({"m-00001-of-00000.gguf": part(0, 0)}, "there is no part 1 of 0"),
    "99,999 parts": ({"m-00001-of-99999.gguf": part(0, 2)}, "99998 of 99999 parts are absent"),
    "a part number that is text": (
        {NAMES[0]: (ARCHITECTURE, entry("split.no", 8, text("0")), integer("split.count", 2)), NAMES[1]: part(1, 2)},
        "holds part '0'",
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_parts_that_make_no_model_are_refused(case: str, tmp_path: Path) -> None:
    entries, expected = SPLITS[case]
    error = str(refusal(split(tmp_path, entries)[0]))
    assert expected in error
    assert len(error) < 1000


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path, {NAMES[0]: part(0, 2), NAMES[1]: part(1, 2)}, tensor="same")
    assert "is in m-00001-of-00002.gguf as well" in str(refusal(paths[0]))


def test_a_folder_of_several_models_asks_which(tmp_path: Path) -> None:
    for name in ("gemma-Q4_0.gguf", "gemma-Q8_0.gguf"):
        write(tmp_path, container(), name)
    assert "holds 2 GGUF models (gemma-Q4_0.gguf, gemma-Q8_0.gguf): pass the path of one" in str(refusal(tmp_path))
    assert set(Source.open(tmp_path / "gemma-Q8_0.gguf").tensors) == {"a"}
