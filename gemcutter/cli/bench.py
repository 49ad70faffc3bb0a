"""`gemcutter bench`: how fast a model runs on this machine, beside what the machine allows.

Owns the options and the progress line; the measuring is in `gemcutter/benchmark/`. Refuses to know what a test or a ceiling is;
read `benchmark/report.py` for that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.loading import close_with_command, use_threads
from gemcutter.cli.terminal import note, print_json, progress
from gemcutter.errors import GemcutterError, RequestError
from gemcutter.quant_names import RECIPE_NAMES, find_quant

if TYPE_CHECKING:
    from gemcutter.benchmark.target import BenchTarget

HELP = """
Measure speed and memory on this machine, each beside its physical limit.

The model is MODEL, or --preset: the geometry of a released size (tiny:E2B is a narrow one) with synthetic weights, which are
made in memory, so that nothing is downloaded; speed does not depend on their values. --quant says how these are stored: q4_0
(with a Q6_K head), q8_0, mxfp4 and iq4_xs as llama.cpp's files, mlx4 as mlx-lm's, bf16 dense.

pp512 is a prompt of 512 tokens until the next one is chosen; tg128 are 128 tokens of a reply, one at a time; tg128@d16384 the
same behind 16384 positions that are there already, tg128x8 eight such replies side by side. Sizes may be listed: -p 512 2048,
or -p 512,2048. The ceiling of a reply is the measured read bandwidth over the bytes that a token must read: the weights as they
are held, of experts the chosen ones, and visible keys and values. The ceiling of a prompt is the best measured rate of the
processor's multiplying instructions over the operations that it needs. Speeds are medians; a run that lost cores to other
programs is repeated, and told. TTFT is the time to the first token of a prompt, TPOT the time per
output token of a reply.

With --speculate or --draft-model, replies are decoded with drafts, and the same ones without, in turns; the ceiling stays that
of one token a step. Of a MODEL, what is decoded is real: greedy replies to questions that the tokenizer and chat template make
prompts of, past their ends, other questions in each run. The text of a --preset is noise, of which nobody guesses anything: its
drafts take the time of its size's assistant with synthetic weights, and are replaced by known tokens that are right at each
place as often as --acceptance says. That is a replay, and tells nothing of how often a real assistant is right.
"""
EXAMPLES = """\b
Examples:
  gemcutter bench --preset E2B --quant q4_0 -p 512 2048 -n 128
  gemcutter bench --preset 26B-A4B --layers 6 -p 512 -n 32 --breakdown
  gemcutter bench gemma-4-E2B-it-Q4_0.gguf -p 512 -n 64 --depth 0 16384 --json
  gemcutter bench --preset E2B -p 0 -n 128 --batch 1 4 8 --acceptance .80 .65 .50 .40
  gemcutter bench ./gemma-4-E2B-it --quant q4 -p 0 -n 128 --draft-model ./gemma-4-E2B-it-assistant
