"""Where a task's rows are: local files in the layouts in which the world has them, or the hub's.

Owns the search for files and the reading of parquet, JSON lines, JSON and CSV, packed or not; refuses to know what rows mean.
Nothing is fetched where a folder is given.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gemcutter.errors import RequestError

log = logging.getLogger(__name__)

Row = dict[str, Any]
KINDS = (".parquet", ".jsonl", ".json", ".csv")
PACKED = ".gz"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of one part of a data set may be: glob patterns, the most specific first, without the ending.

    `columns` name the columns of CSV files without a header. With a `suffix`, rows get a "subject": the name of their file
    without it.
    """

    patterns: tuple[str, ...]
    columns: tuple[str, ...] = ()
    suffix: str | None = None

    def read(self, file: Path) -> list[Row]:
        """Read a file of this layout. Raises RequestError."""
        rows = read_rows(file, self.columns)
        if self.suffix is None:
            return rows
        subject = _bare(file).removesuffix(self.suffix)
        return [{"subject": subject, **row} for row in rows]


@dataclass(frozen=True, slots=True)
class Data:
    """The files of a data set: a folder or one file, or None for the hub's `repo`."""

    repo: str | None
    place: Path | None = None
    revision: str | None = None

    @classmethod
    def of(cls, task: str, repo: str | None, place: str | None) -> Data:
        """Return a task's data at a place that the user named, if any. Raises RequestError where there is nothing."""
        if place is not None and not Path(place).exists():
            raise RequestError(f"data of {task}: {place} does not exist{_remedy(repo)}")
        return cls(repo, None if place is None else Path(place))

    def rows(self, what: str, layouts: Iterable[Layout]) -> list[Row]:
        """Read one part, `what` names it in errors, from the first layout that has files. Raises RequestError.

        A file that was named itself is read in the layout that its name fits, else in the first.
        """
        layouts = list(layouts)
        root = self._root(layouts)
        if root.is_file():
            return _fitting(root, layouts).read(root)
        for layout in layouts:
            for pattern in layout.patterns:
                if files := _find(root, pattern):
                    return [row for file in files for row in layout.read(file)]
        raise RequestError(self._nothing(what, layouts, root))

    def beside(self) -> Data:
        """Return where other parts are, such as examples: the folder of a file that was named itself, else the same place."""
        return self if self.place is None or not self.place.is_file() else replace(self, place=self.place.parent)

    def files(self, pattern: str) -> list[Path]:
        """Return the files that a pattern names in the folder, whatever their kind."""
        if self.place is None:
            return []
        return [self.place] if self.place.is_file() else sorted(self.place.glob(pattern))

    def _nothing(self, what: str, layouts: Sequence[Layout], root: Path) -> str:
        names = [f"{pattern}{{{','.join(KINDS)}}}" for layout in layouts for pattern in layout.patterns]
        return f"{what}: none of these files is in {root}: {', '.join(names)}{_remedy(self.repo)}"

    def _root(self, layouts: Sequence[Layout]) -> Path:
        """Return the folder of the files, fetching them from the hub where none was given. Raises RequestError."""
        if self.place is not None:
            return self.place
        if self.repo is None:
            raise RequestError("this task's data is nowhere to be fetched from; name a folder with --data")
        from huggingface_hub import snapshot_download

        wanted = [f"{pattern}{kind}" for layout in layouts for pattern in layout.patterns for kind in KINDS]
        try:
            found = snapshot_download(self.repo, repo_type="dataset", revision=self.revision, allow_patterns=wanted)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RequestError(f"the data set {self.repo} can't be fetched: {first}{_remedy(self.repo)}") from error
        return Path(found)


def _remedy(repo: str | None) -> str:
    if repo is None:
        return ""
    return (
        f"; fetch the files of {repo} where there is a network (`hf download {repo} --repo-type dataset --local-dir FOLDER`), "
        "and name the folder with --data"
    )


def _find(root: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern: those of the first kind that has some, in order."""
    for kind in KINDS:
        if files := sorted(path for end in ("", PACKED) for path in root.glob(f"{pattern}{kind}{end}") if path.is_file()):
            return files
    return []


def _fitting(file: Path, layouts: Sequence[Layout]) -> Layout:
    """Return the layout one of whose patterns ends as a file is named, the first where none does."""
    name = _bare(file)
    ends = (layout for layout in layouts if any(fnmatch(name, pattern.rpartition("/")[2]) for pattern in layout.patterns))
    return next(ends, layouts[0])


def _bare(file: Path) -> str:
    """Return a file's name without its endings."""
    return Path(file.name.removesuffix(PACKED)).stem


def read_rows(file: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Read all rows of a file by its ending. Raises RequestError that names the file, and the line where one is bad."""
    name = file.name.removesuffix(PACKED)
    kind = Path(name).suffix.lower()
    if kind == ".parquet":
        return _read_parquet(file)
    text = read_text(file)
    if kind == ".csv":
        return _read_csv(file, text, columns)
    if kind == ".json" and text.lstrip()[:1] == "[":
        return _objects(file, _parsed(file, 1, text))
    return [row for number, line in enumerate(text.splitlines(), 1) if line.strip() for row in _row(file, number, line)]


def read_text(file: Path) -> str:
    """Read a text, packed or not. Raises RequestError."""
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.name.endswith(PACKED) else data).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise RequestError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not valid UTF-8 (byte {error.start})") from None


def _parsed(file: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file}, line {number}: not JSON: {error}") from None


def _row(file: Path, number: int, line: str) -> list[Row]:
    found = _parsed(file, number, line)
    if not isinstance(found, dict):
        raise RequestError(f"{file}, line {number}: expected an object, found {type(found).__name__}")
    return [found]


def _objects(file: Path, found: Any) -> list[Row]:
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise RequestError(f"{file}: expected a list of objects")
    return found


def _read_csv(file: Path, text: str, columns: Sequence[str]) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise RequestError(f"{file}, line {reader.line_num}: not CSV: {error}") from None
    names = list(columns) or (lines.pop(0) if lines else [])
    if bad := next((number for number, line in enumerate(lines, 1) if len(line) != len(names)), None):
        raise RequestError(f"{file}, row {bad}: expected {len(names)} columns ({', '.join(names)}), found {len(lines[bad - 1])}")
    return [dict(zip(names, line, strict=True)) for line in lines]


def _read_parquet(file: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise RequestError(f"{file}: reading parquet takes pyarrow; install it with: pip install 'gemcutter[eval]'") from None
    try:
        rows: list[Row] = parquet.read_table(file).to_pylist()
    except Exception as error:
        raise RequestError(f"{file} can't be read as parquet: {error}") from None
    return rows


def field(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a row's field of a type. Raises RequestError that names the row and what was expected."""
    value = row.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        found = "none" if name not in row else type(value).__name__
        raise RequestError(f"{where}: {name!r}: expected {wanted}, found {found}")
    return value
