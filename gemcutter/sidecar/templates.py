"""Where chat templates lie: in a file of their own, in several, or in the settings of a tokenizer.

Owns the search and the spellings of named templates. Refuses to know Jinja. Read `text/chat.py` for what is made of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import read_beside, read_object

JINJA, TEMPLATE_JSON, TOKENIZER_CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
ADDITIONAL = "additional_chat_templates"  # a folder
DEFAULT, TOOL_USE = "default", "tool_use"  # names


def find_templates(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the chat templates that lie in a folder, by name, each with where it is; none for base models.

    The default is chat_template.jinja, or chat_template.json, or `chat_template` of tokenizer_config.json, each of which may hold
    several by name; additional_chat_templates/NAME.jinja are more. Raises CheckpointError, naming the file, for a damaged one.
    """
    found: dict[str, tuple[str, str]] = {}
    if (text := _read_text(folder, JINJA)) is not None:
        found[DEFAULT] = text, str(folder / JINJA)
    for name in (TEMPLATE_JSON, TOKENIZER_CONFIG):
        entry = (read_object(folder, name) or {}).get("chat_template")
        for key, source in _named_templates(entry, folder / name).items():
            found.setdefault(key, (source, f"{folder / name}[chat_template]"))
    for path in sorted((folder / ADDITIONAL).glob("*.jinja")):
        if (text := _read_text(folder, f"{ADDITIONAL}/{path.name}")) is not None:
            found.setdefault(path.stem, (text, str(path)))
    return found


def file_stem(name: str) -> str:
    """Return a file's name for a template's, which a stranger chose: letters, digits, `_` and `-` alone."""
    return re.sub(r"[^\w-]", "_", name)[:100]


def _named_templates(entry: Any, path: Path) -> dict[str, str]:
    """Return the templates of a `chat_template` value, by name: a string, an object, or a list of {name, template}."""
    named = entry
    if isinstance(entry, list):
        items = [item for item in entry if isinstance(item, dict) and isinstance(item.get("template"), str)]
        named = {str(item.get("name")): item["template"] for item in items}
    elif isinstance(entry, str | None):
        return {} if entry is None else {DEFAULT: entry}
    if not isinstance(named, dict) or not named or not all(isinstance(source, str) for source in named.values()):
        raise CheckpointError(
            f"{path}: chat_template is {_kind(entry)}, expected a string or a list of {{name, template}} objects"
        )
    return named if DEFAULT in named else {DEFAULT: next(iter(named.values())), **named}


def _read_text(folder: Path, name: str) -> str | None:
    try:
        raw = read_beside(folder, name)
        return None if raw is None else raw.decode("utf-8")
    except ValueError as error:
        raise CheckpointError(f"{folder / name} can't be read ({error}): download the file again") from error


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
