"""The native CPU kernels (csrc/cpu) as ops: `backend.py` says when they serve, the other files call the library."""
