"""The tasks by name; each in a module of its own, imported when it is asked for.

A new task is a module with a class that keeps the protocol of `evals/task.py`, and a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from gemcutter.errors import RequestError
from gemcutter.evals.task import Mode, Task


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a task is, and the hub's data set that it reads; None where its items are generated or the data is a user's own."""

    place: str  # "module:class", or a function that makes the task
    repo: str | None = None


TASKS = {
    "mmlu": Entry("mmlu:Mmlu", "cais/mmlu"),
    "bfcl": Entry("bfcl:Bfcl"),
    "humaneval": Entry("humaneval:HumanEval", "openai/openai_humaneval"),
    "arithmetic": Entry("arithmetic:Arithmetic"),
    "copy": Entry("copying:Copying"),
    "needle": Entry("needle:Needle"),
    "json": Entry("json_replies:JsonReplies"),
    "tools": Entry("tool_use:ToolUse"),
    "ocr": Entry("ocr:Ocr"),
    "digits": Entry("digits:Digits"),
    "perplexity": Entry("perplexity:Perplexity"),
    "mmlu-pro": Entry("mmlu_pro:MmluPro", "TIGER-Lab/MMLU-Pro"),
    "gsm8k": Entry("gsm8k:Gsm8k", "openai/gsm8k"),
    "hellaswag": Entry("hellaswag:Hellaswag", "Rowan/hellaswag"),
    "arc-easy": Entry("arc:arc_easy", "allenai/ai2_arc"),
    "arc-challenge": Entry("arc:arc_challenge", "allenai/ai2_arc"),
    "choices": Entry("choices:Choices"),
    "ifeval": Entry("ifeval:Ifeval", "google/IFEval"),
    "mmmu": Entry("mmmu:Mmmu", "MMMU/MMMU"),
    "mmmu-pro": Entry("mmmu_pro:MmmuPro", "MMMU/MMMU_Pro"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A task that is asked, in which mode (None: as the command says), and with which options where none are given.

    Of a suite, a part that can't be asked of a model is passed over.
    """

    task: str
    mode: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    is_of_suite: bool = False


# Tasks that are asked together.
SUITES: dict[str, tuple[Part, ...]] = {
    "arc": (Part("arc-easy"), Part("arc-challenge")),
    "smoke": (
        Part("arithmetic", "raw8", {"count": "20"}, True),
        Part("arithmetic", "chat", {"count": "20"}, True),
        Part("copy", "chat", {"count": "10"}, True),
        Part("needle", "chat", {"lengths": "1024", "depths": "0,50,100"}, True),
        Part("json", "free", {"count": "5"}, True),
        Part("json", "grammar", {"count": "5"}, True),
        Part("tools", "chat", {"count": "10"}, True),
        Part("ocr", "chat", {"count": "6"}, True),
        Part("digits", "chat", {"count": "6"}, True),
        Part("perplexity", "windows", {}, True),
    ),
}


def expand(names: str) -> list[Part]:
    """Return tasks with commas between them, those of a suite in its place; "TASK/MODE" names a mode. Raises RequestError."""
    found = list[Part]()
    for name in names.split(","):
        task, _, mode = name.strip().partition("/")
        if not mode and task in SUITES:
            found += SUITES[task]
        elif task in TASKS:
            found.append(Part(task, mode or None))
        else:
            raise RequestError(f"there is no task {name.strip()!r}; tasks are: {', '.join((*TASKS, *SUITES))}")
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
