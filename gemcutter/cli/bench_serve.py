"""`gemcutter bench-serve`: how a server does under a load.

Owns the options, what is printed and the files of results. Refuses to know definitions: read `gemcutter/bench_serve/metrics.py`
for those, `report.py` there for the fields. Imports no torch.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.bench_serve import files, generated
from gemcutter.bench_serve.client import Target, normal_url
from gemcutter.bench_serve.plot import check_plot, plot
from gemcutter.bench_serve.report import Outcome, Settings, load_fields, parse_limits, sglang_fields, vllm_fields
from gemcutter.bench_serve.session import Plan, bench, choose_model, problems_of
from gemcutter.bench_serve.show import show, show_sweep
from gemcutter.bench_serve.workload import Workload
from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.terminal import finite, note, print_json, progress
from gemcutter.errors import GemcutterError

if TYPE_CHECKING:
    from gemcutter.text.tokenizer import Tokenizer

HELP = """
Put a load on a server of the OpenAI API, and measure what its users would notice.

URL is any server's: gemcutter's, vLLM's, sglang's, llama.cpp's. Requests are sent at their times whether earlier ones have been
answered or not; what the client itself adds (lateness of its loop, waiting for --max-concurrency) is told apart. A request that
fails is counted, leaves the latencies, and makes the exit code 1.

Workloads: random (exact lengths), generated-shared-prefix or gsp (groups that share a long beginning), conversations (turns whose
history is what the model really replied), image, and from files on this machine sharegpt and jsonl. Generated text is drawn from
the vocabulary of --tokenizer, the model that is served. jsonl has an object a line, with prompt, messages or turns, and maybe
output_len.

Definitions are those of sglang.bench_serving and vllm bench serve, which differ in what counts as the first chunk. The table that
is printed and --output-format sglang follow the former, --output-format vllm the latter.
"""
EXAMPLES = """\b
Examples:
  gemcutter bench-serve http://127.0.0.1:8000 --tokenizer demo --num-prompts 16 --request-rate 4
  gemcutter bench-serve http://127.0.0.1:8000 --tokenizer ./model --preset 5k+5k+800 --num-prompts 64
  gemcutter bench-serve http://127.0.0.1:8000 --tokenizer ./model --request-rate 1,2,4,8 --plot latency.svg
  gemcutter bench-serve http://127.0.0.1:8000 --dataset-name jsonl --dataset-path questions.jsonl --max-concurrency 8
  gemcutter bench-serve http://127.0.0.1:8000 --tokenizer ./model --goodput ttft:500,tpot:50 --output-file results.jsonl
"""
KEY = "GEMCUTTER_API_KEY"
GSP = "generated-shared-prefix"
DATASETS = ("random", GSP, "conversations", "image", "sharegpt", "jsonl")
FORMATS: dict[str, Callable[..., dict[str, Any]]] = {"sglang": sglang_fields, "vllm": vllm_fields}
BOTH = "both"
GROUPS = PER_GROUP = 8
LENGTHS = (2048, 128, 256)  # of the shared beginning, the question and the reply
PRESETS = {"5k+5k+800": (5000, 5000, 800), "500+500+80": (500, 500, 80)}
PRESET_RATES = {"5k+5k+800": "1", "500+500+80": "0.1"}


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked."""

    dataset_name: Annotated[
        str, typer.Option(metavar="NAME", help=f"Workload: {', '.join(DATASETS)}; gsp is short for the second.")
    ] = "random"
    dataset_path: Annotated[Path | None, typer.Option(metavar="FILE", help="File of sharegpt or jsonl.")] = None
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(PRESETS),
            help="Shared prefixes of these lengths (beginning, question, reply), at 1 and 0.1 requests a second; other options "
            "win.",
            show_default=False,
        ),
    ] = None
    num_prompts: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Requests, or conversations.  [default: 64; groups x prompts of gsp]"),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help='Whose tokenizer counts and draws text: a folder with tokenizer.json, a .gguf file or "demo".'
        ),
    ] = None
    tokenize_prompt: Annotated[
        bool, typer.Option("--tokenize-prompt", help="Send prompts as token ids; needs --api completions.")
    ] = False
    random_input_len: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a prompt of random and image.")] = 1024
    random_output_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of its reply.")] = 128
    random_range_ratio: Annotated[
        float,
        typer.Option(metavar="R", min=0.0, max=1.0, help="Lengths of random are from R to 1 times these; 1: exactly these."),
    ] = 1.0
    gsp_num_groups: Annotated[int | None, typer.Option(metavar="N", min=1, help=f"Groups of gsp.  [default: {GROUPS}]")] = None
    gsp_prompts_per_group: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Requests of each.  [default: {PER_GROUP}]")
    ] = None
    gsp_system_prompt_len: Annotated[
        int | None, typer.Option(metavar="N", min=2, help=f"Tokens that a group shares.  [default: {LENGTHS[0]}]")
    ] = None
    gsp_question_len: Annotated[
        int | None, typer.Option(metavar="N", min=2, help=f"Tokens of a question.  [default: {LENGTHS[1]}]")
    ] = None
    gsp_output_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Tokens of its reply.  [default: {LENGTHS[2]}]")
    ] = None
    gsp_range_ratio: Annotated[
        float, typer.Option(metavar="R", min=0.0, max=1.0, help="Lengths of gsp are from R to 1 times these.")
    ] = 1.0
    gsp_ordered: Annotated[bool, typer.Option("--gsp-ordered", help="Send one group after the other, not in random order.")] = (
        False
    )
    num_turns: Annotated[
        int, typer.Option(metavar="N", min=1, help="Turns of a conversation; the first has --random-input-len.")
    ] = 4
    question_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of its later turns.")] = 64
    image_count: Annotated[int, typer.Option(metavar="N", min=1, help="Images of a request.")] = 1
    image_resolution: Annotated[str, typer.Option(metavar="WxH", help="Their size in pixels.")] = "512x512"
    image_format: Annotated[str, typer.Option(metavar="jpeg|png", help="How they are packed.")] = "jpeg"
    sharegpt_output_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of a reply of sharegpt.  [default: as in the file]")
    ] = None


