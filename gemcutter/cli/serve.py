"""`gemcutter serve`: a model behind the APIs that existing clients speak.

Owns the command line, the port and the end of the process. The port is taken at once and opens when requests can be served; the
first SIGTERM or interrupt lets running requests end, the second ends them. Refuses to know routes. Read `server/app.py` for
those, `server/options.py` for the limits.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.loading import load_model, spell_how
from gemcutter.cli.serve_replicas import Scaling, serve_replicas
from gemcutter.cli.terminal import Volume, say, spell_bytes, volume
from gemcutter.errors import CapacityError, RankError, RequestError
from gemcutter.load_options import AUTO_MEDIA
from gemcutter.media_parts import KINDS
from gemcutter.server.options import MIB, ServerOptions

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from gemcutter.api import Model

HELP = """
Serve a model to OpenAI's and Anthropic's clients.

The port is taken at once and opens when the model is loaded. /health answers while the process lives, /ready while requests are
taken. SIGTERM lets running requests end; a second one ends them. Any client of the OpenAI API works with the base URL that is
printed at the start.
"""
EXAMPLES = """\b
Examples:
  gemcutter serve demo
  gemcutter serve google/gemma-4-E4B-it --quant q4 --host 0.0.0.0 --api-key "$KEY"
  gemcutter serve ./gemma-4-26B-A4B-it-4bit --served-model-name gemma --served-model-name '*'
  gemcutter serve ./gemma-4-E4B-it --ray --replicas 2 --max-replicas 8 --threads 16
