"""Lazy tensors: what a header promises of a tensor, and its bytes as a view of the mapped file.

Owns `LazyTensor`, the files that tensors lie in, the dtypes that a file may name, and what makes a tensor's name, dtype or shape
unacceptable. Refuses to know containers: `safetensors_file.py` and `gguf_file.py` read headers, `source.py` finds the files.
torch is imported only when a tensor is asked for, so headers can be listed in milliseconds.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import shown

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "__metadata__"  # of a safetensors header: no tensor's name

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

MAX_BYTES = 2**63 - 1  # torch and the kernel address with signed 64-bit integers

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
        """Return the size of the whole file."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer at the file's end. Raises OSError or ValueError."""
        ...

    def mapping(self) -> mmap.mmap:
        """Return the read-only mapping of the whole file. Raises CheckpointError."""
        ...

    def release(self, offset: int, nbytes: int) -> None:
        """Advise the kernel that these bytes need not stay in memory."""
        ...

    def expect_scattered_reads(self, offset: int, nbytes: int) -> None:
        """Advise the kernel that these bytes will be read here and there."""
        ...


class MappedFile:
    """Map one file read-only on first use, and share that mapping among all its tensors.

    The mapping lives as long as any view of it. Raises OSError where `path` can't be examined.
    """

    __slots__ = ("_inode", "_lock", "_mapping", "_stamp", "path", "size_bytes")

    def __init__(self, path: Path) -> None:
        self.path = path
        found = os.stat(path)
        self._stamp, self._inode = _stamp(found), (found.st_dev, found.st_ino)
        self.size_bytes = self._stamp[0]  # by the time of the stat; the mapping insists that it still holds
        self._mapping: mmap.mmap | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer at the file's end. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(max(min(length, self.size_bytes - offset), 0))  # else as much memory is taken as a header says

    def insist_unchanged(self) -> None:
        """Raise CheckpointError if a mapped file was written to since its header was read: its tensors are others now.

        A file that was replaced by another of its name, or removed, is still mapped as it was. Called between requests, this
        can't prevent what a file that is cut during one leads to.
        """
        if self._mapping is None:
            return
        try:
            found = os.stat(self.path)
        except OSError:
            return
        if (found.st_dev, found.st_ino) == self._inode and _stamp(found) != self._stamp:
            raise CheckpointError(f"{self.path} was changed while the model was loaded from it: load the model again")

    def mapping(self) -> mmap.mmap:
        """Return the read-only mapping of the whole file.

        Raises CheckpointError if the file has changed since its header was read, or can't be mapped.
        """
        with self._lock:
            if self._mapping is None:
                self._mapping = self._open()
            return self._mapping

    def release(self, offset: int, nbytes: int) -> None:
        """Advise the kernel that the pages wholly inside this byte range need not stay in memory; views of them stay valid."""
        self._advise("MADV_DONTNEED", offset, nbytes)

    def expect_scattered_reads(self, offset: int, nbytes: int) -> None:
        """Advise the kernel that this byte range will be read here and there, so that it reads no more than is asked for."""
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
    `offset` is absolute in the file; `nbytes` is the stored size. `arranged` makes the values of a tensor whose `shape` is not
    that of the stored one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    mapped: StoredFile = field(repr=False)
    arranged: Callable[[], Tensor] | None = field(default=None, repr=False)

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

        if self.arranged is not None:
            return self.arranged()
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

        if self.arranged is not None:
            return self.arranged().contiguous().flatten().view(torch.uint8)
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
        if extent > MAX_BYTES:
            raise ValueError(f"shape {shown(shape)} of {dtype} takes more than 2**63 bytes")
    return 0 if 0 in shape else extent


def name_problem(name: str) -> str | None:
    """Return what is wrong with a tensor name, or None."""
    if name == METADATA_KEY:
        return f"tensor name {name} is reserved"
    # Unprintable covers terminal escapes and lone surrogates, which no message or file could carry.
    return None if name.isprintable() else f"tensor name {shown(name)} holds unprintable characters"


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