@dataclass(frozen=True, slots=True)
class Sending:
    """When and how."""

    model: Annotated[str, typer.Option(metavar="NAME", help="Served model.  [default: the first of /v1/models]")] = ""
    api: Annotated[str, typer.Option(metavar="chat|completions", help="Route to send to.")] = "chat"
    request_rate: Annotated[
        str | None, typer.Option(metavar="R[,R...]", help="Requests a second; several are run one by one.  [default: inf]")
    ] = None
    burstiness: Annotated[
        float, typer.Option(metavar="B", help="1: Poisson arrivals; below 1: bursts; inf: fixed intervals.")
    ] = 1.0
    exact_rate: Annotated[
        bool, typer.Option("--exact-rate", help="Scale arrivals so that they take exactly N / R seconds, as vLLM does.")
    ] = False
    max_concurrency: Annotated[int | None, typer.Option(metavar="N", min=1, help="Requests that are sent at once.")] = None
    warmup_requests: Annotated[int, typer.Option(metavar="N", min=0, help="Requests before the measured ones.")] = 1
    flush_cache: Annotated[bool, typer.Option("--flush-cache", help="Empty the server's prefix cache after them.")] = False
    ignore_eos: Annotated[bool, typer.Option(help="Ask for replies of exactly the wanted length.")] = True
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="Temperature of requests.")] = 0.0
    extra_request_body: Annotated[str, typer.Option(metavar="JSON", help="Object that is added to every request.")] = "{}"
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same texts and arrivals.")] = 42
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar=KEY, show_envvar=True, help="Key of the server.", show_default=False)
    ] = None
    timeout: Annotated[float, typer.Option(metavar="S", min=0.1, help="Seconds without a byte after which a request fails.")] = (
        3600.0
    )


@dataclass(frozen=True, slots=True)
class Telling:
    """What is told of it."""

    goodput: Annotated[
        str, typer.Option(metavar="ttft:MS,tpot:MS,e2el:MS", help="Count requests that keep within these limits.")
    ] = ""
    metric_percentiles: Annotated[str, typer.Option(metavar="P,...", help="Percentiles in vLLM's fields.")] = "99"
    output_format: Annotated[
        str, typer.Option(metavar="sglang|vllm|both", help="Fields of the JSON; both: an object of each, and one of the load.")
    ] = BOTH
    output_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a JSON object a run to this file.", show_default=False)
    ] = None
    output_details: Annotated[bool, typer.Option("--output-details", help="Add lists with a value for each request.")] = False
    tag: Annotated[str | None, typer.Option(metavar="TEXT", help="Note in the JSON.", show_default=False)] = None
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw latency against rate (.svg, .png, .pdf).", show_default=False)
    ] = None


Url = Annotated[str, typer.Argument(metavar="URL", help="Address of the server, such as http://127.0.0.1:8000.")]


