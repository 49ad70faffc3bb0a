"""What a run is called and where it is written: the header that tells one run from every other.

Owns the names in it. Refuses to know command lines. Read `records.py` for the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter.errors import RequestError
from gemcutter.evals.records import sha256_of
from gemcutter.evals.run import How, options_of
from gemcutter.evals.task import Asked, Item, Mode, Task

if TYPE_CHECKING:
    from gemcutter.api import Model

DIGITS = 8  # of a header's hash, in a file's name


def check(task: Task, mode: Mode, model: Model | None, how: How) -> None:
    """Raise RequestError where a mode can't be asked of a model, or not in this way."""
    if how.think and not mode.can_think:
        able = ", ".join(each.name for each in task.modes if each.can_think) or "none"
        raise RequestError(f"{task.name}/{mode.name} is asked without thinking; modes that can think: {able}")
    if model is not None and (missing := [kind for kind in task.media if kind not in model.kinds]):
        raise RequestError(f"{task.name}/{mode.name} shows {' and '.join(missing)}, for which this checkpoint has no tower")
    if mode.is_chat and model is not None and model.template is None:
        raise RequestError(f"{task.name}/{mode.name} asks through a chat template, which this checkpoint does not have")


def header(
    model: Model, described: Mapping[str, Any], task: Task, mode: Mode, items: Sequence[Item], asked: Asked, how: How
) -> dict[str, Any]:
    """Return all that decides a run's numbers; `described` says which model, and how it is computed."""
    template = model.template.source if mode.is_chat and model.template is not None else None
    sampling = {**mode.sampling, **how.sampling} if mode.how == "generate" else {}
    return {
        "task": task.name,
        "mode": mode.name,
        "about": mode.about,
        "how": mode.how,
        "prompt_id": mode.prompt_id,
        "is_chat": mode.is_chat,
        "template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "think": how.think,
        "sampling": sampling,
        "max_tokens": how.cap(mode) if mode.how == "generate" else 0,
        "shots": mode.shots if asked.shots is None else asked.shots,
        "extract": asked.extract,
        "limit": asked.limit,
        "subjects": list(asked.subjects),
        "seed": asked.seed,
        "options": dict(asked.options),
        "items": len(items),
        "items_sha256": sha256_of([[item.id, sha256_of(item.prompt), item.choices, item.gold] for item in items]),
        "measured": dict(described),
    }


def file_of(folder: Path, header: Mapping[str, Any]) -> Path:
    """Return where a run is written in a folder: a name that says what it is, and that no other run has."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:DIGITS]
    model = re.sub(r"[^\w.-]+", "-", Path(str(header["measured"]["model"])).name).strip("-.") or "model"
    return folder / f"{model}-{header['task']}-{header['mode']}-{digest}.jsonl"


def rendered(model: Model, mode: Mode, items: Sequence[Item], how: How) -> Iterator[str]:
    """Yield each item's prompt as the model would read it, markers spelled out, then its choices. Raises RequestError."""
    for item in items:
        options = options_of(mode, item, how)
        of_template = {name: options[name] for name in ("enable_thinking", "tools", "continue_final_message") if name in options}
        ids = model.encode(item.prompt, **of_template) if mode.is_chat else model.encode(item.prompt)
        text = model.tokenizer.decode(ids, special=True)
        choices = [f"choice: {_spell_choice(model, mode, item, choice)}" for choice in item.choices]
        yield "\n".join([f"--- {item.id} ({len(ids)} tokens), right is {item.gold!r}", text, *choices])


def _spell_choice(model: Model, mode: Mode, item: Item, choice: str | tuple[int, ...]) -> str:
    if not isinstance(choice, str):
        return model.tokenizer.decode(choice, special=True)
    return choice if mode.is_chat else item.delimiter + choice
