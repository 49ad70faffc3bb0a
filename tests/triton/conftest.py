"""Where the Triton kernels run in these tests: on the GPU if there is one, else under Triton's interpreter on the CPU.

The interpreter is chosen by an environment variable that Triton reads when a kernel's file is imported, so it is set here, before
any test module is. Tests that compile do so in a process of their own (`test_triton_report.py`).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Give the device that kernels run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
