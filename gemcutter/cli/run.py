"""`gemcutter run`: continue one prompt.

Owns where the prompt comes from (argument, stdin, ids), whether it passes the chat template, and the JSON of the result. Refuses
to know how text is generated. Read `gemcutter/api.py` next.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.benchmark.memory import peak_rss_bytes
from gemcutter.cli import options
from gemcutter.cli.answer_form import AnswerForm, ToolChoice, read_tool_choice
from gemcutter.cli.failure import UsageError
from gemcutter.cli.loading import load_model
from gemcutter.cli.measured import describe_model
from gemcutter.cli.media_files import MediaFiles, Part, with_media
from gemcutter.cli.terminal import Answer, note, print_json, remark, say, spell_drafts, spell_rate
from gemcutter.cli.tool_files import Tools, read_tools
from gemcutter.errors import RequestError

if TYPE_CHECKING:
    from gemcutter.api import Completion, Model, Prompt
    from gemcutter.text.tokenizer import Tokenizer

HELP = """
Continue one prompt and print the reply as it comes.

The prompt is PROMPT, or stdin where PROMPT is "-" or absent, less its last line break. It goes through the checkpoint's chat
template as a user's message if there is a template, else to the model as it is. The choice of tokens is greedy unless
--temperature or the checkpoint's generation_config.json says otherwise. The reply goes to stdout, all else to stderr, where notes
tell if the reply was cut off or an option had no effect. Tool calls are printed after the text, one JSON object a line; it is
`gemcutter chat` that runs them. A reader that leaves early, such as `head`, ends the reply in silence, with exit code 0.
"""
EXAMPLES = """\b
Examples:
  gemcutter run demo "What is a lantern?"
  gemcutter run demo "In the beginning" --raw -n 64 --temperature 0.8 --top-p 0.95 --seed 7
  gemcutter run google/gemma-4-E2B-it - < question.txt
  gemcutter run demo "Is a lantern a lamp?" --choice yes --choice no
  gemcutter run google/gemma-4-E2B-it --image receipt.jpg "What was the total?" --max-soft-tokens 1120
  gemcutter run google/gemma-4-E2B-it --audio memo.mp3 "Transcribe the following speech segment in its original language."
  gemcutter run demo --tokens 2,1024,981 --top-logits 10 --json
"""

PromptText = Annotated[str | None, typer.Argument(metavar="PROMPT", help='Text; "-" is stdin.', show_default=False)]
MaxTokens = Annotated[int, typer.Option("-n", "--max-tokens", metavar="N", min=0, help="Tokens to generate at most.")]
Raw = Annotated[bool, typer.Option("--raw", help="Leave the chat template out: <bos> and the text as it is.")]
Tokens = Annotated[
    str | None, typer.Option(metavar="IDS", help="Token ids such as 2,1024,981 in place of text, taken as they are.")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End the reply before this text; repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after tokens that end a turn.")]
Watchdog = Annotated[bool, typer.Option("--watchdog", help="End a reply that goes round in circles.")]
Logprobs = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Also give every token's log-probability, and the N best.")
]
TopLogits = Annotated[
    int | None, typer.Option(metavar="K", min=1, help="Also give the K best logits at the last position of the prompt.")
]


@options.spread
def run(
    model: options.Model,
    prompt: PromptText = None,
    *,
    max_tokens: MaxTokens = 256,
    raw: Raw = False,
    tokens: Tokens = None,
    files: MediaFiles,
    max_soft_tokens: options.Soft = None,
    system: options.System = None,
    think: options.Think = False,
    tools: Tools = None,
    tool_choice: ToolChoice = None,
    form: AnswerForm,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    watchdog: Watchdog = False,
    choosing: options.Choosing,
    logprobs: Logprobs = None,
    top_logits: TopLogits = None,
    as_json: options.Json = False,
    loading: options.Loading,
    speculating: options.Speculating,
    context: options.Context = None,
    kv: options.Kv = None,
) -> None:
    """Answer one prompt on stdout, as text or as one JSON object. Raises UsageError or GemcutterError."""
    if (raw or tokens is not None) and (system is not None or think or tools is not None):
        raise UsageError("--system, --think and --tools are parts of the chat template, which --raw and --tokens leave out")
    declared = None if tools is None else read_tools(tools).declarations
    choice, constraint = read_tool_choice(tool_choice, declared), form.constraint()
    asked = read_prompt(prompt, tokens)
    sampling = options.check_sampling(choosing, logprobs=logprobs)
    loaded = load_model(model, loading, context=context, kv=kv, media=files.kinds, **speculating.given)
    note_idle_options(loaded, sampling)
    given = asked if raw or isinstance(asked, tuple) else as_message(loaded, asked, system, think, files.parts)
    chunks = loaded.stream(
        given,
        **({} if isinstance(given, list) else files.options),  # type: ignore[arg-type]
        max_soft_tokens=max_soft_tokens,
        max_tokens=max_tokens,
        stop=stop or (),
        ignore_eos=ignore_eos,
        watchdog=watchdog,
        enable_thinking=think,
        tools=declared,
        tool_choice=choice,
        constraint=constraint,
        top_logits=top_logits or 0,
        **sampling,
    )
    answer, completion = Answer(), None
    for chunk in chunks:
        completion = chunk.completion
        if not as_json and chunk.kind != "tool_call":
            answer.write(chunk.text, chunk.kind)
    answer.end()
    assert completion is not None  # the last chunk carries it
    if not as_json:
        print_calls(completion)
    if max_tokens:
        note_cut(completion, max_tokens)
    if as_json:
        found = as_object(completion, loaded.load_s, wants_top_logits=top_logits is not None)
        print_json(found | {"measured": describe_model(loaded, model, loading)})
    else:
        show_details(completion, loaded.tokenizer)


def print_calls(completion: Completion) -> None:
    """Print the calls of a reply on stdout, one JSON object a line."""
    for call in completion.tool_calls:
        print_json({"name": call.name, "arguments": call.parsed})


def read_prompt(prompt: str | None, tokens: str | None) -> str | tuple[int, ...]:
    """Find the prompt: ids, or text from the command line or stdin. Raises UsageError or RequestError."""
    if tokens is not None:
        if prompt is not None:
            raise UsageError("give either PROMPT or --tokens, not both")
        asked: str | tuple[int, ...] = options.parse_integers("--tokens", tokens)
    elif prompt is not None and prompt != "-":
        asked = prompt
    elif prompt is None and sys.stdin.isatty():
        raise UsageError("missing PROMPT; give a text, --tokens, or text on stdin")
    else:
        asked = read_stdin().removesuffix("\n")
    if not asked:
        raise RequestError("the prompt is empty; to start from <bos> alone, give its id: --tokens 2")
    return asked


def read_stdin() -> str:
    """Read all of stdin. Raises RequestError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not valid UTF-8 (byte {error.start}); convert it first") from None


