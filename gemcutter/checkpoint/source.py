"""A checkpoint's files as named, lazy, memory-mapped tensors.

Owns the safetensors container: which files make up a checkpoint, what their headers promise, and how a tensor's bytes reach
torch without a copy. Every header is taken for hostile, and all problems of all files are reported at once, before anything
is mapped. Refuses to know tensor names, models and quantization: those live in `checkpoint/formats/`.
torch is imported only when a tensor is asked for, so headers can be listed in milliseconds. Read next: `write.py`.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemcutter.checkpoint.small_file import SMALL_BYTES, insist_on_file, parse_object, read_small
from gemcutter.checkpoint.small_file import shown as shown  # part of this module's vocabulary for messages
from gemcutter.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
METADATA_KEY = "__metadata__"

# safetensors spelling -> (bytes of one item, torch's name for it). Types below one byte are not part of any Gemma 4 release.
DTYPES = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "F32": (4, "float32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
}

_MAX_BYTES = 2**63 - 1  # torch and the kernel address with signed 64-bit integers

_FOREIGN_FILES = {
    ".npz": "a NumPy archive, as early MLX conversions wrote",
    ".bin": "a PyTorch pickle, which can run code when it is read",
    ".pth": "a PyTorch pickle, which can run code when it is read",
    ".pt": "a PyTorch pickle, which can run code when it is read",
}

# warnings.catch_warnings swaps process-wide state, so two loader threads must not do it at the same time.
_warnings_lock = threading.Lock()


class StoredFile(Protocol):
    """What a checkpoint asks of a file that holds tensors, wherever it lies. Headers are read; tensors are mapped."""

    @property
    def path(self) -> Path:
        """Name the file for messages."""
        ...

    @property
    def size_bytes(self) -> int:
        """Give the size of the whole file."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer at the file's end. Raises OSError or ValueError."""
        ...

    def mapping(self) -> mmap.mmap:
        """Return the read-only mapping of the whole file. Raises CheckpointError."""
        ...

    def release(self, offset: int, nbytes: int) -> None:
        """Tell the kernel that these bytes need not stay in memory."""
        ...

    def expect_scattered_reads(self, offset: int, nbytes: int) -> None:
        """Tell the kernel that these bytes will be read here and there."""
        ...


class RemoteFolder(Protocol):
    """What a checkpoint asks of a folder that is not on this machine."""

    def read(self, name: str) -> bytes | None:
        """Return a small file's bytes, None if there is no such file. Raises CheckpointError."""
        ...

    def size_of(self, name: str) -> int | None:
        """Return a file's size, None if there is no such file. Raises CheckpointError."""
        ...


