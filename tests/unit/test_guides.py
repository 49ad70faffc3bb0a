"""The guides are contracts, as the README is: every command and program in them runs, in order, page by page.

What needs a GPU, a download or minutes says so in a marker (`tests/markdown.py`) and is only parsed. A page's commands share one
scratch folder, since later ones use what earlier ones wrote. Read `test_readme.py` for the README.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.markdown import ENVIRONMENT, REASONS, ROOT, Fence, fences, links, parse, run

GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [
    *GUIDES,
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "tests" / "README.md",
    ROOT / "docs" / "glossary.md",
]
RUN = ("sh", "console", "python")
NOT_CODE = ("text", "json", "")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Restore the number of threads that torch had, which --threads changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_what_a_guide_shows_runs(path: Path, tmp_path: Path) -> None:
    for fence in fences(path.read_text()):
        if fence.reason is None:
            _run(fence, tmp_path)


def _run(fence: Fence, folder: Path) -> None:
    """Run one block; commands succeed, and print what a `console` block shows of them."""
    if fence.language == "python":
        done = subprocess.run(
            [sys.executable, "-c", fence.body], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{fence.body}\n{done.stderr}"
    elif fence.language == "console":
        for command, shown in fence.examples():
            _, printed = run(command, folder)
            for line in shown:
                assert " ".join(line.split()) in " ".join(printed.split()), f"{command}\nprints\n{printed}"
    elif fence.language == "sh":
        for command in fence.commands():
            code, printed = run(command, folder)
            assert code == 0, f"{command}\nexits with {code}\n{printed}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_are_marked_and_their_options_exist(path: Path) -> None:
    for fence in fences(path.read_text()):
        assert fence.language in (*RUN, *NOT_CODE), f"{path}: a block in {fence.language}, which nothing checks"
        assert fence.reason is None or fence.reason in REASONS, f"{path}: not run: {fence.reason}; the reasons are {REASONS}"
        if fence.language not in ("sh", "console"):
            continue
        for command in fence.commands():
            parse(command)
            for script in re.findall(r"\b((?:bench|tools|examples)/\w+\.(?:py|sh))", command):
                text = (ROOT / script).read_text()
                for option in re.findall(r"\s(--[a-z][a-z-]*)", command.partition(script)[2]):
                    assert option in text, f"{command}: {script} has no {option}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path.read_text()):
        assert (path.parent / target).exists(), f"{path}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path}: make {target}"


def test_test_files_that_pages_name_exist() -> None:
    for path in PAGES:
        for named in re.findall(r"`(tests/[\w/.]*\w)/?`", path.read_text()):
            assert (ROOT / named).exists(), f"{path}: {named}"


def test_every_guide_is_linked_from_the_readme() -> None:
    linked = links((ROOT / "README.md").read_text())
    assert [path.name for path in GUIDES if f"docs/guide/{path.name}" not in linked] == []
    assert len(GUIDES) >= 6