"""
KEY = "GEMCUTTER_API_KEY"
GIVE_UP_S = 2.0  # that requests have to end with an error of their own when the model can't go on
KEEP_ALIVE_S = 120  # agents think longer than uvicorn's 5 s between two requests on one connection
DEFAULTS = ServerOptions()
LIMITED = {"image": "max_images", "audio": "max_sounds", "video": "max_videos"}  # kinds of --limit-mm-per-prompt
MOST_SPELLED = ",".join(f"{kind}={getattr(DEFAULTS, name)}" for kind, name in LIMITED.items())
SPECULATIVE_KEYS = {"method", "model", "num_speculative_tokens"}
METHODS = {"mtp": "mtp", "ngram": "ngram", "draft_model": "mtp", "gemma4_mtp": "mtp"}  # vLLM's, and what they are here


@options.spread
def serve(
    model: options.Model,
    *,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Listen on this address; 0.0.0.0 on all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Listen on this port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", envvar=KEY, help="Demand this key, as a bearer token or as x-api-key; repeatable."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name in requests, the first one its own, '*' for any; repeatable.  [default: MODEL]"),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", "--context", metavar="TOKENS", min=1, help="Room for a prompt and its reply."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that run at once; others wait.")] = 8,
    max_num_batched_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of one step.")] = 512,
    max_stall_ms: Annotated[
        float, typer.Option(metavar="MS", min=0, help="How long a step may hold up running replies; 0: as long as it takes.")
    ] = 200.0,
    enable_lora: Annotated[bool, typer.Option("--enable-lora", help="Accepted; --lora-modules is enough.")] = False,
    lora_modules: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Adapter that requests may name as their model; repeatable.")
    ] = None,
    lora_root: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Let requests load the adapters in it while the model serves.")
    ] = None,
    default_chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="What chat templates are told, unless requests say otherwise."),
    ] = None,
    reasoning_field: Annotated[
        str, typer.Option(metavar="reasoning_content|reasoning|both", help="The field that thoughts travel in.")
    ] = DEFAULTS.reasoning_field,
    strict_tool_deltas: Annotated[
        bool, typer.Option("--strict-tool-deltas", help="Repeat id, type and name in every delta of a call.")
    ] = False,
    bos_for_token_prompts: Annotated[
        str, typer.Option(metavar="auto|never", help="Put an unseen <bos> before prompts of token ids that lack it.")
    ] = DEFAULTS.bos_for_token_prompts,
    enable_tokenizer_info_endpoint: Annotated[
        bool, typer.Option("--enable-tokenizer-info-endpoint", help="Answer /tokenizer_info; lm-eval then leaves <bos> out.")
    ] = False,
    max_queue: Annotated[int, typer.Option(metavar="N", min=0, help="Requests that may wait; more are told to retry.")] = (
        DEFAULTS.max_queue
    ),
    max_queued_tokens: Annotated[
        int, typer.Option(metavar="TOKENS", min=1, help="Prompt tokens that may wait.")
    ] = DEFAULTS.max_queued_tokens,
    responses_store_mb: Annotated[
        int, typer.Option(metavar="MB", min=0, help="Keep responses for previous_response_id, so much of them; 0: none.")
    ] = 0,
    media: options.MediaOfServer = None,
    language_model_only: Annotated[bool, typer.Option("--language-model-only", help="The same as --media none.")] = False,
    limit_mm_per_prompt: Annotated[
        str | None,
        typer.Option(metavar="image=N,...", help=f"Most of each kind in a request; 0: none.  [default: {MOST_SPELLED}]"),
    ] = None,
    max_soft_tokens: options.Soft = None,
    max_speech: Annotated[
        float, typer.Option(metavar="S", min=1, help="Longest sound that is transcribed.")
    ] = DEFAULTS.max_speech_s,
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Follow addresses of images on this host, *.example.org on those below; repeatable.",
        ),
    ] = None,
    allowed_local_media_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Let requests name images in this folder as file: URLs.")
    ] = None,
    media_timeout: Annotated[float, typer.Option(metavar="S", min=0.1, help="Time to fetch one of them.")] = (
        DEFAULTS.media_timeout_s
    ),
    max_body_mb: Annotated[
        int, typer.Option(metavar="MB", min=1, help="Largest body, and most that is fetched for a request.")
    ] = (DEFAULTS.max_body_bytes // MIB),
    request_timeout: Annotated[float, typer.Option(metavar="S", min=0, help="End requests after so long; 0: never.")] = 0.0,
    shutdown_timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="Time that running requests have after SIGTERM.")
    ] = DEFAULTS.shutdown_timeout_s,
    prefix_cache_bytes: options.PrefixCacheBytes = None,
    prefix_cache_salt_per_key: Annotated[
        bool, typer.Option("--prefix-cache-salt-per-key", help="Reuse what was computed among requests of one API key only.")
    ] = False,
    loading: options.Loading,
    speculating: options.Speculating,
    speculative_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="The same as vLLM spells it: method, model, num_speculative_tokens.")
    ] = None,
    kv: options.Kv = None,
    scaling: Scaling,
) -> None:
    """Load a model and serve it until a signal ends the process. Raises UsageError or GemcutterError."""
    most = _read_most(limit_mm_per_prompt)
    chosen = _server_options(
        names=tuple(served_model_name or [model]),
        api_keys=tuple(api_key or ()),
        template_options=_read_kwargs(default_chat_template_kwargs),
        reasoning_field=reasoning_field,
        strict_tool_deltas=strict_tool_deltas,
        bos_for_token_prompts=bos_for_token_prompts,
        lora_root=lora_root,
        tokenizer_info=enable_tokenizer_info_endpoint,
        max_queue=max_queue,
        max_queued_tokens=max_queued_tokens,
        store_bytes=responses_store_mb * MIB,
        max_body_bytes=max_body_mb * MIB,
        max_soft_tokens=max_soft_tokens,
        max_speech_s=max_speech,
        allowed_media_domains=_read_hosts(allowed_media_domains),
        allowed_local_media_path=allowed_local_media_path,
        media_timeout_s=media_timeout,
        **most,
        request_timeout_s=request_timeout,
        shutdown_timeout_s=shutdown_timeout,
        prefix_cache_salt_per_key=prefix_cache_salt_per_key,
    )
    prefix_bytes = options.parse_bytes("--prefix-cache-bytes", prefix_cache_bytes)
    drafts = speculating.given if speculative_config is None else _read_speculation(speculative_config, speculating)
    adapters = dict(_read_module(each) for each in lora_modules or ())
    limits: dict[str, Any] = {"max_num_seqs": max_num_seqs, "prefix_cache_bytes": prefix_bytes, "adapters": adapters}
    limits |= {"media": _read_media(media, language_model_only, chosen), "context": max_model_len, "kv": kv}
    limits |= {"max_batched_tokens": max_num_batched_tokens, "max_stall_ms": max_stall_ms or None}
    if scaling.ray:
        serve_replicas(loading.options(model, **limits, **drafts), chosen, scaling, loading.threads, (host, port))
        return
    scaling.check_unused()
    create_app = _find_app()
    with _take_port(host, port) as taken:
        loaded = load_model(model, loading, **limits, **drafts)
        with loaded:
            _run(create_app(loaded, chosen), loaded, taken, chosen)


def _find_app() -> Any:
    """Return what makes the application. Raises RequestError, with the remedy, where its packages are absent."""
    try:
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401

        from gemcutter.server.app import create_app
    except ModuleNotFoundError as error:
        raise RequestError(f"serving needs the package {error.name!r}: pip install 'gemcutter[serve]'") from None
    return create_app


def _server_options(**chosen: Any) -> ServerOptions:
    try:
        return ServerOptions(**chosen)
    except RequestError as error:
        named = (problem.split(":", 1) for problem in error.problems)
        raise UsageError("; ".join(f"--{name.replace('_', '-')}:{rest}" for name, rest in named)) from None


def _read_most(text: str | None) -> dict[str, int]:
    """Return how much of each kind a request may hold, as server options; in words or as JSON, as vLLM has it."""
    if text is None:
        return {}
    where, found = "--limit-mm-per-prompt", dict[str, int]()
    words = _read_object(where, text) if text.lstrip().startswith("{") else dict(map(_split_count, text.split(",")))
    for kind, count in words.items():
        if kind not in LIMITED:
            raise UsageError(f"{where}: expected {', '.join(f'{name}=N' for name in LIMITED)}, found {kind!r}")
        if isinstance(count, str) and count.isascii() and count.isdecimal():
            count = int(count)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UsageError(f"{where}: {kind}: expected a number, 0 or more, found {count!r}")
        found[LIMITED[kind]] = count
    return found


def _read_hosts(given: list[str] | None) -> tuple[str, ...]:
    """Return hosts, which may also come in one word with commas. Raises UsageError for what is an address, and not a host."""
    hosts = tuple(word for text in given or () for word in text.replace(",", " ").split())
    if bad := [host for host in hosts if "/" in host or "@" in host or (":" in host and not host.startswith("["))]:
        raise UsageError(f"--allowed-media-domains: expected hosts, such as images.example.org, found {bad[0]!r}")
    return tuple(host.strip("[]") for host in hosts)


def _split_count(word: str) -> tuple[str, str]:
    kind, _, count = word.partition("=")
    return kind.strip(), count.strip()


def _read_media(media: list[str] | None, is_text_only: bool, chosen: ServerOptions) -> tuple[str, ...]:
    """Return which towers to load, as the load option says it."""
    if is_text_only and media not in (None, [options.NO_MEDIA]):
        raise UsageError("--language-model-only: the same as --media none; leave one of them out")
    if is_text_only or media == [options.NO_MEDIA]:
        return ()
    is_auto = media in (None, [], [AUTO_MEDIA])
    kinds = tuple(kind for kind, name in LIMITED.items() if getattr(chosen, name) and (is_auto or kind in (media or ())))
    return (AUTO_MEDIA, *kinds) if kinds and is_auto else kinds


def _read_kwargs(text: str | None) -> tuple[tuple[str, object], ...]:
    return () if text is None else tuple(_read_object("--default-chat-template-kwargs", text).items())


def _read_object(option: str, text: str) -> dict[str, Any]:
    """Return a JSON object. Raises UsageError, naming the option, for anything else."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option}: expected a JSON object, found {text!r} ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{option}: expected a JSON object, found {text!r}")
    return found


