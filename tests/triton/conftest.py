"""Where the Triton kernels run in these tests: on the GPU if there is one, else under Triton's interpreter on the CPU.

`tests/conftest.py` chooses the interpreter before anything can import Triton.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that kernels run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
