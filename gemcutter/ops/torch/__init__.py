"""Faster ops on torch's own kernels: library matrix products (`matmul.py`) and fused attention (`attention.py`)."""
