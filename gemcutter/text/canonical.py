"""Google's canonical chat templates of 2026-07-09, which come with the package, and when they stand in for a checkpoint's own.

Checkpoints keep the template of the day on which they were published, and older ones lose tool results or close a turn too early.
Owns the choice: a template that is recognisably an older generation of Google's, and prints plain conversations as the canonical
one does, is replaced; one that somebody changed is left alone. Refuses to know files and options. Read `chat.py` for rendering,
`templates/` for the templates themselves.
"""

from __future__ import annotations

from pathlib import Path

from gemcutter.errors import GemcutterError
from gemcutter.text.chat import ChatTemplate
from gemcutter.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "templates"
LARGE, SMALL = "large", "e-series"  # without thinking, the large models are given an empty thought
DATE = "2026-07-09"
# Macros that every generation of Google's templates for this family defines, and the title of those that are canonical.
OF_GOOGLE = ("macro format_parameters", "macro format_function_declaration", "macro strip_thinking")
CANONICAL = "Canonical Chat Template"
PROBE = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Thanks"},
)


def canonical_template(size: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the canonical template of LARGE or SMALL models."""
    path = FOLDER / f"{size}.canonical-{DATE}.jinja"
    return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer, origin=f"canonical chat template ({size}, {DATE})")


def like(own: ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the canonical template that prints plain conversations as `own` does, None where neither does."""
    printed = _plain(own)
    if printed is None:
        return None
    return next((each for size in (LARGE, SMALL) if _plain(each := canonical_template(size, tokenizer)) == printed), None)


def preferred(own: ChatTemplate, tokenizer: Tokenizer) -> tuple[ChatTemplate, str | None]:
    """Return the template to use for a checkpoint that brings `own`, and a note where that is another one.

    One that knows no tools keeps its plain conversations, and the canonical one prints those with tools.
    """
    if "tools" not in own.variables and not own.has_tool_template:
        own.set_tool_template(lambda: like(own, tokenizer))
        return own, None
    is_older = all(macro in own.source for macro in OF_GOOGLE) and CANONICAL not in own.source
    found = like(own, tokenizer) if is_older else None
    if found is None:
        return own, None
    return found, (
        f"{own.origin} is an older generation of Google's chat template; the canonical one of {DATE} is used in its place "
        "(chat_template own keeps it)"
    )


def _plain(template: ChatTemplate) -> list[str] | None:
    """Return a plain conversation as a template prints it without and with thinking; the oldest lacks a line's end after that."""
    try:
        return [template.render(PROBE, enable_thinking=on).replace("<|think|>\n", "<|think|>") for on in (False, True)]
    except GemcutterError:
        return None
