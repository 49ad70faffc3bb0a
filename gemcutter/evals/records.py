"""The file of a run: one line that says what was done, then one line for each item, as it is answered.

Owns the format (JSON lines), resuming after a kill, and the refusal to mix runs that differ. A line that a kill has cut off is
dropped; items that failed are asked again. Read `run.py` for who writes, `report.py` and `compare.py` for who reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gemcutter.errors import RequestError

FORMAT = "gemcutter-eval-1"


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one item: the reply, what was read out of it and how it was judged, or the error instead."""

    id: str
    subject: str = ""
    prompt_sha256: str = ""
    gold: Any = None
    extracted: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)  # of things, behind a metric whose mean is over things
    reply: str = ""
    logprobs: tuple[float, ...] = ()
    finish: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0  # that began an earlier prompt, too
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RunFile:
    """A run as it lies in a file: its header and its records by their ids, in the order in which they were written."""

    header: Mapping[str, Any]
    records: Mapping[str, Record]


def sha256_of(prompt: Any) -> str:
    """Return the hash of a prompt: of its text, or of its messages as JSON; media count by their bytes."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=_digest)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(value: Any) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    raise TypeError(f"{type(value).__name__} in a message")


def read(file: Path) -> RunFile:
    """Read a run. Raises RequestError where the file is none, or damaged elsewhere than in its last line."""
    run, _ = _read(file)
    return run


def _read(file: Path) -> tuple[RunFile, int]:
    """Return a run, and how many bytes of its file are whole lines."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror}") from None
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].splitlines()
    header = _parsed(file, 1, lines[0]) if lines else {}
    if header.get("format") != FORMAT:
        raise RequestError(f"{file} is no run of `gemcutter eval`: its first line is not one's header")
    records = dict[str, Record]()
    for number, line in enumerate(lines[1:], 2):
        found = _parsed(file, number, line)
        try:
            record = Record(**found | {"logprobs": tuple(found.get("logprobs", ()))})
        except TypeError:
            raise RequestError(f"{file}, line {number}: not an item of a run") from None
        records.pop(record.id, None)  # an item that had failed, and was asked again
        records[record.id] = record
    return RunFile(header, records), whole


def _parsed(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{file}, line {number}: not JSON: {error}; delete the file to begin anew") from None
    if not isinstance(found, dict):
        raise RequestError(f"{file}, line {number}: expected an object")
    return found


class Log:
    """A run's file, open to be written; `done` are the records that it has already. A context manager."""

    def __init__(self, file: Path, header: Mapping[str, Any]) -> None:
        """Begin a file, or go on with one that has the same header. Raises RequestError if it is another run's."""
        self.file, self.done = file, dict[str, Record]()
        header = json.loads(json.dumps({"format": FORMAT, **header}))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_new = not file.exists() or not file.read_bytes().count(b"\n")
            whole = 0
            if not is_new:
                found, whole = _read(file)
                _insist_same(file, found.header, header)
                self.done = {id: record for id, record in found.records.items() if record.error is None}
            self._stream = file.open("ab" if not is_new else "wb", buffering=0)
        except OSError as error:
            raise RequestError(f"{file} can't be written: {error.strerror}") from None
        self._stream.truncate(whole)
        if is_new:
            self._write(header)

    def append(self, record: Record) -> None:
        """Write an item down; once this returns, a kill does not lose it. Raises RequestError where the disk is full."""
        self._write({name: value for name, value in asdict(record).items() if value not in (None, "", (), {})})

    def _write(self, found: Mapping[str, Any]) -> None:
        try:
            line = memoryview(json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            while line:
                line = line[self._stream.write(line) :]
        except OSError as error:
            raise RequestError(
                f"{self.file} can't be written: {error.strerror or os.strerror(error.errno or 0)}; what is in it stays, and the "
                "same command goes on from there"
            ) from None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()


def _insist_same(file: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    names = [name for name in {**found, **header} if found.get(name) != header.get(name)]
    if names:
        told = ", ".join(f"{name} {found.get(name)!r} is now {header.get(name)!r}" for name in names[:3])
        raise RequestError(f"{file} holds a run of another kind ({told}); give another --output, or delete the file")
