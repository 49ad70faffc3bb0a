"""Writes checkpoints: safetensors and GGUF files as streams, whole or not at all, and random checkpoints of any size.

Owns bytes on their way to disk; refuses to convert checkpoints. Read `write_safetensors.py` first.
"""
