"""What a task is: questions, ways to ask them, and who judges the answers.

Owns `Item`, `Mode`, `Reply`, `Grade` and the protocol `Task`; refuses to know models and files. A mode fixes all that changes a
score: prompt, sampling, cap and rule. Numbers of two modes are never compared. Read `tasks/mmlu.py` for an example, `run.py` for
who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data
from gemcutter.text.tool_calls import ToolCall

if TYPE_CHECKING:
    from gemcutter.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
SGL_EVAL = {"temperature": 0.0, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0}  # what it asks of every request


@dataclass(frozen=True, slots=True)
class Item:
    """One question as a mode asks it.

    `id` is the same in every run; `subject` is what results are broken down by. `prompt` is raw text, ids, or a conversation,
    whose media are bytes in parts. `gold` is what is right, and must be JSON. With `choices`, texts or ids, these are scored as
    continuations, texts with `delimiter` before each; without, a reply is generated. `about` holds what a judge needs besides,
    and `options` what only this item asks of the request, such as tools.
    """

    id: str
    prompt: str | Sequence[int] | Sequence[Message]
    gold: Any
    subject: str = ""
    choices: tuple[str | tuple[int, ...], ...] = ()
    delimiter: str = " "
    about: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to ask: what is said to be compared with it, and how replies come about.

    `how` is "score" (log-likelihoods of choices) or "generate". `is_chat` says whether prompts go through the chat template,
    `prompt_id` names the wording, and changes with it. `sampling` are the options of a request, temperature 0 by default;
    `shots` is the usual number of examples before a question, None where there are none; `rules` are the ways to read an answer
    that a user may choose from, the usual one first.
    """

    name: str
    about: str
    how: Literal["score", "generate"]
    prompt_id: str
    is_chat: bool = False
    shots: int | None = None
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    can_think: bool = False
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user may ask of every task; `limit` items are drawn with `seed`, of these `subjects` alone where some are named.

    `open_tokenizer` reads the model's tokenizer, for tasks whose items have a length in tokens; no weights are read.
    """

    limit: int | None = None
    subjects: tuple[str, ...] = ()
    seed: int = 0
    shots: int | None = None
    extract: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)  # of one task alone, by name
    open_tokenizer: Callable[[], Tokenizer] | None = None

    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer. Raises GemcutterError."""
        if self.open_tokenizer is None:
            raise RequestError("the items of this task are cut by tokens, which takes a model's tokenizer")
        return self.open_tokenizer()


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model gave for an item: the log-likelihoods of its choices, or a text without its thoughts."""

    logprobs: tuple[float, ...] = ()
    text: str = ""
    reasoning: str = ""
    finish: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Grade:
    """How an answer was judged: what was read out of it (None: nothing could be), and the metrics, the headline first.

    A metric is 0 or 1, or a share of several things that one item asks for; where its mean is one over all things and not over
    items, `counts` says of how many things the share is. "nll" is a loss in nats per token, and its count the tokens.
    """

    extracted: Any
    metrics: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)


class Task(Protocol):
    """Questions of one kind."""

    name: str
    about: str
    modes: Sequence[Mode]
    media: Sequence[str]  # kinds of media in its prompts, for which the model must be loaded

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterable[Item]:
        """Return all questions in the order of the data, whatever `limit` and `subjects` say. Raises RequestError."""

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Judge a reply."""
