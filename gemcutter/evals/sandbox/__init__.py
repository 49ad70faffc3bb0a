"""Programs that a model wrote, run in a process of their own that is held to limits and killed with all that it started.

Read `program.py` for who runs one, `child.py` for what holds it.
"""
