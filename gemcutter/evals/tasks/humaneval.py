"""HumanEval: functions that a model writes from their descriptions, run with their tests.

The data is human-eval's HumanEval.jsonl.gz or openai/openai_humaneval's parquet. Programs run only where the user has said so.
Sources: Chen et al., "Evaluating Large Language Models Trained on Code", 2021; the chat wording is that of openai's simple-evals.
Read `evals/sandbox/program.py` for how they are run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.sandbox.program import Limits, run_program, usual_limits
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

log = logging.getLogger(__name__)

LAYOUTS = (Layout(("openai_humaneval/test-*", "HumanEval", "human_eval", "test-*", "test")),)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
WORDING = (
    "Read the following function signature and docstring, and fully implement the function described. Your response should only "
    "contain the code for this function.\n{}"
)
BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
SECONDS = 10.0
REFUSED = (
    "humaneval runs programs that the model wrote: in a process of their own, held to limits of time, memory, files and "
    "processes, and without network where the system allows it, but not in a virtual machine. Say --option run=yes if that is "
    "what you want"
)


class HumanEval:
    """The task."""

    name = "humaneval"
    about = "HumanEval: functions, run with their tests (takes --option run=yes)"
    modes: Sequence[Mode] = (
        Mode(
            "completion",
            "the function's head as raw text, 1024 tokens",
            "generate",
            "humaneval-raw-1",
            max_tokens=1024,
            stop=STOP,
        ),
        Mode(
            "chat",
            "one user turn, the code block of the reply (simple-evals' wording)",
            "generate",
            "humaneval-chat-1",
            is_chat=True,
            max_tokens=2048,
            can_think=True,
        ),
    )
    media: Sequence[str] = ()

    def __init__(self) -> None:
        self._limits: Limits | None = None

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield all problems. Raises RequestError, also where programs may not or can't be run."""
        self._limits = self._limits_of(asked)
        for number, row in enumerate(data.rows("humaneval", LAYOUTS), 1):
            about = {name: field(row, name, str, f"humaneval, row {number}") for name in ("prompt", "test", "entry_point")}
            text = about["prompt"]
            prompt = [{"role": "user", "content": WORDING.format(text)}] if mode.is_chat else text
            yield Item(_id(row, number), prompt, about["entry_point"], about=about)

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Run the function with its tests: passed or not."""
        if self._limits is None:
            self._limits = self._limits_of(asked)
        if not reply.text.strip():
            return Grade(None, {"pass@1": 0.0})
        code = reply.text if not mode.is_chat else code_of(reply.text, item.about["entry_point"])
        source = f"{item.about['prompt']}{code}\n{item.about['test']}\ncheck({item.about['entry_point']})"
        outcome = run_program(source, self._limits)
        return Grade({"code": code, "error": outcome.error}, {"pass@1": float(outcome.error is None)})

    def _limits_of(self, asked: Asked) -> Limits:
        """Return the limits of programs. Raises RequestError."""
        if unknown := sorted(set(asked.options) - {"run", "timeout"}):
            raise RequestError(f"humaneval has no option {unknown[0]!r}; its options are run=yes and timeout=SECONDS")
        if asked.options.get("run") != "yes":
            raise RequestError(REFUSED)
        limits, found = usual_limits(_seconds(asked.options.get("timeout")))
        if not found.is_isolated:
            log.warning("this system does not cut programs off from the network, nor hide other processes from them")
        return limits


def _id(row: Row, number: int) -> str:
    found: str = field(row, "task_id", str, f"humaneval, row {number}")
    return found


def _seconds(text: str | None) -> float:
    try:
        seconds = SECONDS if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise RequestError(f"--option timeout={text}: expected seconds, more than 0 and at most 3600")
    return seconds


def code_of(text: str, entry_point: str) -> str:
    """Return what follows a function's head in a reply: the last code block with the function, else the first.

    A whole function replaces the one that the head has begun; a body alone goes on with it. Without a block the reply is code.
    """
    head = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [found[1] for found in BLOCK.finditer(text)] or [text]
    whole = [block for block in blocks if head.search(block)]
    # The head ends inside the function: a body of one statement lets another definition follow.
    return f"    pass\n\n{whole[-1]}" if whole else blocks[0]
