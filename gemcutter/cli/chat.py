"""`gemcutter chat`: a conversation in the terminal.

Owns the loop of messages, the slash commands and interrupts. Replies go to stdout, all else to stderr. The engine finds the turns
before in its cache by itself. Read `line_input.py` for how messages are read, `conversation.py` for the turns,
`gemcutter/api.py` for the model.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.conversation import Conversation
from gemcutter.cli.failure import describe
from gemcutter.cli.line_input import line_history, read_message
from gemcutter.cli.loading import load_model, spell_how
from gemcutter.cli.media_files import Part, describe_file, with_media
from gemcutter.cli.run import note_idle_options, spell_limit
from gemcutter.cli.terminal import Answer, Volume, note, say, spell_drafts, spell_rate, volume
from gemcutter.cli.tool_files import ToolFile, Tools, read_tools
from gemcutter.errors import GemcutterError, RequestError
from gemcutter.media_parts import TOWERS
from gemcutter.tools import run_call, turn_of

if TYPE_CHECKING:
    from gemcutter.api import Completion, Model, Stream
    from gemcutter.engine.sampling_params import SamplingParams
    from gemcutter.text.tool_calls import ToolCall

HELP = """
Talk with a model, turn by turn.

Ctrl-C interrupts a reply and keeps what has come of it; Ctrl-D or /exit leaves. A turn computes only what is new: the turns
before it are still in the cache, as the line after each reply says. Lines may come from a pipe, one a turn.

