"""From a checkpoint's tensors to a model's parameters: match them with the plan, then map, copy, repack or quantize them.

Owns the match and the policy of memory, adapters included; refuses to know files' own names of tensors, which `formats/`
translates. Read `match.py`, then `load_params.py`.
"""