def as_message(model: Model, text: str, system: str | None, think: bool, parts: Sequence[Part] = ()) -> Prompt:
    """Make a conversation of a text where the model has a chat template. Raises RequestError if options need one it lacks."""
    if model.template is not None:
        return conversation(text, system, parts)
    if system is not None or think:
        raise RequestError("this checkpoint has no chat template (a base model?), which --system and --think need")
    note("the checkpoint has no chat template (a base model?): the text is continued as it is, as with --raw")
    return text


IDLE_WHEN_GREEDY = ("top_k", "top_p", "min_p", "seed")  # they say which of several tokens is taken


def note_idle_options(model: Model, sampling: Mapping[str, Any]) -> None:
    """Note which of the options that were given change nothing, because the most likely token is always taken."""
    given = [f"--{name.replace('_', '-')}" for name in IDLE_WHEN_GREEDY if sampling.get(name) is not None]
    if given and model.defaults.sampling(sampling).temperature == 0:
        idle = f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect"
        note(f"{idle} while the most likely token is always taken; add --temperature 1")


def note_cut(completion: Completion, max_tokens: int) -> None:
    """Note that a reply ended before the model ended it, and what would let it go on."""
    if completion.finish_reason == "length":
        note(f"stopped at {spell_limit(completion, max_tokens)}")
    elif completion.finish_reason == "repetition":
        note("stopped by --watchdog: the reply went round in circles; a --temperature or --frequency-penalty may help")


def spell_limit(completion: Completion, max_tokens: int) -> str:
    """Return the limit at which a reply was cut off."""
    if len(completion.tokens) >= max_tokens:
        return f"--max-tokens {max_tokens}"
    return f"the end of the context, {len(completion.prompt_tokens) + len(completion.tokens)} tokens (--context)"


def conversation(text: str, system: str | None, parts: Sequence[Part] = ()) -> list[dict[str, Any]]:
    """Return the messages of a first turn, files before its text."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": with_media(text, parts)}]


def as_object(completion: Completion, load_s: float, *, wants_top_logits: bool) -> dict[str, Any]:
    """Return a completion as the object that --json prints; times in seconds."""
    metrics = completion.metrics
    found: dict[str, Any] = {
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
        "text": completion.text,
        "reasoning": completion.reasoning,
        "tool_calls": [{"name": call.name, "arguments": call.parsed} for call in completion.tool_calls],
        "finish_reason": completion.finish_reason,
    }
    if wants_top_logits:
        found["top_logits"] = completion.prompt.top_logits
    if completion.logprobs:
        found["logprobs"] = [{"id": one.token, "logprob": one.logprob, "top": one.top} for one in completion.logprobs]
    found["timings"] = {
        "load_s": load_s,
        "prefill_tokens": metrics.prefill_tokens,
        "prefill_s": metrics.ttft_s,
        "decode_tokens": metrics.decode_tokens,
        "decode_s": metrics.decode_s,
        "drafted_tokens": metrics.drafted_tokens,
        "accepted_tokens": metrics.accepted_tokens,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    return found


def show_details(completion: Completion, tokenizer: Tokenizer) -> None:
    """Show on stderr what was asked beside the text, and on a terminal how fast it came."""
    if completion.prompt.top_logits:
        say("best logits after the prompt:")
        for token, value in completion.prompt.top_logits:
            say(f"  {value:8.3f}  {token:6}  {tokenizer.piece(token)!r}")
    if completion.logprobs:
        say("log-probabilities of the reply's tokens, and the best at each place:")
    for one in completion.logprobs:
        best = ", ".join(f"{tokenizer.piece(token)!r} {value:.3f}" for token, value in one.top)
        say(f"  {one.logprob:8.3f}  {one.token:6}  {tokenizer.piece(one.token)!r}  {best}")
    spent = completion.metrics
    drafts = spell_drafts(spent.drafted_tokens, spent.accepted_tokens)
    remark(
        f"prompt {len(completion.prompt_tokens)} tokens, {spell_rate(spent.prefill_tokens, spent.ttft_s)}; "
        f"reply {len(completion.tokens)} tokens, {spell_rate(spent.decode_tokens, spent.decode_s)}{drafts}; "
        f"end: {completion.finish_reason}",
        on_terminal=True,
    )
