"""Checkpoints: files on disk or on a hub, read, checked, loaded, converted and diagnosed.

Packages import each other in one direction only: `container` (files) <- `formats` (foreign names) <- `load` (parameters);
`write`, `convert`, `doctor` and `remote` build on these. Refuses to know models and engines. Read `load/match.py` first.
"""