@options.spread
def bench_serve(url: Url, *, asking: Asking, sending: Sending, telling: Telling, as_json: options.Json = False) -> None:
    """Run the load at each rate and print what came of it. Raises UsageError or GemcutterError; failed requests are one."""
    asking, sending = _with_preset(asking, sending)
    rates = _read_rates(sending.request_rate or "inf")
    target, settings = _read_target(url, sending), _read_settings(asking, sending, telling)
    plan = Plan(settings, sending.seed, sending.warmup_requests, sending.exact_rate, sending.flush_cache)
    if telling.plot is not None:
        check_plot(telling.plot)
    tokenizer = None if asking.tokenizer is None else _read_tokenizer(asking.tokenizer)
    count = None if tokenizer is None else lambda text: len(tokenizer.encode_plain(text))
    target = asyncio.run(choose_model(target))
    outcomes = list[Outcome]()
    for number, rate in enumerate(rates):
        # Each rate has texts of its own: what a server has cached of the run before would speed up the next.
        workload = make_workload(asking, tokenizer, sending.seed + number)
        how = replace(settings, model=target.model, request_rate=rate, num_prompts=len(workload.requests), date=_now())
        with progress(f"{rate:g} requests/s") as advance:
            outcome = asyncio.run(bench(target, workload, replace(plan, settings=how), count, advance))
        outcomes.append(outcome)
        if telling.output_file is not None:
            _append(telling.output_file, _fields(outcome, telling))
        if not as_json:
            print(show(outcome) + ("\n" if len(rates) > 1 else ""))
    _tell(outcomes, telling, as_json=as_json)
    if problems := [problem for outcome in outcomes for problem in problems_of(outcome)]:
        failed, sent = sum(len(each.failed) for each in outcomes), sum(len(each.run.replies) for each in outcomes)
        raise GemcutterError(f"{failed} of {sent} requests failed; the numbers are those of the others", problems)


def _tell(outcomes: list[Outcome], telling: Telling, *, as_json: bool) -> None:
    if as_json:
        found = [_fields(each, telling) for each in outcomes]
        print_json(found[0] if len(found) == 1 else found)
    elif len(outcomes) > 1:
        print(show_sweep(outcomes))
    if telling.plot is not None:
        plot(outcomes, telling.plot)
        note(f"{telling.plot} shows latency against rate")


def _fields(outcome: Outcome, telling: Telling) -> dict[str, Any]:
    """Return the JSON of a run in the fields that were asked for."""
    if telling.output_format != BOTH:
        return FORMATS[telling.output_format](outcome, details=telling.output_details)
    found = {name: fields(outcome, details=telling.output_details) for name, fields in FORMATS.items()}
    return {**found, "load": load_fields(outcome)}


def _append(path: Path, found: dict[str, Any]) -> None:
    """Add a line to a file of results."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(found), allow_nan=False) + "\n")


def _now() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S")  # as vLLM writes it


def _with_preset(asking: Asking, sending: Sending) -> tuple[Asking, Sending]:
    """Return the options with a preset's workload and rate; the rate where none was asked for. Raises UsageError."""
    if asking.preset is not None:
        if asking.preset not in PRESETS:
            raise UsageError(f"--preset: expected one of {', '.join(PRESETS)}, found {asking.preset!r}")
        sending = replace(sending, request_rate=sending.request_rate or PRESET_RATES[asking.preset])
        asking = replace(asking, dataset_name=GSP)
    if asking.dataset_name == "gsp":
        asking = replace(asking, dataset_name=GSP)
    if asking.dataset_name not in DATASETS:
        raise UsageError(f"--dataset-name: expected one of {', '.join(DATASETS)}, found {asking.dataset_name!r}")
    return asking, sending