class MappedFile:
    """Map one file read-only on first use, and share that mapping among all its tensors.

    The mapping lives as long as any view of it. Raises OSError where `path` can't be examined.
    """

    __slots__ = ("_lock", "_mapping", "_stamp", "path", "size_bytes")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = _stamp(os.stat(path))
        self.size_bytes = self._stamp[0]  # by the time of the stat; the mapping insists that it still holds
        self._mapping: mmap.mmap | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer at the file's end. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def mapping(self) -> mmap.mmap:
        """Return the read-only mapping of the whole file.

        Raises CheckpointError if the file has changed since its header was read, or can't be mapped.
        """
        with self._lock:
            if self._mapping is None:
                self._mapping = self._open()
            return self._mapping

    def release(self, offset: int, nbytes: int) -> None:
        """Tell the kernel that the pages wholly inside this byte range need not stay in memory; views of them stay valid."""
        self._advise("MADV_DONTNEED", offset, nbytes)

    def expect_scattered_reads(self, offset: int, nbytes: int) -> None:
        """Tell the kernel that this byte range will be read here and there, so that it reads no more than is asked for."""
        self._advise("MADV_RANDOM", offset, nbytes)

    def _advise(self, advice: str, offset: int, nbytes: int) -> None:
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._mapping is not None and start < end and hasattr(mmap, advice):
            self._mapping.madvise(getattr(mmap, advice), start, end - start)

    def _open(self) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                # A file that shrank would kill the process at the first touch of a page beyond its end.
                if _stamp(os.fstat(file.fileno())) != self._stamp:
                    raise CheckpointError(f"{self.path} changed while it was being read; open the checkpoint again")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} can't be mapped: {error.strerror}; check its permissions and free memory"
            ) from error


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """Describe one stored tensor, and read it when asked.

    `dtype` has the safetensors spelling; containers with block formats put their own name there and offer only `raw()`.
    `offset` is absolute in the file; `nbytes` is the stored size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    mapped: StoredFile = field(repr=False)

    @property
    def file(self) -> Path:
        """Return the file that holds the tensor."""
        return self.mapped.path

    @property
    def origin(self) -> str:
        """Return "file.safetensors:name", for messages."""
        return f"{self.file.name}:{self.name}"

    def torch(self) -> Tensor:
        """Return the tensor, `shape` and `dtype` as stored: a view of the mapped file, copied only if the file misaligns it.

        Never write to the result: its pages are read-only and the process would die. Clone it first.
        Raises CheckpointError for a dtype without a torch counterpart, or a file that changed or can't be mapped.
        """
        import torch

        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.origin} is stored as {self.dtype}, which torch has no dtype for; unpack its raw() bytes"
            )
        itemsize, torch_name = DTYPES[self.dtype]
        dtype: torch.dtype = getattr(torch, torch_name)
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        flat = self.raw()
        if self.offset % itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(self.shape)

    def raw(self) -> Tensor:
        """Return the stored bytes as uint8 `[nbytes]`, a read-only view of the mapped file.

        Raises CheckpointError if the file has changed since its header was read, or can't be mapped.
        """
        import torch

        if self.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        mapping = self.mapped.mapping()
        with _warnings_lock, warnings.catch_warnings():
            # The one thing torch warns of here is the point: the mapping is read-only.
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            return torch.frombuffer(mapping, dtype=torch.uint8, count=self.nbytes, offset=self.offset)

    def release(self) -> None:
        """Let the kernel drop the tensor's pages, once it has been copied elsewhere. Views stay valid and are read again."""
        self.mapped.release(self.offset, self.nbytes)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Source:
    """Hold an opened checkpoint: its files, the tensors they promise, and the JSON files beside them."""

    path: Path
    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any]
    remote: RemoteFolder | None = None  # where `folder` is only a name, and its files are fetched

    @classmethod
    def open(cls, path: Path) -> Source:
        """Read the headers of the checkpoint at `path`: a folder, or one .safetensors or GGUF file (or any part of a split one).

        In a folder, the index names the files to read; without one it is `model.safetensors`, or else every .safetensors file,
        or else the one GGUF model.
        Raises CheckpointError with every problem of every file, before anything is mapped.
        """
        problems: list[str] = []
        source = cls.survey(path, problems)
        source.insist_on_none(problems)
        return source

    @classmethod
    def survey(cls, path: Path, problems: list[str]) -> Source:
        """Read the headers as `open` does, but note every problem and go on with what is sound.

        Raises CheckpointError only where there is nothing to read.
        """
        files, weight_map = _find_files(path, problems)
        openers = {file: partial(_map_file, file) for file in files}
        return gather(path, path if os.path.isdir(path) else path.parent, openers, weight_map, problems)

    def insist_on_none(self, problems: list[str]) -> None:
        """Raise CheckpointError if any problem was noted."""
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise CheckpointError(
                f"{self.path} can't be opened ({count}, nothing was mapped); download or convert it again", problems
            )

    @property
    def total_bytes(self) -> int:
        """Return the stored size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in the file `name` beside the tensors, or None where there is no such file.

        Raises CheckpointError, naming file and line, for a file that can't be read or holds anything but a JSON object.
        """
        try:
            raw = self.read_beside(name)
            return None if raw is None else parse_object(raw, "the file")
        except ValueError as error:
            raise CheckpointError(f"{self.folder / name}: {error}; repair it or download it again") from error

    def read_beside(self, name: str) -> bytes | None:
        """Return the bytes of the small file `name` beside the tensors, or None where there is no such file.

        Raises ValueError, saying what is wrong, for a file that can't be read or is not small; CheckpointError from a network.
        """
        if self.remote is not None:
            return self.remote.read(name)
        return read_small(self.folder / name) if os.path.lexists(self.folder / name) else None

    def size_beside(self, name: str) -> int | None:
        """Return the bytes that the file `name` beside the tensors takes, or None where there is no such file."""
        if self.remote is not None:
            return self.remote.size_of(name)
        return os.path.getsize(self.folder / name) if os.path.isfile(self.folder / name) else None