def _read_speculation(text: str, other: options.Speculating) -> dict[str, Any]:
    """Return vLLM's object as load options. Raises UsageError, naming what is not known."""
    where = "--speculative-config"
    if any(value is not None for value in other.given.values()):
        raise UsageError(f"{where}: give either it or --speculate, --draft-model and --draft-tokens")
    found = _read_object(where, text)
    if unknown := sorted(set(found) - SPECULATIVE_KEYS):
        raise UsageError(f"{where}: {unknown[0]} is not known; there are: {', '.join(sorted(SPECULATIVE_KEYS))}")
    method = found.get("method", "mtp" if "model" in found else "ngram")
    if method not in METHODS:
        raise UsageError(f"{where}: method: expected one of {', '.join(METHODS)}, found {method!r}")
    count = found.get("num_speculative_tokens")
    return {"speculate": METHODS[method], "draft_model": found.get("model"), "draft_tokens": count}


def _read_module(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--lora-modules: expected NAME=PATH, found {text!r}")
    return name, path


def _take_port(host: str, port: int) -> socket.socket:
    """Return a socket that holds the port; nobody is let in yet. Raises CapacityError where it can't be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CapacityError(f"port {port} of {host} can't be taken ({reason}); choose another one with --port") from None
    return taken


def _run(app: FastAPI, model: Model, taken: socket.socket, chosen: ServerOptions) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Announces itself once it listens, and lets requests end when it is told to stop."""

        problem: str | None = None

        def give_up(self, problem: str) -> None:
            """End because the model can't go on; any thread may say so."""
            self.problem = problem
            self._loop.call_soon_threadsafe(app.state.service.drain, GIVE_UP_S)
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self._loop = asyncio.get_running_loop()
            if self.started:
                announce(model, taken, chosen)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:
                self._loop.call_soon_threadsafe(app.state.service.drain, chosen.shutdown_timeout_s)
            super().handle_exit(sig, frame)

    is_verbose = volume() is Volume.VERBOSE
    config = uvicorn.Config(
        app,
        log_level="info" if is_verbose else "warning",
        access_log=is_verbose,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(chosen.shutdown_timeout_s) + 2,
        server_header=False,
    )
    server = Server(config)
    if model.decoder.leader is not None:
        model.decoder.leader.watch(server.give_up)
    server.run([taken])
    if server.problem is not None:
        raise RankError(server.problem)


def announce(model: Model, taken: socket.socket, chosen: ServerOptions) -> None:
    """Print on stderr what is served, what it takes, and how to ask."""
    if volume() is Volume.QUIET:
        return
    host, port = taken.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else shown}:{port}/v1"
    name, engine = chosen.name, model.engine
    weights = sum(each.nbytes for each in model.decoder.params.values())
    weights += 0 if model.media is None else model.media.weight_bytes
    names = ", ".join((*chosen.names, *model.adapters))
    say(f"{name}: {spell_how(model)}, {engine.scheduler.max_num_seqs} requests at once")
    prefixes = engine.prefix
    cached = f"{spell_bytes(prefixes.most_bytes)} of it for prefixes to reuse" if prefixes.is_on else "no prefix is reused"
    say(f"memory: {spell_bytes(weights)} of weights, {spell_bytes(engine.pool.nbytes)} of cache, {cached}")
    read = " and ".join(f"{getattr(chosen, LIMITED[kind])} {KINDS[kind][1]}" for kind in model.kinds)
    say(f"reads text, and at most {read} in a request" if read else "reads text alone")
    say(f"serving on {url} as {names}" + (f" (on all addresses, port {port})" if host in ("0.0.0.0", "::") else ""))
    key = f' -H "Authorization: Bearer ${KEY}"' if chosen.api_keys else ""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is a lantern?"}], "max_tokens": 64})
    say(f"curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    given = f'__import__("os").environ["{KEY}"]' if chosen.api_keys else '"none"'
    ask = f'.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "What is a lantern?"}}])'
    say(f"python -c 'import openai; print(openai.OpenAI(base_url=\"{url}\", api_key={given}){ask}.choices[0].message.content)'")
