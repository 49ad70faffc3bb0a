"""What `gemcutter serve --ray` adds: the options of replicas, and the life of the process that deploys them.

Owns the way from options to a Ray Serve application, its address, and its end: the first SIGTERM or interrupt lets running
requests end and takes the application down. Refuses to know Ray's settings. Read `gemcutter/ray/` for those, `serve.py` for the
command.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer

from gemcutter.cli.failure import UsageError
from gemcutter.cli.terminal import Volume, say, volume
from gemcutter.cores import core_count
from gemcutter.load_options import LoadOptions
from gemcutter.ray import ReplicaOptions, check_installed
from gemcutter.ray import deployment as make_application
from gemcutter.server.options import ServerOptions

NAME = "gemcutter"  # of the application
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How many replicas serve, and how they share requests: options that need --ray."""

    ray: Annotated[
        bool,
        typer.Option("--ray", help="Serve replicas on a Ray cluster: the one that RAY_ADDRESS names, or one of this machine."),
    ] = False
    replicas: Annotated[int | None, typer.Option(metavar="N", min=1, help="Replicas of the model.  [default: 1]")] = None
    max_replicas: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Let there be up to so many, as requests need them.")
    ] = None
    target_ongoing_requests: Annotated[
        float | None,
        typer.Option(metavar="N", min=0.1, help="Requests under way at each replica that scaling aims at.  [default: 4]"),
    ] = None
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="prefix|hash|balanced",
            help="Which replica gets a request: the one that knows its beginning, the one that its conversation's beginning is "
            "hashed to, or the one with the shorter queue.  [default: prefix]",
            show_default=False,
        ),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """Return the options that were given, as those of replicas."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "ray"}

    def check_unused(self) -> None:
        """Raise UsageError where an option was given that says nothing without --ray."""
        if self.given:
            raise UsageError(f"--{next(iter(self.given)).replace('_', '-')}: needs --ray")


def serve_replicas(load: LoadOptions, server: ServerOptions, scaling: Scaling, threads: int | None, address: Address) -> None:
    """Deploy replicas and serve until a signal ends the process; `threads` are each one's, None: its share of this machine.

    Raises GemcutterError where it can't be done.
    """
    check_installed()
    most = max(scaling.replicas or 1, scaling.max_replicas or 1)
    options = ReplicaOptions(
        load=load,
        server=replace(server, lora_root=None),  # its adapters come with requests, see `ReplicaOptions`
        lora_root=server.lora_root,
        threads=threads or max(core_count() // most, 1),
        **scaling.given,
    )
    application = make_application(options)
    import ray
    from ray import serve

    host, port = address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unless the operator wants that
    ray.init(ignore_reinit_error=True, log_to_driver=volume() is Volume.VERBOSE)
    try:
        serve.start(http_options={"host": host, "port": port})
        ended = _signalled()
        serve.run(application, name=NAME)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        say(f"serving on http://{shown}:{port}/v1 as {', '.join(server.names)}")
        ended.wait()
        say("running requests may end")
        serve.delete(NAME)  # others may have applications on the same cluster
    finally:
        ray.shutdown()


def _signalled() -> threading.Event:
    """Return what is set by the first SIGTERM or interrupt; a second one ends the process as it would any."""
    ended = threading.Event()

    def end(number: int, _: object) -> None:
        ended.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return ended
