"""What must be so before any test module is imported: whether Triton interprets kernels is decided when it is first imported.

Other libraries import it too, so the variable is set here and not beside the tests that need it: without a GPU kernels run
under Triton's interpreter, on CPU tensors. Tests that compile do so in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Files that take a minute or more begin first, so that no process waits for another one's at the end (`make test`).
LONG = (
    "tests/unit/test_guides.py",
    "tests/unit/test_memory_needs.py",
    "tests/kernels/test_levels.py",
    "tests/parity/test_drafter.py",
    "tests/parity/test_media.py",
    "tests/formats/test_merge.py",
    "tests/triton/test_triton_attention.py",
    "tests/triton/test_triton_linear.py",
    "tests/triton/test_triton_report.py",
    "tests/slow/test_memory.py",
    "tests/formats/test_convert.py",
    "tests/parity/test_golden.py",
)
# Of these folders' parametrized tests, GEMCUTTER_PART=2/5 runs the second fifth: all kinds of cases, in a fifth of the time.
# Continuous integration takes another part with each commit (`.ci/run`); `make check` runs all of them.
MANY_CASES = (
    *("tests/kernels", "tests/triton", "tests/parity", "tests/formats", "tests/parallel"),
    "tests/unit/test_memory_needs.py",
)
RUNS_OTHERS = "tests/kernels/test_levels.py"  # in processes of their own, which take the part
PART, PARTS = map(int, os.environ.get("GEMCUTTER_PART", "1/1").split("/"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is another part's, and put long files first; all else keeps its order."""
    others = set(_of_other_parts(items))
    if others:
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONG)))


def _of_other_parts(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the cases of `MANY_CASES` that this part leaves out; of each test at least one stays."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.nodeid.startswith(MANY_CASES) and not item.nodeid.startswith(RUNS_OTHERS):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in cases.values():
        taken = (PART - 1) % min(PARTS, len(group))
        yield from (item for place, item in enumerate(group) if place % PARTS != taken)
