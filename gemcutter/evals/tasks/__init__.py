"""The tasks by name; each in a module of its own, imported when it is asked for.

A new task is a module with a class that keeps the protocol of `evals/task.py`, and a line here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from gemcutter.errors import RequestError
from gemcutter.evals.task import Mode, Task


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a task is, and the hub's data set that it reads; None where its items are generated or the data is a user's own."""

    place: str  # "module:class"
    repo: str | None = None


TASKS = {
    "mmlu": Entry("mmlu:Mmlu", "cais/mmlu"),
    "bfcl": Entry("bfcl:Bfcl"),
    "humaneval": Entry("humaneval:HumanEval", "openai/openai_humaneval"),
    "ifeval": Entry("ifeval:Ifeval", "google/IFEval"),
    "mmmu": Entry("mmmu:Mmmu", "MMMU/MMMU"),
    "mmmu-pro": Entry("mmmu_pro:MmmuPro", "MMMU/MMMU_Pro"),
}


SUITES: dict[str, tuple[str, ...]] = {}  # tasks that are asked together


def expand(names: str) -> list[str]:
    """Return tasks with commas between them, those of a suite in its place. Raises RequestError."""
    found = [task for name in names.split(",") for task in SUITES.get(name.strip(), (name.strip(),))]
    for name in found:
        if name not in TASKS:
            raise RequestError(f"there is no task {name!r}; tasks are: {', '.join((*TASKS, *SUITES))}")
    return found


def open_task(name: str) -> Task:
    """Return a task by its name, which there must be."""
    module, _, kind = TASKS[name].place.partition(":")
    found: Task = getattr(importlib.import_module(f"{__name__}.{module}"), kind)()
    return found


def find_mode(task: Task, name: str | None) -> Mode:
    """Return a task's mode by its name; its only one where none is named. Raises RequestError that lists all."""
    found = {mode.name: mode for mode in task.modes}
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        told = "; ".join(f"{mode.name}: {mode.about}" for mode in task.modes)
        wanted = "name one with --mode" if name is None else f"there is no mode {name!r}"
        raise RequestError(f"{task.name} can be asked in several ways, whose numbers can't be compared; {wanted}: {told}")
    return found[name]
