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

    place: str  # "module:class", or a function that makes the task
    repo: str | None = None


TASKS = {
    "mmlu": Entry("mmlu:Mmlu", "cais/mmlu"),
    "mmlu-pro": Entry("mmlu_pro:MmluPro", "TIGER-Lab/MMLU-Pro"),
    "gsm8k": Entry("gsm8k:Gsm8k", "openai/gsm8k"),
    "hellaswag": Entry("hellaswag:Hellaswag", "Rowan/hellaswag"),
    "arc-easy": Entry("arc:arc_easy", "allenai/ai2_arc"),
    "arc-challenge": Entry("arc:arc_challenge", "allenai/ai2_arc"),
    "choices": Entry("choices:Choices"),
}


SUITES: dict[str, tuple[str, ...]] = {"arc": ("arc-easy", "arc-challenge")}  # tasks that are asked together


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
