"""What must be so before any test module is imported: whether Triton interprets kernels is decided when it is first imported.

Other libraries import it too, so the variable is set here and not beside the tests that need it: without a GPU kernels run
under Triton's interpreter, on CPU tensors. Tests that compile do so in a process of their own.
"""

from __future__ import annotations

import os

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

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first; the others, and those within a file, keep their order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONG)))
