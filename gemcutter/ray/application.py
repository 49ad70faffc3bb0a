"""The Ray Serve application: the ingress before the replicas, and what Ray is told of both.

Owns the two deployments' settings and the choice of Ray's request router. Refuses to know requests. Read `options.py` for the
meaning of each setting, `docs/guide/replicas.md` for how it is deployed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from gemcutter.errors import RequestError
from gemcutter.ray.ingress import Ingress
from gemcutter.ray.options import BALANCED, HASH, ReplicaOptions
from gemcutter.ray.replica import Replica

# The public name, which is the second, imports vLLM or SGLang for the sake of its neighbours; the class itself needs neither.
PREFIX_ROUTERS = (
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router:PrefixCacheAffinityRouter",
    "ray.serve.llm.request_router:PrefixCacheAffinityRouter",
)
HASH_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
INGRESS_REQUESTS = 10_000  # that the ingress holds: it only hands on, and replicas say when they are full
FAREWELL_S = 5.0  # beyond the time that running requests have

log = logging.getLogger(__name__)


def build(options: ReplicaOptions) -> Any:
    """Return the application. Raises RequestError where this version of Ray has no router for the routing that is wanted."""
    replicas = serve.deployment(Replica).options(
        name="gemcutter",
        max_ongoing_requests=options.most_at_once,
        ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpu_count},
        health_check_period_s=options.health_check_period_s,
        graceful_shutdown_timeout_s=options.server.shutdown_timeout_s + FAREWELL_S,
        **_count(options),
        **_router(options),
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="ingress",
        max_ongoing_requests=INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.server.shutdown_timeout_s + FAREWELL_S,
    )
    return ingress.bind(replicas.bind(options), options)


def _count(options: ReplicaOptions) -> dict[str, Any]:
    """Return how many replicas there are, as Ray is told it."""
    if options.max_replicas is None or options.max_replicas == options.replicas:
        return {"num_replicas": options.replicas}
    scaling = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target_ongoing_requests,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
    )
    return {"autoscaling_config": scaling}


def _router(options: ReplicaOptions) -> dict[str, Any]:
    """Return which router sends requests to replicas, as Ray is told it."""
    if options.routing == BALANCED:
        return {}
    if options.routing == HASH:
        return {"request_router_config": RequestRouterConfig(request_router_class=_importable(HASH_ROUTER))}
    settings = {"imbalanced_threshold": options.threshold, "do_eviction": True}
    with _own_logging():
        config = RequestRouterConfig(request_router_class=_importable(*PREFIX_ROUTERS), request_router_kwargs=settings)
    return {"request_router_config": config}


def _importable(*paths: str) -> str:
    """Return the first of some import paths that can be imported. Raises RequestError where none can."""
    for path in paths:
        module, _, name = path.partition(":")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            log.info("%s: %s", path, error)
            continue
        return path
    raise RequestError(f"routing: this version of Ray has no {paths[-1].rpartition(':')[2]}; choose another routing")


@contextmanager
def _own_logging() -> Iterator[None]:
    """Keep the program's logging: Ray's packages for language models replace it when they are imported."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
