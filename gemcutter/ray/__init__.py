"""Replicas of a model on Ray Serve: one address in front of any number of them, on one machine or many.

Owns the application's builder, which `serve run gemcutter.ray:deployment`, Serve's config files and KubeRay call by this name.
Nothing here imports Ray until it is called. Read `options.py` for what an operator decides, `replica.py` for what holds a model,
`ingress.py` for what stands before the replicas, `application.py` for how they are put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.ray.options import ReplicaOptions

__all__ = ["ReplicaOptions", "deployment"]


def deployment(args: Mapping[str, Any] | ReplicaOptions) -> Any:
    """Return a Ray Serve application, for `serve.run`; `args` are the fields of `ReplicaOptions`.

    Raises RequestError with everything that is wrong with them, and where Ray is not installed.
    """
    options = args if isinstance(args, ReplicaOptions) else ReplicaOptions.read(args)
    check_installed()
    from gemcutter.ray.application import build

    return build(options)


def check_installed() -> None:
    """Raise RequestError, with the remedy, where Ray Serve or the server's packages are absent."""
    try:
        import python_multipart  # noqa: F401
        import ray.serve  # noqa: F401

        import gemcutter.server.app  # noqa: F401
    except ImportError as error:
        reason = f"replicas on Ray need the package {error.name or 'ray'!r}"
        raise RequestError(f"{reason}: pip install 'gemcutter[serve,ray]'") from None