Several lines that are pasted at once are one message. Typed or piped, a line that ends with a backslash goes on in the next one,
and so does everything from three quotes (\"\"\") at the begin of a line to three at the end of one.

With --tools, calls of the functions in a .py file are run, and the model goes on with their results. For tools that are only
declared, in a .json file, you are asked for each result.

\b
In the conversation:
  /set NAME VALUE  set temperature, top_p, seed, max_tokens, ...; VALUE "default" takes it back
  /show            show the model, the options and how full the context is
  /system [TEXT]   set the system prompt; without TEXT, remove it
  /think on|off    let the model reason before it answers
  /image FILE      show an image with the next message; needs --media image
  /audio FILE      play a sound with the next message; needs --media audio
  /video FILE      show frames of a video with the next message; needs --media video
  /retry           answer the last question anew
  /undo            forget the last question and its reply
  /clear           forget all turns, but not the system prompt
  /save FILE       write the conversation as JSON
  /load FILE       go on with a conversation from a file
  /help, /?        show these commands
  /exit, /bye      leave

A line that begins with a space is never a command.
"""
EXAMPLES = """\b
Examples:
  gemcutter chat demo
  gemcutter chat google/gemma-4-E2B-it --system "Answer in one sentence." --think
  gemcutter chat google/gemma-4-E2B-it --media image --max-soft-tokens 560
  printf 'What is a lantern?\\nAnd a lamp?\\n' | gemcutter chat demo -n 64
"""
COMMANDS = HELP.partition("\b\n")[2]
FAREWELLS = ("exit", "quit", "bye")  # what leaves other programs
SETTABLE = ("max_tokens", *(each.name for each in fields(options.Choosing)))
NEED_AN_ARGUMENT = {
    "/save": "FILE",
    "/load": "FILE",
    "/image": "FILE",
    "/audio": "FILE",
    "/video": "FILE",
    "/think": "on|off",
    "/set": "NAME VALUE",
}

MAX_TOKENS = 1024
MOST_ROUNDS = 8  # of tool calls, after one message
MaxTokens = Annotated[int, typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Tokens of a reply at most.")]


@options.spread
def chat(
    model: options.Model,
    *,
    system: options.System = None,
    think: options.Think = False,
    tools: Tools = None,
    media: options.Media = None,
    max_soft_tokens: options.Soft = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    choosing: options.Choosing,
    loading: options.Loading,
    speculating: options.Speculating,
    context: options.Context = None,
    kv: options.Kv = None,
    prefix_cache_bytes: options.PrefixCacheBytes = None,
) -> None:
    """Hold one conversation until the input ends. Raises UsageError or GemcutterError."""
    sampling = options.check_sampling(choosing)
    declared = None if tools is None else read_tools(tools)
    prefix_bytes = options.parse_bytes("--prefix-cache-bytes", prefix_cache_bytes)
    more: dict[str, Any] = {**speculating.given, "media": tuple(media or ())}
    loaded = load_model(model, loading, context=context, kv=kv, prefix_cache_bytes=prefix_bytes, **more)
    if loaded.template is None:
        raise RequestError(
            f"{model} has no chat template (a base model?); use `gemcutter run`, or an instruction-tuned checkpoint"
        )
    note_idle_options(loaded, sampling)
    session = Session(
        model, loaded, Conversation(system), {"max_tokens": max_tokens, **sampling}, tools=declared, soft_tokens=max_soft_tokens
    )
    session.set_thinking(think)
    with line_history():
        if sys.stdin.isatty() and volume() is not Volume.QUIET:
            say(f"{model}: {spell_how(loaded)}")
            say("/help lists the commands; Ctrl-C interrupts a reply, Ctrl-D leaves")
        session.hold()


@dataclass(slots=True)
class Session:
    """One conversation with one model."""

    name: str
    model: Model
    conversation: Conversation
    options: dict[str, Any]
    think: bool = False
    retries: int = 0
    tools: ToolFile | None = None
    soft_tokens: int | None = None  # that an image may become at most
    files: list[Part] = field(default_factory=list)  # that come with the next message

    def hold(self) -> None:
        """Take lines until the input ends or /exit; errors and interrupts end a line, never the session."""
        while True:
            try:
                line = read_message()
                if line is None or not self.take(line):
                    return
            except KeyboardInterrupt:
                say("\n(/exit or Ctrl-D leaves)")
            except BrokenPipeError:
                raise  # nobody reads the replies any more
            except (GemcutterError, OSError) as error:
                say(f"error: {describe(error)}")

    def take(self, line: str) -> bool:
        """Answer one message, or obey it if it is a command; tell whether to go on."""
        before = list(self.conversation.turns)
        if line.rstrip() in FAREWELLS:
            say("(/exit or Ctrl-D leaves; a line that begins with a space is sent as it is)")
            return True
        if not line.startswith("/"):
            if line.strip():
                self.conversation.ask(with_media(line.strip(), self.files))
                self.files = []
                self.reply(before)
            return True
        word, _, rest = line.strip().partition(" ")
        match word, rest.strip():
            case (("/exit" | "/quit" | "/bye"), ""):
                return False
            case "/retry", "" if self.conversation.reopen():
                if self.sampling.temperature == 0:
                    note("the most likely token is always taken, so the reply will be the same; /set temperature 1 varies it")
                self.retries += 1
                self.reply(before)
            case command, argument:
                say(self.obey(command, argument))
        return True

    def obey(self, word: str, rest: str) -> str:
        """Run a command that changes the conversation, and say what it did. Raises OSError or GemcutterError."""
        match word, rest:
            case (("/help" | "/?"), ""):
                return COMMANDS
            case "/show", "":
                return self.describe()
            case "/set", setting if len(setting.split()) == 2:
                return self.set_option(*setting.split())
            case "/system", _:
                self.conversation.system = rest or None
                return "system prompt set" if rest else "no system prompt"
            case (("/image" | "/audio" | "/video"), file) if file:
                return self.attach(word[1:], str(Path(file).expanduser().absolute()))
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
                self.conversation = Conversation.load(Path(file).expanduser(), self.model.kinds)
                return f"loaded {len(self.conversation.messages)} messages"
            case command, argument if command in NEED_AN_ARGUMENT and (not argument or command == "/set"):
                return f"{command} needs more: {command} {NEED_AN_ARGUMENT[command]}"
        return f"{word} {rest}".strip() + " is no command; /help lists them, and a line that begins with a space is never one"

    def attach(self, kind: str, file: str) -> str:
        """Keep a file for the next message, and say so. Raises RequestError if it can't be read."""
        if kind not in self.model.kinds:
            raise RequestError(f"/{kind}: the {TOWERS[kind]} is not loaded; start with --media {kind}")
        size = describe_file(kind, file)
        self.files.append({"type": kind, "path": file})
        return f"{file}, {size}, goes with the next message"

    @property
    def sampling(self) -> SamplingParams:
        """Return how tokens are chosen: the options that were set, and the checkpoint's own for the others."""
        return self.model.defaults.sampling({name: value for name, value in self.options.items() if name != "max_tokens"})

    def set_option(self, name: str, text: str) -> str:
        """Set an option of the replies to come, or take it back, and say so. Raises RequestError for what can't be used."""
        name = name.lstrip("-").replace("-", "_")
        if name not in SETTABLE:
            raise RequestError(f"/set {name}: expected one of {', '.join(SETTABLE)}")
        changed = {each: value for each, value in self.options.items() if each != name}
        if text != "default":
            changed[name] = read_number(name, text)
        elif name == "max_tokens":
            changed[name] = MAX_TOKENS
        self.model.defaults.sampling({each: value for each, value in changed.items() if each != "max_tokens"})  # checks them
        self.options = changed
        return f"{name} {self.value_of(name)}"

    def value_of(self, name: str) -> str:
        """Return an option of the replies as a user reads it."""
        value = self.options["max_tokens"] if name == "max_tokens" else getattr(self.sampling, name)
        return f"{value}" if name in self.options else f"{'random' if value is None else value} (default)"

    def describe(self) -> str:
        """Return the model, the options and how full the context is."""
        held = self._prompt_tokens() if self.conversation.turns else 0
        lines = [f"{self.name}: {spell_how(self.model)}"]
        lines += [f"{name:<19} {self.value_of(name)}" for name in SETTABLE]
        lines.append(f"{'thinking':<19} {'on' if self.think else 'off'}")
        lines.append(f"{'system prompt':<19} {self.conversation.system or 'none'}")
        lines.append(f"{'messages':<19} {len(self.conversation.messages)}, {held} of {self.model.engine.context} tokens")
        return "\n".join(lines)

    def _prompt_tokens(self) -> int:
        """Count the tokens of the conversation, the rows of media among them."""
        if not self.model.kinds:
            return len(self.model.encode(self.conversation.messages))
        prepared = self.model.prepare(self.conversation.messages, max_soft_tokens=self.soft_tokens, max_tokens=0)
        return len(prepared.request.prompt)

    def set_thinking(self, think: bool) -> None:
        """Switch reasoning on or off. Raises RequestError if the template has no such switch."""
        if think and (self.model.template is None or "enable_thinking" not in self.model.template.variables):
            raise RequestError("this checkpoint's chat template has no switch for thinking")
        self.think = think

    def reply(self, before: list[dict[str, Any]]) -> None:
        """Answer the last question, and run the tools that the reply calls until it calls none.

        A reply cut short is kept as far as it came; without one the turns are `before` again.
        """
        for _ in range(MOST_ROUNDS):
            completion = self._answer(before)
            if completion is None or not completion.tool_calls:
                return
            try:
                results = [self._result_of(call) for call in completion.tool_calls]
            except KeyboardInterrupt:
                self.conversation.turns = before
                raise
            self.conversation.turns += turn_of(completion, results)
            before = list(self.conversation.turns)
        note(f"stopped after {MOST_ROUNDS} rounds of calls; send a message to go on")

    def _result_of(self, call: ToolCall) -> str:
        """Show a call and return its result: of the tool file's function, or of what the user types."""
        say(f"call {call.name} {call.arguments}")
        if self.tools is None or call.name in self.tools.functions or call.name not in self.tools.names:
            result = run_call(call, {} if self.tools is None else self.tools.functions)
            say(f"  -> {result}")
            return result
        say(f"result of {call.name}?")
        return read_message() or ""

    def _answer(self, before: list[dict[str, Any]]) -> Completion | None:
        """Print one reply and keep it, but for one with calls, whose results are still to come; return it if it is whole."""
        parts: dict[str, list[str]] = {"content": [], "reasoning": [], "tool_call": []}
        answer, completion = Answer(), None
        try:
            with interruptible(), closing(self._stream()) as chunks:
                for chunk in chunks:
                    completion = chunk.completion
                    parts[chunk.kind].append(chunk.text)
                    if chunk.kind != "tool_call":
                        answer.write(chunk.text, chunk.kind)
        except KeyboardInterrupt:
            answer.end()
            has_begun = any(map(any, parts.values()))
            say("(interrupted)" if has_begun else "(interrupted before the reply; the question is forgotten)")
        finally:
            content, reasoning = "".join(parts["content"]), "".join(parts["reasoning"])
            if completion is not None or content or reasoning:
                if completion is None or not completion.tool_calls:
                    self.conversation.answer(content, reasoning)
            else:
                self.conversation.turns = before
        if completion is not None:
            answer.end()
            if completion.finish_reason == "length":
                note(f"stopped at {spell_limit(completion, self.options['max_tokens'])}; /set max_tokens N changes it")
            if volume() is not Volume.QUIET:
                say(summary(completion))
        return completion

    def _stream(self) -> Stream:
        seed = self.options.get("seed")
        again = {} if seed is None else {"seed": (seed + self.retries) % 2**64}  # a retry should say something else
        return self.model.stream(
            self.conversation.messages,
            enable_thinking=self.think,
            tools=None if self.tools is None else self.tools.declarations,
            max_soft_tokens=self.soft_tokens,
            **(self.options | again),
        )


def summary(completion: Completion) -> str:
    """Describe how long a turn was, how fast it came, and what of it was in the cache already."""
    spent = completion.metrics
    drafts = spell_drafts(spent.drafted_tokens, spent.accepted_tokens)
    return (
        f"({len(completion.tokens)} tokens, {spell_rate(spent.decode_tokens, spent.decode_s)}{drafts}; "
        f"prompt {len(completion.prompt_tokens)} tokens, {spent.cached_tokens} of them from the cache)"
    )


def read_number(name: str, text: str) -> int | float:
    """Return an option's value as its type. Raises RequestError for what is no number, or no length of a reply."""
    is_whole = name in ("max_tokens", "top_k", "seed")
    try:
        value = int(text) if is_whole else float(text)
    except ValueError:
        raise RequestError(f"/set {name}: expected {'an integer' if is_whole else 'a number'}, found {text!r}") from None
    if name == "max_tokens" and value < 1:
        raise RequestError(f"/set {name}: expected 1 or more, found {text}")
    return value


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
