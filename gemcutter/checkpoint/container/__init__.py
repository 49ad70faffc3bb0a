"""The files that tensors lie in: safetensors and GGUF headers, lazy memory-mapped tensors, the index of a sharded checkpoint.

Owns bytes, headers and names as a file spells them; refuses to know what a tensor means to a model. Read `source.py` first.
"""
