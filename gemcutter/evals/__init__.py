"""Evaluations: tasks, the modes in which they are asked, and runs whose numbers say exactly what was done.

Read `task.py` for what a task is, `run.py` for how one runs, `records.py` for what is written down.
"""
