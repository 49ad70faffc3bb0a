"""A checkpoint's fingerprint: what tells it from others without reading all of it.

Owns which bytes are hashed: the config (of a GGUF file its metadata, vocabulary included), every tensor's name, dtype and shape,
and SAMPLES blocks of BLOCK_BYTES of every tensor, evenly spread from its first byte to its last; smaller tensors count whole. So
it tells apart any two conversions, quantizations or training steps, but an edit may hide between the blocks: it is no proof
against forgery. The order and the sharding of safetensors do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from gemcutter.checkpoint.container.gguf_file import Array
from gemcutter.checkpoint.container.lazy_tensor import LazyTensor, StoredFile
from gemcutter.checkpoint.container.source import Source
from gemcutter.errors import CheckpointError

BLOCK_BYTES = 4096
SAMPLES = 16  # 64 KiB a tensor: some 60 MB for the largest model


def sampled_sha256(source: Source) -> str:
    """Hash the headers of a checkpoint and a sample of its bytes, as hex digits. Raises CheckpointError if it can't be read."""
    is_gguf = any(file.suffix == ".gguf" for file in source.files)
    digest = hashlib.sha256(_canonical(source.metadata if is_gguf else source.read_json("config.json")))
    for name in sorted(source.tensors):
        tensor = source.tensors[name]
        digest.update(_canonical([name, tensor.dtype, list(tensor.shape), tensor.nbytes]))
        for block in _sample(tensor):
            digest.update(block)
    return digest.hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_hash_array).encode()


def _hash_array(array: Array) -> str:
    """Give the hash of what a GGUF header keeps where it lies, to stand for it."""
    return hashlib.sha256(_read(array.stored, array.offset, array.nbytes)).hexdigest()


def _sample(tensor: LazyTensor) -> Iterator[bytes]:
    """Yield the bytes of a tensor that count."""
    if tensor.nbytes <= SAMPLES * BLOCK_BYTES:
        yield _read(tensor.mapped, tensor.offset, tensor.nbytes)
        return
    last = tensor.nbytes - BLOCK_BYTES
    for index in range(SAMPLES):
        yield _read(tensor.mapped, tensor.offset + index * last // (SAMPLES - 1), BLOCK_BYTES)


def _read(file: StoredFile, offset: int, count: int) -> bytes:
    try:
        return file.read(offset, count)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.path} can't be read: {error}") from error
