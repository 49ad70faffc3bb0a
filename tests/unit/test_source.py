"""Opening checkpoints: hostile headers, folders and indexes, and tensors that are views of the mapped file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemcutter.checkpoint.container.lazy_tensor import DTYPES, LazyTensor, MappedFile
from gemcutter.checkpoint.container.source import Source
from gemcutter.errors import CheckpointError
from tests.trained import trained

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's /proc")

INDEX = "model.safetensors.index.json"


def container(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header (an object, or its raw bytes) and this data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Source.open(path)
    return caught.value


def saved(folder: Path, name: str, **tensors: torch.Tensor) -> Path:
    save_file(tensors, folder / name)
    return folder / name


# ---- hostile headers ----

HOSTILE = {
    "empty file": (b"", "truncated"),
    "five bytes": (b"\x02\0\0\0\0", "truncated"),
    "header beyond the file": (struct.pack("<Q", 1000) + b"{}", "header takes 1,000 bytes"),
    "header of 2**63": (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
    "empty header": (container(b""), "not valid JSON"),
    "not UTF-8": (container(b'{"\xff\xfe": 1}'), "UTF-8"),
    "byte order mark": (container(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "cut JSON": (container(b'{"a":'), "not valid JSON"),
    "deep lists": (container(b"[" * 200_000), "nests too deeply"),
    "deep objects": (container(b'{"a":' * 200_000), "nests too deeply"),
    "digit bomb": (container(b'{"a":' + b"9" * 100_000 + b"}"), "not acceptable JSON"),
    "repeated tensor": (container(b'{"a":{},"a":{}}'), "repeats the key ['a']"),
    "repeated field": (container(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "repeats the key ['dtype']"),
    "a list": (container([]), "not a JSON object"),
    "a string": (container("x" * 1000), "not a JSON object"),
    "metadata not an object": (container({"__metadata__": []}), "__metadata__ is not an object of strings"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
    "entry not an object": (container({"a": 3}), "dtype None is unknown"),
    "unknown dtype": (container({"a": entry(dtype="F128")}, bytes(8)), "dtype 'F128' is unknown"),
    "dtype a list": (container({"a": entry(dtype=["F32"])}, bytes(8)), "dtype ['F32'] is unknown"),
    "shape missing": (container({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "shape None"),
    "shape a number": (container({"a": entry(shape=2)}, bytes(8)), "shape 2 is not a list"),
    "shape negative": (container({"a": entry(shape=[-2, -1])}, bytes(8)), "shape [-2, -1] is not a list"),
    "shape of floats": (container({"a": entry(shape=[2.0])}, bytes(8)), "shape [2.0] is not a list"),
    "shape of booleans": (container({"a": entry(shape=[True, 2])}, bytes(8)), "shape [True, 2] is not a list"),
    "shape of strings": (container({"a": entry(shape=["2"])}, bytes(8)), "shape ['2'] is not a list"),
    "shape NaN": (container({"a": entry(shape=[float("nan")])}, bytes(8)), "shape [nan] is not a list"),
    "shape infinite": (container({"a": entry(shape=[float("inf")])}, bytes(8)), "shape [inf] is not a list"),
    "shape overflows": (container({"a": entry(shape=[2**32, 2**32])}, bytes(8)), "more than 2**63 bytes"),
    "shape overflows to zero": (container({"a": entry(shape=[0, 2**62, 4], offsets=[0, 0])}), "more than 2**63 bytes"),
    "shape of giants": (container({"a": entry(shape=[10**4000] * 500)}, bytes(8)), "more than 2**63 bytes"),
    "offsets missing": (container({"a": {"dtype": "F32", "shape": [2]}}), "data_offsets None"),
    "one offset": (container({"a": entry(offsets=[0])}, bytes(8)), "data_offsets [0]"),
    "three offsets": (container({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "data_offsets [0, 4, 8]"),
    "float offsets": (container({"a": entry(offsets=[0, 8.0])}, bytes(8)), "data_offsets [0, 8.0]"),
    "boolean offsets": (container({"a": entry("U8", [1], [False, True])}, bytes(1)), "data_offsets [False, True]"),
    "negative offsets": (container({"a": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets [-8, 0]"),
    "reversed offsets": (container({"a": entry(offsets=[8, 0])}, bytes(8)), "data_offsets [8, 0]"),
    "giant offsets": (container({"a": entry(offsets=[10**30, 10**30 + 8])}, bytes(8)), "data_offsets"),
    "wrong size": (container({"a": entry(shape=[3])}, bytes(8)), "span 8 bytes, dtype and shape take 12"),
    "truncated data": (container({"a": entry()}, bytes(7)), "1 of 1 tensors are cut: ['a']"),
    "data beyond the file": (container({"a": entry(offsets=[2**60, 2**60 + 8])}, bytes(8)), "gaps are not allowed"),
    "same bytes twice": (container({"a": entry(), "b": entry()}, bytes(8)), "b: overlaps a"),
    "overlap": (container({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "b: overlaps a"),
    "empty tensor inside another": (container({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)), "overlaps a"),
    "gap": (container({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "starts 4 bytes after"),
    "trailing bytes": (container({"a": entry()}, bytes(9)), "1 bytes after the last tensor"),
    "terminal escape in a name": (container({"\x1b[31m": entry()}, bytes(8)), "unprintable"),
    "lone surrogate in a name": (
        container(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "unprintable",
    ),
}


@pytest.mark.parametrize(("content", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_header_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    error = refusal(file)
    assert any(expected in problem for problem in error.problems), error.problems
    assert all(problem.startswith("bad.safetensors") for problem in error.problems)
    assert len(str(error)) < 5000
    assert all(line.isprintable() for line in str(error).splitlines())


def test_header_length_is_judged_before_anything_is_allocated(tmp_path: Path) -> None:
    file = tmp_path / "sparse.safetensors"
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", 100_000_001))
        out.truncate(300_000_000)
    tracemalloc.start()
    try:
        error = refusal(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "header would take 100,000,001 bytes" in str(error)
    assert peak < 1_000_000


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    bad = {"x": entry(dtype="F128", shape=[-1]), "y": entry(shape=["2"], offsets=[3])}
    (tmp_path / "a.safetensors").write_bytes(container(bad, bytes(8)))
    (tmp_path / "b.safetensors").write_bytes(b"")
    problems = refusal(tmp_path).problems
    assert [problem.split(": ")[0] for problem in problems] == [
        "a.safetensors:x",
        "a.safetensors:y",
        "a.safetensors:y",
        "b.safetensors",
    ]


def test_truncated_download_is_one_problem(tmp_path: Path) -> None:
    file = saved(tmp_path, "model.safetensors", **{f"t{i}": torch.zeros(1000) for i in range(50)})
    os.truncate(file, file.stat().st_size // 2)
    (problem,) = refusal(tmp_path).problems
    assert "is truncated" in problem
    assert "of 50 tensors are cut" in problem


def small_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "alpha": entry("BF16", [2, 3], [0, 12]),
        "beta": entry("F32", [], [12, 16]),
        "none": entry("I64", [0, 4], [16, 16]),
    }
    return container(header, bytes(range(16)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(small_file()) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.integers(0, 40).map(lambda cut: len(small_file()) - max(0, cut - 20)),
)
def test_mutated_file_opens_or_is_refused(tmp_path: Path, edits: list[tuple[int, int]], length: int) -> None:
    content = bytearray(small_file())
    for place, value in edits:
        content[place] = value
    file = tmp_path / "fuzz.safetensors"
    file.write_bytes(content[:length])
    tracemalloc.start()
    try:
        source = Source.open(file)
        read = {name: tensor.torch().clone() for name, tensor in source.tensors.items()}
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000
    with safe_open(str(file), "pt") as oracle:  # we never take what the reference library refuses, nor read it differently
        assert set(oracle.keys()) == set(read)
        for name, tensor in read.items():
            assert oracle.get_tensor(name).reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4)
        ),
        max_leaves=20,
    )
)
def test_any_json_opens_or_is_refused(tmp_path: Path, header: Any) -> None:
    file = tmp_path / "fuzz.safetensors"
    file.write_bytes(container(header, bytes(8)))
    try:
        source = Source.open(file)
    except CheckpointError:
        return
    assert source.total_bytes == 8 or not source.tensors


# ---- speed and laziness ----


def big_header(num_tensors: int, nbytes: int) -> bytes:
    names = (f"model.language_model.layers.{i // 20}.self_attn.projection_{i % 20}.weight" for i in range(num_tensors))
    return container({name: entry("U8", [nbytes], [i * nbytes, (i + 1) * nbytes]) for i, name in enumerate(names)})


def test_large_checkpoint_opens_from_its_headers_alone(tmp_path: Path) -> None:
    """Open 2,000 tensors of 30 MB each, a sparse file of 60 GB."""
    file = tmp_path / "model.safetensors"
    header = big_header(2000, 30_000_000)
    file.write_bytes(header)
    try:
        os.truncate(file, len(header) + 60_000_000_000)
    except OSError:
        pytest.skip("the file system has no sparse files of 60 GB")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        source = Source.open(tmp_path)
        times.append(time.perf_counter() - start)
    assert source.total_bytes == 60_000_000_000
    assert min(times) < 0.1
    assert source.tensors["model.language_model.layers.99.self_attn.projection_19.weight"].torch()[-1] == 0


def test_listing_a_checkpoint_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    saved(tmp_path, "model.safetensors", a=torch.zeros(2))
    code = (
        "import sys; from pathlib import Path; from gemcutter.checkpoint.container import source\n"
        "from gemcutter.checkpoint.write.write_safetensors import write_safetensors\n"
        "from gemcutter.checkpoint.remote import hub\n"
        "assert source.Source.open(Path(sys.argv[1])).total_bytes == 8\n"
        "found = {'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2], timeout=60)


# ---- tensors ----


def mapped_ranges(file: Path) -> list[tuple[int, int, str, int]]:
    """Return start, end, permissions and resident kB of every mapping of `file` in this process."""
    ranges: list[tuple[int, int, str, int]] = []
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            is_ours = line.endswith(str(file))
            if is_ours:
                start, end = (int(part, 16) for part in first.split("-"))
                ranges.append((start, end, line.split()[1], 0))
        elif first == "Rss:" and is_ours:
            ranges[-1] = (*ranges[-1][:3], int(line.split()[1]))
    return ranges


def test_every_dtype_reads_as_the_reference_library_does(tmp_path: Path) -> None:
    tensors = {}
    for spelling, (itemsize, torch_name) in DTYPES.items():
        raw = torch.arange(3 * 4 * itemsize, dtype=torch.uint8)
        tensors[spelling] = (raw % 2 if spelling == "BOOL" else raw).view(getattr(torch, torch_name)).view(3, 4)
    tensors.pop("F8_E8M0")  # the library does not write it; the next test covers reading it
    file = saved(tmp_path, "model.safetensors", **tensors)
    source = Source.open(file)
    oracle = load_file(file)
    assert source.tensors.keys() == oracle.keys() == tensors.keys()
    for name, tensor in source.tensors.items():
        read = tensor.torch()
        assert (tensor.dtype, read.dtype, tensor.shape) == (name, oracle[name].dtype, tuple(oracle[name].shape))
        assert read.view(torch.uint8).equal(oracle[name].view(torch.uint8))


def test_misaligned_scalar_and_empty_tensors_read(tmp_path: Path) -> None:
    header = {
        "odd": entry("U8", [3], [0, 3]),
        "f32": entry("F32", [2], [3, 11]),
        "scale": entry("F8_E8M0", [2], [11, 13]),
        "scalar": entry("F64", [], [13, 21]),
        "empty": entry("BF16", [0, 7], [21, 21]),
    }
    file = tmp_path / "odd.safetensors"
    file.write_bytes(
        container(header, bytes([1, 2, 3]) + struct.pack("<2f", 1.5, -2.5) + bytes([127, 128]) + struct.pack("<d", 0.1))
    )
    tensors = {name: tensor.torch() for name, tensor in Source.open(file).tensors.items()}
    assert tensors["odd"].tolist() == [1, 2, 3]
    assert tensors["f32"].tolist() == [1.5, -2.5]
    assert tensors["scale"].float().tolist() == [1.0, 2.0]
    assert (tensors["scalar"].shape, tensors["scalar"].item()) == (torch.Size([]), 0.1)
    assert (tensors["empty"].shape, tensors["empty"].dtype) == (torch.Size([0, 7]), torch.bfloat16)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())


@needs_proc
def test_tensors_are_views_of_one_read_only_mapping(tmp_path: Path) -> None:
    values = torch.arange(1 << 20, dtype=torch.float32)
    file = saved(tmp_path, "model.safetensors", a=values, b=values + 1)
    source = Source.open(tmp_path)
    assert mapped_ranges(file) == []
    views = {name: tensor.torch() for name, tensor in source.tensors.items()}
    ((start, end, permissions, resident_kb),) = mapped_ranges(file)
    assert permissions == "r--s"
    assert resident_kb < 256  # 8 MB are mapped, next to none read
    for name, view in views.items():
        assert view.data_ptr() == start + source.tensors[name].offset < end
        assert view.untyped_storage().nbytes() == source.tensors[name].nbytes
    del source
    assert views["b"].equal(values + 1)  # a view keeps the mapping alive


@needs_proc
def test_release_drops_the_pages_and_keeps_the_view(tmp_path: Path) -> None:
    values = torch.arange(4 << 20, dtype=torch.float32)
    file = saved(tmp_path, "model.safetensors", a=values)
    tensor = Source.open(file).tensors["a"]
    tensor.release()  # nothing is mapped yet, and nothing is mapped for it
    assert mapped_ranges(file) == []
    view = tensor.torch()
    assert view.equal(values)
    assert mapped_ranges(file)[0][3] > 16_000
    tensor.release()
    assert mapped_ranges(file)[0][3] < 256
    assert view.equal(values)


def test_raw_is_the_stored_bytes_and_unknown_dtypes_offer_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "blocks.bin"
    file.write_bytes(bytes(range(100)))
    tensor = LazyTensor("blk.0.attn_q.weight", "Q4_0", (1, 32), 18, 41, MappedFile(file))
    assert tensor.raw().tolist() == list(range(41, 59))
    assert (tensor.file, tensor.origin) == (file, "blocks.bin:blk.0.attn_q.weight")
    with pytest.raises(CheckpointError, match=r"blocks\.bin:blk\.0\.attn_q\.weight is stored as Q4_0"):
        tensor.torch()


def test_reading_warns_of_nothing_and_leaves_the_warning_filters(tmp_path: Path) -> None:
    saved(tmp_path, "model.safetensors", a=torch.zeros(4))
    code = (  # torch warns once in a process, so this takes a fresh one
        "import sys, warnings; from pathlib import Path; from gemcutter.checkpoint.container.source import Source; import torch\n"
        "warnings.simplefilter('error'); before = list(warnings.filters)\n"
        "assert Source.open(Path(sys.argv[1])).tensors['a'].torch().tolist() == [0, 0, 0, 0]\n"
        "assert warnings.filters == before"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2], timeout=60)


def test_a_file_that_shrank_is_refused_and_not_mapped(tmp_path: Path) -> None:
    file = saved(tmp_path, "model.safetensors", a=torch.zeros(4000))
    tensor = Source.open(file).tensors["a"]
    os.truncate(file, 100)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        tensor.torch()
    file.unlink()
    with pytest.raises(CheckpointError, match="can't be mapped: No such file"):
        tensor.torch()


# ---- folders ----


def indexed(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def test_index_decides_which_files_are_read(tmp_path: Path) -> None:
    saved(tmp_path, "s1.safetensors", a=torch.ones(1))
    saved(tmp_path, "s2.safetensors", b=torch.ones(2))
    (tmp_path / "consolidated.safetensors").write_bytes(b"stray")
    source = Source.open(indexed(tmp_path, {"b": "s2.safetensors", "a": "s1.safetensors"}))
    assert {name: tensor.file.name for name, tensor in source.tensors.items()} == {"a": "s1.safetensors", "b": "s2.safetensors"}
    assert (set(source.files), source.total_bytes) == ({tmp_path / "s1.safetensors", tmp_path / "s2.safetensors"}, 12)
    assert (source.path, source.folder) == (tmp_path, tmp_path)


def test_without_index_model_safetensors_comes_before_other_files(tmp_path: Path) -> None:
    saved(tmp_path, "another.safetensors", a=torch.ones(1))
    saved(tmp_path, "other.safetensors", b=torch.ones(1))
    (tmp_path / ".hidden.safetensors").write_bytes(b"junk")
    assert set(Source.open(tmp_path).tensors) == {"a", "b"}
    save_file({"m": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Source.open(tmp_path)
    assert (set(source.tensors), source.metadata) == ({"m"}, {"format": "pt"})


def test_one_file_is_a_checkpoint_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma4"}')
    source = Source.open(saved(tmp_path, "part.safetensors", a=torch.ones(1)))
    assert (source.files, source.folder) == ((tmp_path / "part.safetensors",), tmp_path)
    assert source.read_json("config.json") == {"model_type": "gemma4"}


def test_linked_files_open_as_in_a_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob = saved(tmp_path, "blob", a=torch.ones(1))
    (snapshot / "s.safetensors").symlink_to(blob)
    assert set(Source.open(indexed(snapshot, {"a": "s.safetensors"})).tensors) == {"a"}
    blob.unlink()
    assert "shard 's.safetensors' is absent" in str(refusal(snapshot))
    (snapshot / INDEX).unlink()
    assert "link to nothing" in str(refusal(snapshot))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "..\\x", "C:x", "x\0", "x\x1b[2J"]
)
def test_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    saved(tmp_path, "x.safetensors", a=torch.ones(1))
    saved(folder / "sub", "x.safetensors", a=torch.ones(1))
    assert "is not the name of a file in the folder" in str(refusal(indexed(folder, {"a": shard})))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    saved(tmp_path, "s1.safetensors", a=torch.ones(1), twin=torch.ones(1))
    saved(tmp_path, "s2.safetensors", b=torch.ones(1), twin=torch.ones(1))
    weight_map = {
        "a": "s1.safetensors",
        "c": "s1.safetensors",
        "d": "s1.safetensors",
        "b": "s2.safetensors",
        "e": "s3.safetensors",
    }
    problems = refusal(indexed(tmp_path, weight_map)).problems
    assert problems == (
        f"{INDEX}: shard 's3.safetensors' is absent; download it",
        "s2.safetensors:twin: is in s1.safetensors as well; a tensor belongs in one file",
        f"s1.safetensors: lacks 2 tensors that {INDEX} places in it: ['c', 'd']",
    )


def test_damaged_shard_is_not_blamed_for_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "s1.safetensors").write_bytes(container({"a": entry(dtype="F128"), "b": entry()}, bytes(8)))
    (problem,) = refusal(indexed(tmp_path, {"a": "s1.safetensors", "b": "s1.safetensors"})).problems
    assert problem.startswith("s1.safetensors:a: dtype 'F128' is unknown")


def test_stale_index_beside_a_whole_file_says_so(tmp_path: Path) -> None:
    saved(tmp_path, "model.safetensors", a=torch.ones(1))
    assert "remove the index to read model.safetensors alone" in str(refusal(indexed(tmp_path, {"a": "gone.safetensors"})))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": {"b": 1}}}',
        b'{"weight_map": {"a": "s", "a": "t"}}',
    ],
)
def test_malformed_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    (problem,) = refusal(tmp_path).problems
    assert problem.startswith(f"{INDEX}: ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "can run code"),
        ("weights.npz", "NumPy archive"),
        ("config.json", "only config.json"),
        (None, "it is empty"),
    ],
)
def test_folder_without_safetensors_says_what_it_holds(tmp_path: Path, name: str | None, expected: str) -> None:
    if name:
        (tmp_path / name).write_bytes(b"{}")
    error = str(refusal(tmp_path))
    assert "holds no .safetensors file" in error
    assert expected in error


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in str(refusal(tmp_path / "absent"))
    assert "does not exist" in str(refusal(tmp_path / ("x" * 5000)))
    (tmp_path / "model.npz").write_bytes(b"PK")
    assert "is a NumPy archive" in str(refusal(tmp_path / "model.npz"))
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "neither a file nor a folder" in str(refusal(tmp_path / "pipe.safetensors"))
    assert "is not a file" in str(refusal(tmp_path))


def test_side_files(tmp_path: Path) -> None:
    source = Source.open(saved(tmp_path, "model.safetensors", a=torch.ones(1)))
    assert source.read_json("config.json") is None
    for content, expected in [
        ('{\n "a": 1,\n "b" 2\n}', "not valid JSON: Expecting ':' delimiter at line 3"),
        ("[1]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "repeats the key ['a']"),
        ("[" * 100_000, "nests too deeply"),
    ]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError) as caught:
            source.read_json("config.json")
        assert str(tmp_path / "config.json") in str(caught.value)
        assert expected in str(caught.value)
    (tmp_path / "config.json").write_bytes(b'{\n"a": "\xff"}')
    with pytest.raises(CheckpointError, match="not valid UTF-8 at line 2"):
        source.read_json("config.json")


# ---- real files ----


@pytest.mark.parametrize("model", ["tiny-e", "tiny-e-mlx-4bit", "tiny-e-mlx-mxfp4"])
def test_model_reads_bit_equal_to_the_reference_library(model: str) -> None:
    source = Source.open(trained(model))
    oracle = load_file(trained(model) / "model.safetensors")
    assert source.tensors.keys() == oracle.keys()
    assert all(tensor.torch().equal(oracle[name]) for name, tensor in source.tensors.items())
    config = source.read_json("config.json")
    assert config is not None
    assert config["model_type"].startswith("gemma4")


def test_sharded_release_reads_bit_equal_to_the_reference_library() -> None:
    folder = trained("tiny-e-release")
    source = Source.open(folder)
    oracle = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert len(source.files) == 3
    assert source.tensors.keys() == oracle.keys()
    assert all(tensor.torch().equal(oracle[name]) for name, tensor in source.tensors.items())
    index = source.read_json(INDEX)
    assert index is not None
    assert source.total_bytes == index["metadata"]["total_size"]
