"""The turns of a chat so far.

Owns the messages in OpenAI's layout, and the ways to go back: undo, retry, clear, save, load. Refuses to know models and
terminals. Read `chat.py` for who asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemcutter.errors import RequestError


@dataclass(slots=True)
class Conversation:
    """A system prompt (None: none) and the turns after it, the last of which may still wait for its reply."""

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """List all messages, the system prompt first."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*opening, *self.turns]

    def ask(self, content: str | Sequence[Mapping[str, str]]) -> None:
        """Add what the user says: a text, or parts."""
        self.turns.append({"role": "user", "content": content})

    def answer(self, text: str, reasoning: str = "") -> None:
        """Add what the model said; templates decide which reasoning the model sees again."""
        self.turns.append({"role": "assistant", "content": text} | ({"reasoning": reasoning} if reasoning else {}))

    def undo(self) -> bool:
        """Drop the last question and all after it; tell whether there was one."""
        while self.turns:
            if self.turns.pop()["role"] == "user":
                return True
        return False

    def reopen(self) -> bool:
        """Drop what came after the last question, so that it waits for a reply again; tell whether there is one."""
        while self.turns and self.turns[-1]["role"] != "user":
            self.turns.pop()
        return bool(self.turns)

    def save(self, file: Path) -> None:
        """Write all messages as a JSON list. Raises OSError."""
        file.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path, kinds: Sequence[str] = ()) -> Conversation:
        """Read what `save` wrote, or any such list of messages, whose parts may be text or of these kinds.

        Raises OSError or RequestError.
        """
        from gemcutter.generate_options import PARTS, check_parts
        from gemcutter.text.history import check_messages

        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{file} is not JSON: {error}") from None
        messages = check_messages(found) if found != [] else []
        check_parts(messages, (*PARTS, *kinds))
        system = _system_text(messages[0]) if messages else None
        return cls(system, messages[system is not None :])


def _system_text(message: Mapping[str, Any]) -> str | None:
    is_text = message["role"] in ("system", "developer") and isinstance(message["content"], str)
    return message["content"] if is_text else None
