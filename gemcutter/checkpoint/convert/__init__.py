"""Writes a checkpoint again in another format, quantization or layout, some rows of a tensor in memory at a time.

Owns the choice of what each tensor becomes and the run; refuses to know how files are written, which is `write/`. Read
`convert.py` first, then `conversion_plan.py`.
"""