"""
LISTS = ("-p", "--prompt", "-n", "--tokens", "--depth", "--batch", "--acceptance")
PRESET_QUANT = "q4_0"
QUANTS = ("q4_0", "mlx4", "q8_0", "bf16", "q4", "q8", "mlx8", "mxfp4", "iq4_xs")


def join_values(words: list[str]) -> list[str]:
    """Join the numbers after each list option with commas (-p 512 2048): no model is called by digits alone."""
    joined, in_list = list[str](), False
    for word in words:
        is_value = word.replace(",", "").replace(".", "").isdecimal()
        if is_value and in_list and joined[-1] not in LISTS:
            joined[-1] += f",{word}"
            continue
        in_list = word in LISTS or (in_list and is_value)
        joined.append(word)
    return joined


Prompt = Annotated[str, typer.Option("-p", "--prompt", metavar="N...", help="Rows of prompts; 0: none.")]
Tokens = Annotated[str, typer.Option("-n", "--tokens", metavar="N...", help="Tokens of replies; 0: none.")]
Depth = Annotated[str, typer.Option(metavar="N...", help="Positions that are filled before a test.")]
Batch = Annotated[str, typer.Option(metavar="N...", help="Sequences that get their replies side by side.")]
Repeats = Annotated[int, typer.Option("-r", "--repeats", metavar="N", min=1, help="Runs of each test.")]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help='Folder, .safetensors or .gguf file, hub id (owner/name), or "demo".', show_default=False
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same as MODEL.", show_default=False)]
Preset = Annotated[
    str | None, typer.Option(metavar="E2B|E4B|12B|26B-A4B|31B", help="Geometry of synthetic weights.", show_default=False)
]
Layers = Annotated[int | None, typer.Option(metavar="N", min=1, help="The preset's first N layers only.", show_default=False)]
Level = Annotated[
    str | None,
    typer.Option(
        metavar="portable|avx2|avx_vnni|avx512|avx512_bf16|amx|neon|neon_i8mm",
        help="Native kernels of this level.  [default: the best]",
        show_default=False,
    ),
]
Rows = Annotated[int, typer.Option(metavar="N", min=1, help="Rows of one step, the chunk of a long prompt.")]
Acceptance = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE...",
        help="Of a --preset: replay drafts that are right at the first, second, ... place in such shares of all bursts, given "
        "nothing about the places before.",
        show_default=False,
    ),
]
Breakdown = Annotated[bool, typer.Option("--breakdown", help="Also show how long each op takes.")]


@options.spread
def bench(
    model: ModelArgument = None,
    *,
    model_option: ModelOption = None,
    preset: Preset = None,
    layers: Layers = None,
    prompt: Prompt = "512",
    tokens: Tokens = "128",
    depth: Depth = "0",
    repeats: Repeats = 3,
    batch: Batch = "1",
    loading: options.Loading,
    kv: options.Kv = None,
    speculating: options.Speculating,
    acceptance: Acceptance = None,
    level: Level = None,
    rows: Rows = 512,
    breakdown: Breakdown = False,
    as_json: options.Json = False,
) -> None:
    """Measure one model and print a table, or one JSON object. Raises UsageError or GemcutterError."""
    given = [each for each in (model, model_option, preset) if each is not None]
    if len(given) != 1:
        raise UsageError("give either MODEL or --preset")
    model = model or model_option
    if model is not None and layers is not None:
        raise UsageError("--layers shapes a --preset; a MODEL is what it is")
    quant = check_quant(loading.quant, is_preset=model is None)
    sizes = [read_sizes(name, text) for name, text in (("-p", prompt), ("-n", tokens), ("--depth", depth), ("--batch", batch))]
    if model is None:
        loading = replace(loading, quant=None)
        if ignored := [name for name in ("adapter", "repack_cache", "ignore") if getattr(loading, name)]:
            raise UsageError(f"--{ignored[0].replace('_', '-')} is about a MODEL; a --preset has no files")
        if loading.tensor_parallel * loading.pipeline_parallel > 1:
            raise UsageError("--tensor-parallel and --pipeline-parallel are about a MODEL; a --preset is made in one process")
        check_replay(speculating, acceptance)
    elif acceptance is not None:
        raise UsageError("--acceptance replays drafts on a --preset; those of a MODEL are its assistant's own: leave it out")
    shares = None if acceptance is None else read_shares(acceptance)
    guessing = {} if model is None else speculating.given | {"max_num_seqs": max((1, *sizes[3]))}
    how = loading.options(model or str(preset), kv=kv, **guessing)

    from gemcutter import native
    from gemcutter.benchmark.cold_start import first_token_s
    from gemcutter.benchmark.drafts import set_up_replay
    from gemcutter.benchmark.harness import list_cases
    from gemcutter.benchmark.report import measure, show
    from gemcutter.benchmark.target import from_file, from_preset

    if level is not None:
        native.set_level(level.lower())
    use_threads(loading.threads)
    tests = list_cases(*sizes)
    if preset is None:
        subject = with_questions(from_file(how), any(test.depth for test in tests))
    else:
        subject = from_preset(preset, quant or PRESET_QUANT, layers, how)
        if shares is not None:
            replay = set_up_replay(preset, subject.quant, subject.decoder, how, shares, speculating.draft_tokens)
            subject = replace(subject, drafts=replay)
    close_with_command(subject.close)
    for line in subject.notes:
        note(line)
    with progress("measuring") as advance:
        found = measure(subject, tests, repeats, max_rows=rows, with_breakdown=breakdown, progress=advance)
    if model is not None and how.device == "cpu":
        try:
            found["first_token_s"], found["first_text_s"] = first_token_s(how, found["threads"])
        except GemcutterError as error:
            note(str(error))
    if as_json:
        print_json(found)
    else:
        print(show(found))


def check_replay(speculating: options.Speculating, acceptance: str | None) -> None:
    """Raise UsageError for options of drafts that a preset can't carry out."""
    mode = speculating.speculate
    if speculating.draft_model is not None:
        raise UsageError("--draft-model is about a MODEL; a --preset gets its size's assistant, with synthetic weights")
    if mode in ("auto", "ngram"):
        raise UsageError(f"--speculate {mode}: the text of a --preset is noise, in which lookups find nothing; use mtp")
    if mode == "off" and acceptance is not None:
        raise UsageError("give either --speculate off or --acceptance")
    if acceptance is None and (mode == "mtp" or speculating.draft_tokens is not None):
        raise UsageError(
            "of synthetic weights no draft is right: say with --acceptance how often drafts are to be right at each place, "
            "such as --acceptance .80 .65 .50 .40"
        )


def with_questions(subject: BenchTarget, is_deep: bool) -> BenchTarget:
    """Let a model whose drafts are measured answer questions, since drafts depend on the text.

    Raises UsageError for tests behind a context that is no text, GemcutterError for a model without a tokenizer.
    """
    if subject.drafts is None or subject.checkpoint is None:
        return subject
    if is_deep:
        raise UsageError("--depth fills contexts with no text, on which drafts depend: leave out --depth, or --speculate")
    from gemcutter.cli.bench_questions import QUESTIONS, encode_questions

    about = {**subject.drafts.about, "text": f"{len(QUESTIONS)} questions, past their ends"}
    prompts = encode_questions(subject.checkpoint, subject.how.chat_template)
    return replace(subject, drafts=replace(subject.drafts, prompts=prompts, about=about))


def read_shares(text: str) -> tuple[float, ...]:
    """Read how often drafts are right at each place. Raises UsageError."""
    from gemcutter.benchmark.replay import check_acceptance

    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--acceptance: expected shares with commas between them, found {text!r}") from None
    try:
        return check_acceptance(shares)
    except RequestError as error:
        raise UsageError(f"--{error}") from None


def check_quant(name: str | None, *, is_preset: bool) -> str | None:
    """Return how a preset's synthetic weights are stored, or how a model's are quantized while loading. Raises UsageError."""
    try:
        return None if name is None else find_quant(name, QUANTS if is_preset else RECIPE_NAMES)
    except GemcutterError as error:
        raise UsageError(f"--{error}") from None


def read_sizes(option: str, text: str) -> tuple[int, ...]:
    """Read a list of counts. Raises UsageError that names the option."""
    sizes = options.parse_integers(option, text)
    if any(size < 0 for size in sizes):
        raise UsageError(f"{option}: expected 0 or more, found {text}")
    return sizes
