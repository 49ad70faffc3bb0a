"""What must be so before any test module is imported: whether Triton interprets kernels is decided when it is first imported.

Other libraries import it too, so the variable is set here and not beside the tests that need it: without a GPU kernels run
under Triton's interpreter, on CPU tensors. Tests that compile do so in a process of their own.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