def gather(
    path: Path,
    folder: Path,
    openers: Mapping[Path, Callable[[], StoredFile]],
    weight_map: Mapping[str, str],
    problems: list[str],
    remote: RemoteFolder | None = None,
) -> Source:
    """Make a source of all files that `openers` open, noting the problems of each, and what `weight_map` promises in vain.

    An opener raises OSError or ValueError for a file that can't be read.
    """
    from gemcutter.checkpoint import gguf_file  # which is written in this module's words

    tensors: dict[str, LazyTensor] = {}
    parts: list[tuple[Path, dict[str, Any]]] = []
    held: dict[str, set[str]] = {}
    for file, opener in openers.items():
        num_known = len(problems)
        shard_tensors, shard_metadata = _read_shard(file, opener, problems)
        if len(problems) == num_known:  # what a damaged shard lacks is known only once it is whole
            held[file.name] = {tensor.name for tensor in shard_tensors}
        parts.append((file, shard_metadata))
        for tensor in shard_tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                problems.append(f"{tensor.origin}: is in {first.file.name} as well; a tensor belongs in one file")
    problems += _missing_from_shards(weight_map, held)
    if not problems:
        problems += gguf_file.check_parts(parts, len(tensors))
    metadata = {key: value for _, found in reversed(parts) for key, value in found.items()}
    return Source(path, folder, tuple(openers), tensors, metadata, remote)


def tensor_nbytes(dtype: object, shape: object) -> int:
    """Return the bytes that a tensor of this dtype (safetensors spelling) and shape takes.

    Raises ValueError, saying what is wrong, for an unknown dtype, a malformed shape or a size beyond 63 bits.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {shown(dtype)} is unknown; known are {', '.join(DTYPES)}")
    # bool is an int to isinstance, and True is no size.
    if not isinstance(shape, list | tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"shape {shown(shape)} is not a list of non-negative integers")
    extent = DTYPES[dtype][0]
    for size in shape:
        extent *= max(size, 1)  # a zero counts as one: torch multiplies the other sizes into strides all the same
        if extent > _MAX_BYTES:
            raise ValueError(f"shape {shown(shape)} of {dtype} takes more than 2**63 bytes")
    return 0 if 0 in shape else extent


def name_problem(name: str) -> str | None:
    """Say what is wrong with a tensor name, or return None."""
    if name == METADATA_KEY:
        return f"tensor name {name} is reserved"
    # Unprintable covers terminal escapes and lone surrogates, which no message or file could carry.
    return None if name.isprintable() else f"tensor name {shown(name)} holds unprintable characters"


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


# ---- which files ----


def _find_files(path: Path, problems: list[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Return the files to read, and the index's map from tensor to file name (empty where there is no index)."""
    from gemcutter.checkpoint import gguf_file

    if os.path.isfile(path):
        if path.suffix in _FOREIGN_FILES:
            raise CheckpointError(f"{path} is {_FOREIGN_FILES[path.suffix]}; pass a .safetensors or .gguf file")
        return gguf_file.parts_of(path, problems), {}
    if not os.path.isdir(path):
        state = "is neither a file nor a folder" if os.path.lexists(path) else "does not exist"
        raise CheckpointError(f"{path} {state}; pass a folder that holds .safetensors or .gguf files, or one such file")
    if os.path.lexists(path / INDEX_NAME):
        return _indexed_files(path, problems)
    if os.path.lexists(path / SINGLE_NAME):
        return (path / SINGLE_NAME,), {}
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{path} can't be listed: {error.strerror}; check its permissions") from error
    files = tuple(path / name for name in names if name.endswith(".safetensors")) or gguf_file.choose(path, names, problems)
    if not files:
        raise CheckpointError(_nothing_to_read(path, names))
    return files, {}


