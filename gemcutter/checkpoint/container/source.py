"""A checkpoint's files as named, lazy, memory-mapped tensors.

Owns `Source`: which files make up a checkpoint, the tensors that their headers promise, and the small files in the same folder.
All problems of all files are reported at once, before anything is mapped. Refuses to know tensor names, models and quantization:
those live in `checkpoint/formats/`. Read next: `safetensors_file.py` and `gguf_file.py` for headers, `lazy_tensor.py` for bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gemcutter.checkpoint.container import gguf_file, safetensors_file
from gemcutter.checkpoint.container.lazy_tensor import LazyTensor, MappedFile, StoredFile
from gemcutter.checkpoint.container.shard_index import INDEX_NAME, SINGLE_NAME, indexed_files, missing_from_shards
from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import insist_on_file, limits_of, parse_object, read_beside

_FOREIGN_FILES = {
    ".npz": "a NumPy archive, as early MLX conversions wrote",
    ".bin": "a PyTorch pickle, which can run code when it is read",
    ".pth": "a PyTorch pickle, which can run code when it is read",
    ".pt": "a PyTorch pickle, which can run code when it is read",
}


SHARD = re.compile(r"(?P<stem>.+)-(?P<index>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")
ADAPTER = "adapter_model.safetensors"  # of peft, which some trainers save beside a merged model


class RemoteFolder(Protocol):
    """What a checkpoint asks of a folder that is not on this machine."""

    def read(self, name: str) -> bytes | None:
        """Return a small file's bytes, None if there is no such file. Raises CheckpointError."""
        ...

    def size_of(self, name: str) -> int | None:
        """Return a file's size, None if there is no such file. Raises CheckpointError."""
        ...


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

        In a folder, the index names the files to read; without one it is `model.safetensors`, or else a complete set of shards,
        or else every .safetensors file but an adapter's, or else the one GGUF model.
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
            raw = self.read_sidecar(name)
            return None if raw is None else parse_object(raw, "the file", limits_of(name))
        except ValueError as error:
            raise CheckpointError(f"{self.folder / name}: {error}; repair it or download it again") from error

    def read_sidecar(self, name: str) -> bytes | None:
        """Return the bytes of the small file `name` beside the tensors, or None where there is no such file.

        Raises ValueError, saying what is wrong, for a file that can't be read or is not small; CheckpointError from a network.
        """
        if self.remote is not None:
            return self.remote.read(name)
        return read_beside(self.folder, name)

    def size_of_sidecar(self, name: str) -> int | None:
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
    """Make a source of all files that `openers` open, noting the problems of each, and the tensors of `weight_map` that none has.

    An opener raises OSError or ValueError for a file that can't be read.
    """
    from gemcutter.checkpoint.container import gguf_file  # which is written in this module's words

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
    problems += missing_from_shards(weight_map, held)
    if not problems:
        problems += gguf_file.check_parts(parts, len(tensors))
    metadata = {key: value for _, found in reversed(parts) for key, value in found.items()}
    return Source(path, folder, tuple(openers), tensors, metadata, remote)


# ---- which files ----


def _find_files(path: Path, problems: list[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Return the files to read, and the index's map from tensor to file name (empty where there is no index)."""
    if os.path.isfile(path):
        if path.suffix in _FOREIGN_FILES:
            raise CheckpointError(f"{path} is {_FOREIGN_FILES[path.suffix]}; pass a .safetensors or .gguf file")
        return gguf_file.parts_of(path, problems), {}
    if not os.path.isdir(path):
        state = "is neither a file nor a folder" if os.path.lexists(path) else "does not exist"
        raise CheckpointError(f"{path} {state}; pass a folder that holds .safetensors or .gguf files, or one such file")
    if os.path.lexists(path / INDEX_NAME):
        return indexed_files(path, problems)
    if os.path.lexists(path / SINGLE_NAME):
        return (path / SINGLE_NAME,), {}
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{path} can't be listed: {error.strerror}; check its permissions") from error
    files = tuple(path / name for name in weight_files(names)) or gguf_file.select_file(path, names, problems)
    if not files:
        raise CheckpointError(_nothing_to_read(path, names))
    return files, {}


def weight_files(names: list[str]) -> list[str]:
    """Return the safetensors files that make up a model: one complete set of shards, or else all but an adapter's."""
    sets: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if shard := SHARD.fullmatch(name):
            sets.setdefault((shard["stem"], shard["count"]), set()).add(int(shard["index"]))
    complete = [key for key, found in sets.items() if found == set(range(1, int(key[1]) + 1))]
    if len(complete) == 1:
        return [name for name in names if (shard := SHARD.fullmatch(name)) and (shard["stem"], shard["count"]) == complete[0]]
    files = [name for name in names if name.endswith(".safetensors")]
    return [name for name in files if name != ADAPTER] or files


def _nothing_to_read(folder: Path, names: list[str]) -> str:
    for name in names:
        kind = _FOREIGN_FILES.get(Path(name).suffix)
        if kind:
            return f"{folder} holds no .safetensors file, only {name}: {kind}; use the safetensors release, or convert it"
    found = f"only {', '.join(names[:4])}" if names else "it is empty"
    return f"{folder} holds no .safetensors file ({found}); pass the folder with the weights, or finish its download"


def _map_file(file: Path) -> MappedFile:
    insist_on_file(file)
    return MappedFile(file)


def _read_shard(file: Path, opener: Callable[[], StoredFile], problems: list[str]) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Return one file's tensors and metadata as far as they are sound, noting every problem."""
    try:
        stored = opener()
        prefix = stored.read(0, 8)
        if prefix.startswith(gguf_file.MAGIC) or file.suffix == gguf_file.SUFFIX:
            return gguf_file.read_shard(stored, problems)
        return safetensors_file.read_shard(stored, prefix, problems)
    except OSError as error:
        problems.append(f"{file.name}: can't be read: {error.strerror}")
    except ValueError as error:
        problems.append(f"{file.name}: {error}")
    return [], {}
