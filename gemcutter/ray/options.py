"""What an operator decides about replicas: how many there are, what each of them takes, and who gets which request.

Owns `ReplicaOptions` and the check of every field, so that a bad one is refused before anything is started. Imports no Ray. Read
`application.py` for what Ray is told of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from gemcutter.errors import RequestError, spell_value
from gemcutter.load_options import LoadOptions
from gemcutter.server.options import ServerOptions

PREFIX, HASH, BALANCED = ROUTINGS = ("prefix", "hash", "balanced")
LEAST = {"replicas": 1, "target_ongoing_requests": 0, "threads": 1, "max_adapters": 1, "imbalance": 0, "accept_timeout_s": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """How many replicas of a model there are, and how they share requests; times in seconds.

    Each replica holds the model of `load` and serves it as `server` says. There are `replicas` of them, or between `replicas` and
    `max_replicas`, as many as keep about `target_ongoing_requests` under way at each (`upscale_delay_s` and `downscale_delay_s`
    are how long that must be so). `threads` is the CPUs that Ray reserves for a replica, which also bounds its threads; `gpus` is
    the GPUs, by default one for a model on a GPU.

    `routing` is "prefix" (Ray's tree of the prompts that each replica has seen: a request goes where its beginning was), "hash"
    (the beginning of a conversation decides, and nothing is stored) or "balanced" (the shorter of two queues). With "prefix",
    `imbalance` is by how many requests one replica may be ahead of another before the shorter queue decides; None: half of those
    that a replica runs at once. A request that no replica has taken within `accept_timeout_s` is refused (503).

    `lora_root` is a folder, the same one on every machine, whose folders are adapters: a request that names one as its model gets
    it, and a replica keeps the `max_adapters` that were used last. Raises RequestError with every field that can't be used.
    """

    load: LoadOptions
    server: ServerOptions = field(default_factory=ServerOptions)
    replicas: int = 1
    max_replicas: int | None = None
    target_ongoing_requests: float = 4.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    threads: int = 1
    gpus: float | None = None
    routing: str = PREFIX
    imbalance: int | None = None
    accept_timeout_s: float = 30.0
    lora_root: str | None = None
    max_adapters: int = 8
    health_check_period_s: float = 5.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected {least} or more, found {spell_value(value)}"
            for name, least in LEAST.items()
            if (value := getattr(self, name)) is not None and not (_is_number(value) and value >= least)
        ]
        if self.max_replicas is not None and not (_is_number(self.max_replicas) and self.max_replicas >= self.replicas):
            problems.append(f"max_replicas: expected {self.replicas} or more, found {spell_value(self.max_replicas)}")
        if self.routing not in ROUTINGS:
            problems.append(f"routing: expected one of {', '.join(ROUTINGS)}, found {spell_value(self.routing)}")
        if self.server.store_bytes:
            problems.append("server.store_bytes: a replica can't continue responses that another one has kept; leave it at 0")
        if self.server.lora_root is not None:
            problems.append("server.lora_root: routes would load an adapter into one replica alone; use lora_root instead")
        if problems:
            raise RequestError("there can't be replicas with these options", problems)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ReplicaOptions:
        """Return the options of a config file, in which `load` and `server` are mappings. Raises RequestError."""
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise RequestError(f"{unknown[0]}: no option of replicas; there are: {', '.join(sorted(known))}")
        load, server = _with_tuples(_mapping("load", given)), _with_tuples(_mapping("server", given))
        try:
            made = {"load": LoadOptions(**load), "server": ServerOptions(**_with_name(server, load))}
        except TypeError as error:
            raise RequestError(f"load, server: {error}") from None
        return cls(**{**given, **made})

    @property
    def most_at_once(self) -> int:
        """Return how many requests a replica takes, those that wait included."""
        return self.load.max_num_seqs + self.server.max_queue

    @property
    def gpu_count(self) -> float:
        """Return how many GPUs Ray reserves for a replica."""
        return (0.0 if self.load.device == "cpu" else 1.0) if self.gpus is None else self.gpus

    @property
    def threshold(self) -> int:
        """Return by how many requests one replica may be ahead of another before prefixes no longer count."""
        return max(2, self.load.max_num_seqs // 2) if self.imbalance is None else self.imbalance


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options whose lists, of which YAML files have no other kind, are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _mapping(name: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    found = given.get(name, {})
    if not isinstance(found, Mapping):
        raise RequestError(f"{name}: expected options by name, found {spell_value(found)}")
    return found


def _with_name(server: dict[str, Any], load: Mapping[str, Any]) -> dict[str, Any]:
    """Return server options in which the model has a name: its own, where none is given."""
    return server if "names" in server or "model" not in load else {**server, "names": (str(load["model"]),)}