def _nothing_to_read(folder: Path, names: list[str]) -> str:
    for name in names:
        kind = _FOREIGN_FILES.get(Path(name).suffix)
        if kind:
            return f"{folder} holds no .safetensors file, only {name}: {kind}; use the safetensors release, or convert it"
    found = f"only {', '.join(names[:4])}" if names else "it is empty"
    return f"{folder} holds no .safetensors file ({found}); pass the folder with the weights, or finish its download"


def _indexed_files(folder: Path, problems: list[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Return the shards that the index names and its weight map, noting what is wrong with either."""
    try:
        raw = read_small(folder / INDEX_NAME)
    except ValueError as error:
        problems.append(f"{INDEX_NAME}: {error}")
        return (), {}
    weight_map = parse_index(raw, problems)
    shards: list[Path] = []
    for shard in dict.fromkeys(weight_map.values()):
        if not os.path.isfile(folder / shard):
            remedy = f"remove the index to read {SINGLE_NAME} alone" if os.path.isfile(folder / SINGLE_NAME) else "download it"
            problems.append(f"{INDEX_NAME}: shard {shown(shard)} is absent; {remedy}")
        else:
            shards.append(folder / shard)
    return tuple(shards), weight_map


def parse_index(raw: bytes, problems: list[str]) -> dict[str, str]:
    """Return the map from tensor to file name in an index's bytes, noting what is wrong; empty if it can't be used."""
    try:
        weight_map = parse_object(raw, "the file").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()) or not weight_map:
            raise ValueError("holds no weight_map, an object from tensor names to file names")
    except ValueError as error:
        problems.append(f"{INDEX_NAME}: {error}")
        return {}
    # Judge the name and not the resolved path: a hub cache rightly links its files from elsewhere.
    strange = {
        shard
        for shard in weight_map.values()
        if shard in ("", ".", "..") or not shard.isprintable() or any(mark in shard for mark in "/\\:")
    }
    problems += [f"{INDEX_NAME}: shard {shown(shard)} is not the name of a file in the folder" for shard in sorted(strange)]
    return {name: shard for name, shard in weight_map.items() if shard not in strange}


def _missing_from_shards(weight_map: Mapping[str, str], held: dict[str, set[str]]) -> list[str]:
    """Report, a line per shard, the tensors that the index places in it and that it lacks. `held` lists the sound shards."""
    missing: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if shard in held and name not in held[shard]:
            missing.setdefault(shard, []).append(name)
    return [
        f"{shard}: lacks {len(names)} tensor{'s' if len(names) > 1 else ''} that {INDEX_NAME} places in it: {shown(names)}"
        for shard, names in missing.items()
    ]


# ---- what a header promises ----


def _map_file(file: Path) -> MappedFile:
    insist_on_file(file)
    return MappedFile(file)


def _read_shard(file: Path, opener: Callable[[], StoredFile], problems: list[str]) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Return one file's tensors and metadata as far as they are sound, noting every problem."""
    from gemcutter.checkpoint import gguf_file

    try:
        mapped = opener()
        prefix = mapped.read(0, 8)
        if prefix.startswith(gguf_file.MAGIC) or file.suffix == gguf_file.SUFFIX:
            return gguf_file.read_shard(mapped, problems)
        header, data_start = _read_header(mapped, prefix)
    except OSError as error:
        problems.append(f"{file.name}: can't be read: {error.strerror}")
        return [], {}
    except ValueError as error:
        problems.append(f"{file.name}: {error}")
        return [], {}
    num_known = len(problems)
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(f"{file.name}: {METADATA_KEY} is not an object of strings")
        metadata = {}
    found = [_read_entry(name, entry, mapped, data_start, problems) for name, entry in header.items()]
    tensors = [tensor for tensor in found if tensor is not None]
    problems += _check_spans(tensors, mapped, data_start, is_complete=len(problems) == num_known)
    return tensors, metadata


def _read_header(mapped: StoredFile, prefix: bytes) -> tuple[dict[str, Any], int]:
    """Return the header object and the offset at which the data starts. Raises ValueError, or OSError."""
    if len(prefix) < 8:
        raise ValueError(f"is truncated: {len(prefix)} bytes, and the length of the header alone takes 8")
    length = int.from_bytes(prefix, "little")
    # Judge the number before anything of that size is allocated.
    if length > SMALL_BYTES:
        raise ValueError(f"is not a safetensors file: its header would take {length:,} bytes, above {SMALL_BYTES:,}")
    if 8 + length > mapped.size_bytes:
        raise ValueError(f"is truncated: its header takes {length:,} bytes, the file has {mapped.size_bytes:,}")
    return parse_object(mapped.read(8, length), "the header"), 8 + length


def _read_entry(name: str, entry: object, mapped: StoredFile, data_start: int, problems: list[str]) -> LazyTensor | None:
    """Return the tensor that one entry of the header describes, or None with its problems noted."""
    faults = [fault] if (fault := name_problem(name)) else []
    fields = entry if isinstance(entry, dict) else {}
    nbytes, span = None, _span(fields.get("data_offsets"))
    try:
        nbytes = tensor_nbytes(fields.get("dtype"), fields.get("shape"))
    except ValueError as error:
        faults.append(str(error))
    if span is None:
        faults.append(f"data_offsets {shown(fields.get('data_offsets'))} are not two ascending offsets")
    elif nbytes is not None and span[1] - span[0] != nbytes:
        faults.append(f"data_offsets span {span[1] - span[0]:,} bytes, dtype and shape take {nbytes:,}")
    if faults or nbytes is None or span is None:
        problems += [f"{mapped.path.name}:{shown(name)[1:-1]}: {fault}" for fault in faults]
        return None
    return LazyTensor(name, fields["dtype"], tuple(fields["shape"]), nbytes, data_start + span[0], mapped)


def _span(offsets: object) -> tuple[int, int] | None:
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        return None
    return (offsets[0], offsets[1]) if 0 <= offsets[0] <= offsets[1] <= _MAX_BYTES else None


def _check_spans(tensors: list[LazyTensor], mapped: StoredFile, data_start: int, *, is_complete: bool) -> list[str]:
    """Report tensors that overlap or leave the file, and bytes that no tensor owns (judged only if `is_complete`)."""
    file, size = mapped.path.name, mapped.size_bytes
    problems = []
    end, last = data_start, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            problems.append(f"{tensor.origin}: overlaps {last}")
        elif tensor.offset > end and is_complete:
            problems.append(
                f"{tensor.origin}: starts {tensor.offset - end:,} bytes after the tensor before it; gaps are not allowed"
            )
        if tensor.offset + tensor.nbytes >= end:
            end, last = tensor.offset + tensor.nbytes, tensor.name
    if end > size:
        cut = [tensor.name for tensor in tensors if tensor.offset + tensor.nbytes > size]
        problems.append(
            f"{file}: is truncated: {size:,} bytes of {end:,}; {len(cut)} of {len(tensors)} tensors are cut: {shown(cut)}"
        )
    elif end < size and is_complete:
        problems.append(f"{file}: {size - end:,} bytes after the last tensor belong to none")
    return problems