def _read_rates(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(rate > 0 for rate in found):
        raise UsageError(f"--request-rate: expected requests a second, such as 0.5, 1,2,4 or inf, found {text!r}")
    return found


def _read_target(url: str, sending: Sending) -> Target:
    """Return the server, and how it is asked. Raises UsageError that names the option."""
    if sending.api not in ("chat", "completions"):
        raise UsageError(f"--api: expected chat or completions, found {sending.api!r}")
    if not sending.burstiness > 0:
        raise UsageError(f"--burstiness: expected a number above 0, or inf, found {sending.burstiness:g}")
    try:
        body = json.loads(sending.extra_request_body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UsageError(f"--extra-request-body: expected a JSON object, found {sending.extra_request_body!r}")
    return Target(
        normal_url(url),
        sending.model,
        "chat" if sending.api == "chat" else "completions",
        sending.api_key or os.environ.get("OPENAI_API_KEY"),
        sending.ignore_eos,
        sending.temperature,
        body,
        sending.timeout,
    )


def _read_settings(asking: Asking, sending: Sending, telling: Telling) -> Settings:
    """Return what results carry. Raises UsageError that names the option."""
    if telling.output_format not in (*FORMATS, BOTH):
        raise UsageError(f"--output-format: expected one of {', '.join((*FORMATS, BOTH))}, found {telling.output_format!r}")
    try:
        limits = parse_limits(telling.goodput)
    except ValueError as error:
        raise UsageError(f"--goodput: {error}") from None
    try:
        percentiles = [float(word) for word in telling.metric_percentiles.split(",")]
    except ValueError:
        percentiles = [math.nan]
    if not all(0 <= percent <= 100 for percent in percentiles):
        raise UsageError(f"--metric-percentiles: expected numbers up to 100 with commas, found {telling.metric_percentiles!r}")
    is_random = asking.dataset_name in ("random", "image")
    return Settings(
        model=sending.model,
        api=sending.api,
        dataset_name=asking.dataset_name,
        num_prompts=0,
        request_rate=math.inf,
        burstiness=sending.burstiness,
        max_concurrency=sending.max_concurrency,
        tokenizer=asking.tokenizer,
        tag=telling.tag,
        input_len=asking.random_input_len if is_random else None,
        output_len=asking.random_output_len if is_random else None,
        range_ratio=asking.random_range_ratio if is_random else None,
        sharegpt_output_len=asking.sharegpt_output_len,
        goodput_ms=limits,
        percentiles=percentiles,
    )


def _read_tokenizer(model: str) -> Tokenizer:
    """Return a tokenizer from this machine: of a checkpoint, of which nothing else is read, or of a folder that has no more.

    Raises UsageError for a hub id, whose weights would be downloaded for it.
    """
    from gemcutter.checkpoint.container.source import Source
    from gemcutter.checkpoint.remote.hub import parse
    from gemcutter.text.tokenizer import Tokenizer
    from gemcutter.text.tokenizer_parts import TOKENIZER
    from gemcutter.text_assets import read_tokenizer

    path = parse(model)
    if not isinstance(path, Path):
        raise UsageError(f"--tokenizer: expected a folder or file on this machine, found the hub id {model!r}; download it first")
    return Tokenizer.load(path) if (path / TOKENIZER).is_file() else read_tokenizer(Source.open(path))


def make_workload(asking: Asking, tokenizer: Tokenizer | None, seed: int) -> Workload:
    """Return the requests that were asked for. Raises UsageError for options that do not fit, GemcutterError for bad files."""
    name, count = asking.dataset_name, asking.num_prompts or 64
    if name in ("sharegpt", "jsonl"):
        if asking.dataset_path is None:
            raise UsageError(f"--dataset-name {name} needs --dataset-path, a file on this machine")
        if name == "sharegpt":
            return files.share_gpt(asking.dataset_path, count, seed, tokenizer, asking.sharegpt_output_len)
        return files.own_lines(asking.dataset_path, asking.num_prompts, tokenizer, asking.random_output_len)
    if tokenizer is None:
        raise UsageError(f"--dataset-name {name} draws text from a vocabulary: give --tokenizer, the model that is served")
    source = generated.TextSource(tokenizer, seed, as_ids=asking.tokenize_prompt)
    input_len, output_len = asking.random_input_len, asking.random_output_len
    if name == "random":
        return generated.random_workload(source, count, input_len, output_len, asking.random_range_ratio)
    if name == "conversations":
        return generated.conversations(source, count, asking.num_turns, input_len, asking.question_len, output_len)
    if name == "image":
        size, kind = _read_image(asking)
        return generated.image_workload(source, count, asking.image_count, size, input_len, output_len, kind)
    return generated.shared_prefixes(source, _read_shape(asking))


def _read_image(asking: Asking) -> tuple[tuple[int, int], str]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", asking.image_resolution)
    if found is None or not int(found[1]) * int(found[2]):
        raise UsageError(f"--image-resolution: expected width and height such as 640x480, found {asking.image_resolution!r}")
    if asking.image_format not in ("jpeg", "png"):
        raise UsageError(f"--image-format: expected jpeg or png, found {asking.image_format!r}")
    return (int(found[1]), int(found[2])), asking.image_format


def _read_shape(asking: Asking) -> generated.SharedPrefixes:
    """Return the groups; --num-prompts says how many requests each has. Raises UsageError where that does not come out even."""
    usual = PRESETS.get(asking.preset or "", LENGTHS)
    asked = (asking.gsp_system_prompt_len, asking.gsp_question_len, asking.gsp_output_len)
    system_prompt_len, question_len, output_len = (given or length for given, length in zip(asked, usual, strict=True))
    groups, total = asking.gsp_num_groups or GROUPS, asking.num_prompts
    per_group = asking.gsp_prompts_per_group or (PER_GROUP if total is None else max(total // groups, 1))
    if total not in (None, groups * per_group):
        raise UsageError(f"--num-prompts {total} is not {groups} groups of {per_group}: leave it out, or change --gsp-num-groups")
    return generated.SharedPrefixes(
        groups, per_group, system_prompt_len, question_len, output_len, asking.gsp_range_ratio, asking.gsp_ordered
    )
