"""The Triton kernels for GPUs as ops: `backend.py` says when they serve, `layer_ops.py` composes the other files' kernels."""
