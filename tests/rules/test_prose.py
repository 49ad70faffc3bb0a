"""How prose is laid out and begins: lines of Markdown, and the first word of docstrings.

Owns no word list but the verbs that "Return" replaces. Read `test_architecture.py` for the rules of code.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gemcutter"
WIDTH = 120
FOLDERS_OF_OTHERS = {".venv", "build", "dist", ".pytest_cache", "node_modules", ".hypothesis", "results"}

REPLACED_BY_RETURN = ("Give", "Tell", "Say", "Spell")


def markdown_files() -> list[Path]:
    """List the repository's Markdown files."""
    found = ROOT.rglob("*.md")
    return sorted(path for path in found if not FOLDERS_OF_OTHERS & set(path.relative_to(ROOT).parts))


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines that are neither code nor rows of a table."""
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith(("|", "    ")):
            yield number, line


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_markdown_fits_a_screen(path: Path) -> None:
    long = [f"{path.name}:{number}" for number, line in prose_lines(path.read_text()) if len(line) > WIDTH]
    assert long == [], f"lines of more than {WIDTH} columns; python tools/wrap_markdown.py {path.relative_to(ROOT)} wraps them"


def test_markdown_is_found() -> None:
    known = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert {ROOT / name for name in known if (ROOT / name).exists()} - set(markdown_files()) == set()


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every docstring of a file with the line of what it describes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def test_docstrings_begin_with_return() -> None:
    """A function that gives something back says "Return ...", one that answers a question "Return whether ..."."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in docstrings(path)
        if re.match(rf"({'|'.join(REPLACED_BY_RETURN)})\b", text)
    ]
    assert found == []
