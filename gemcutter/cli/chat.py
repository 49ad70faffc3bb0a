"""`gemcutter chat`: a conversation in the terminal.

Owns the loop of lines, the slash commands and interrupts; works the same on a pipe, where it prompts for nothing. Replies go to
stdout, all else to stderr. The engine finds the turns before in its cache by itself. Read `conversation.py` for the history,
`gemcutter/api.py` for the model.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.conversation import Conversation
from gemcutter.cli.failure import describe
from gemcutter.cli.loading import load_model
from gemcutter.cli.terminal import Answer, note, spell_rate
from gemcutter.errors import GemcutterError, RequestError

if TYPE_CHECKING:
    from gemcutter.api import Completion, Model, Stream

HELP = """
Talk with a model, turn by turn.

Ctrl-C interrupts a reply and keeps what has come of it; Ctrl-D or /exit leaves. A turn computes only what is new: the turns
before it are still in the cache, as the line after each reply says. Lines may come from a pipe, one a turn.

\b
In the conversation:
  /system [TEXT]   set the system prompt; without TEXT, remove it
  /think on|off    let the model reason before it answers
  /retry           answer the last question anew
  /undo            forget the last question and its reply
  /clear           forget all turns, but not the system prompt
  /save FILE       write the conversation as JSON
  /load FILE       go on with a conversation from a file
  /help            show these commands
  /exit            leave

A line that begins with a space is never a command.
"""
EXAMPLES = """\b
Examples:
  gemcutter chat demo
  gemcutter chat google/gemma-4-E2B-it --system "Answer in one sentence." --think
  printf 'What is a lantern?\\nAnd a lamp?\\n' | gemcutter chat demo -n 64
"""
COMMANDS = HELP.partition("\b\n")[2]
HISTORY_LINES = 1000

MaxTokens = Annotated[int, typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Tokens of a reply at most.")]


@options.spread
def chat(
    model: options.Model,
    *,
    system: options.System = None,
    think: options.Think = False,
    max_tokens: MaxTokens = 1024,
    choosing: options.Choosing,
    loading: options.Loading,
    context: options.Context = None,
    kv: options.Kv = None,
) -> None:
    """Hold one conversation until the input ends. Raises UsageError or GemcutterError."""
    sampling = options.check_sampling(choosing)
    loaded = load_model(model, loading, context=context, kv=kv, prefix_cache_entries=4)
    if loaded.template is None:
        raise RequestError(
            f"{model} has no chat template (a base model?); use `gemcutter run`, or an instruction-tuned checkpoint"
        )
    session = Session(loaded, Conversation(system), {"max_tokens": max_tokens, **sampling})
    session.set_thinking(think)
    with line_history():
        if sys.stdin.isatty():
            note("/help lists the commands; Ctrl-C interrupts a reply, Ctrl-D leaves")
        session.hold()


@dataclass(slots=True)
class Session:
    """One conversation with one model."""

    model: Model
    conversation: Conversation
    options: dict[str, Any]
    think: bool = False
    retries: int = 0

    def hold(self) -> None:
        """Take lines until the input ends or /exit; errors and interrupts end a line, never the session."""
        while True:
            try:
                line = read_line()
                if line is None or not self.take(line):
                    return
            except KeyboardInterrupt:
                note("\n(/exit or Ctrl-D leaves)")
            except BrokenPipeError:
                raise  # nobody reads the replies any more
            except (GemcutterError, OSError) as error:
                note(f"error: {describe(error)}")

    def take(self, line: str) -> bool:
        """Answer one line, or obey it if it is a command; tell whether to go on."""
        before = list(self.conversation.turns)
        if not line.startswith("/"):
            if line.strip():
                self.conversation.ask(line.strip())
                self.reply(before)
            return True
        word, _, rest = line.strip().partition(" ")
        match word, rest.strip():
            case "/exit", "":
                return False
            case "/retry", "" if self.conversation.reopen():
                self.retries += 1
                self.reply(before)
            case command, argument:
                note(self.obey(command, argument))
        return True

    def obey(self, word: str, rest: str) -> str:
        """Run a command that changes the conversation, and say what it did. Raises OSError or GemcutterError."""
        match word, rest:
            case "/help", "":
                return COMMANDS
            case "/system", _:
                self.conversation.system = rest or None
                return "system prompt set" if rest else "no system prompt"
            case "/think", "on" | "off":
                self.set_thinking(rest == "on")
                return f"thinking {rest}"
            case "/clear", "":
                self.conversation.turns.clear()
                return "all turns forgotten"
            case "/undo", "":
                return "last turn forgotten" if self.conversation.undo() else "there is no turn to forget"
            case "/retry", "":
                return "there is no question to answer anew"
            case "/save", file if file:
                self.conversation.save(Path(file).expanduser())
                return f"saved {len(self.conversation.messages)} messages to {file}"
            case "/load", file if file:
                self.conversation = Conversation.load(Path(file).expanduser())
                return f"loaded {len(self.conversation.messages)} messages"
        return f"{word} {rest}".strip() + " is no command; /help lists them, and a line that begins with a space is never one"

    def set_thinking(self, think: bool) -> None:
        """Switch reasoning on or off. Raises RequestError if the template has no such switch."""
        if think and (self.model.template is None or "enable_thinking" not in self.model.template.variables):
            raise RequestError("this checkpoint's chat template has no switch for thinking")
        self.think = think

    def reply(self, before: list[dict[str, Any]]) -> None:
        """Answer the last question. A reply cut short is kept as far as it came; without one the turns are `before` again."""
        parts: dict[str, list[str]] = {"content": [], "reasoning": []}
        answer, completion = Answer(), None
        try:
            with interruptible(), closing(self._stream()) as chunks:
                for chunk in chunks:
                    completion = chunk.completion
                    parts[chunk.kind].append(chunk.text)
                    answer.write(chunk.text, chunk.kind)
        except KeyboardInterrupt:
            answer.end()
            has_begun = any(map(any, parts.values()))
            note("(interrupted)" if has_begun else "(interrupted before the reply; the question is forgotten)")
        finally:
            content, reasoning = "".join(parts["content"]), "".join(parts["reasoning"])
            if completion is not None or content or reasoning:
                self.conversation.answer(content, reasoning)
            else:
                self.conversation.turns = before
        if completion is not None:
            answer.end()
            note(summary(completion))

    def _stream(self) -> Stream:
        seed = self.options.get("seed")
        again = {} if seed is None else {"seed": (seed + self.retries) % 2**64}  # a retry should say something else
        return self.model.stream(self.conversation.messages, enable_thinking=self.think, **(self.options | again))


def summary(completion: Completion) -> str:
    """Describe how long a turn was, how fast it came, and what of it was in the cache already."""
    spent = completion.metrics
    return (
        f"({len(completion.tokens)} tokens, {spell_rate(spent.decode_tokens, spent.decode_s)}; "
        f"prompt {len(completion.prompt_tokens)} tokens, {spent.cached_tokens} of them from the cache)"
    )


def read_line() -> str | None:
    """Read a line, prompting for it on a terminal; None at the end of the input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            note("")
            return None
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


@contextmanager
def interruptible() -> Iterator[None]:
    """Let one Ctrl-C raise KeyboardInterrupt, and none after it, so that what it interrupts can put things in order."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def line_history() -> Iterator[None]:
    """Keep the lines of all sessions in the user's state folder, on a terminal; do without where that can't be written."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # not everywhere
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "gemcutter" / "history"
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
