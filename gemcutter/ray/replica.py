"""One replica: a model of its own, served by the same application as `gemcutter serve`'s, without a port.

Owns the model's life in Ray's process, the adapters that come and go with requests, and what Ray is told of its health. Refuses
to know other replicas. Ray lets requests that run end before it ends a replica. Read `asgi_call.py` for how a call is answered,
`server/app.py` for the application.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

from ray import serve

from gemcutter import api
from gemcutter.errors import CheckpointError, GemcutterError, RankError, RequestError
from gemcutter.ray.asgi_call import Part, answer
from gemcutter.ray.calls import Call, Head
from gemcutter.ray.options import ReplicaOptions
from gemcutter.server.app import create_app
from gemcutter.server.errors import ApiError, as_api_error, is_anthropic
from gemcutter.server.routes.lora import NAME

UNLOAD_S = 600.0  # that requests of an adapter have to end before it is unloaded
ACCEPTED = b""  # what every answer begins with, so that the ingress knows of a replica that took the call


class LoadedAdapter:
    """An adapter that Ray keeps among those used last; `users` are the requests that may ask the model for it."""

    def __init__(self, model: api.Model, name: str) -> None:
        self._model, self._name = model, name
        self.users = 0
        self._changed = threading.Condition()
        # Ray calls this name when it lets go of an adapter. It is the instance's own, so that nothing happens when one dies.
        self.__del__ = self._unload

    def __enter__(self) -> None:
        with self._changed:
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.users -= 1
            self._changed.notify_all()

    def _unload(self) -> None:
        """Unload the adapter once no request uses it; called on a thread of Ray's."""
        with self._changed:
            if self._changed.wait_for(lambda: not self.users, UNLOAD_S) and self._name in self._model.adapters:
                self._model.unload_adapter(self._name)


class Replica:
    """A model and its application; Ray makes one for each process, and calls its methods on one event loop."""

    def __init__(self, options: ReplicaOptions) -> None:
        import torch

        torch.set_num_threads(options.threads)
        self._options, self.model = options, api.load_model(options.load)
        self._app = create_app(self.model, options.server)
        self._app.state.service.start()

        async def load(name: str) -> LoadedAdapter:  # Ray keeps its state at the function, which a method has no room for
            return await self._load_adapter(name)

        keep: Callable[..., Callable[[str], Awaitable[LoadedAdapter]]]
        keep = serve.multiplexed(max_num_models_per_replica=options.max_adapters)
        self._find_adapter = keep(load)

    async def answer(self, call: Call) -> AsyncGenerator[Part]:
        """Yield ACCEPTED, the head of the answer, and its bytes."""
        yield ACCEPTED
        folder = self._adapter_folder(call.adapter)
        if folder is None:
            async for part in answer(self._app, call):
                yield part
            return
        try:
            adapter = await self._find_adapter(call.adapter)
        except GemcutterError as error:
            response = as_api_error(error).response(is_anthropic(call.path))
            yield Head(response.status_code, tuple(response.raw_headers))
            yield bytes(response.body)
            return
        with adapter:
            async for part in answer(self._app, call):
                yield part

    async def metrics(self) -> bytes:
        """Return what /metrics says of this replica."""
        service = self._app.state.service
        found: bytes = service.metrics.text(service.refresh)
        return found

    def check_health(self) -> None:
        """Raise RankError where the model can't serve any more: its engine or one of its ranks is gone. Ray then replaces it."""
        if self.model.problem is not None:
            raise RankError(self.model.problem)

    def _adapter_folder(self, name: str) -> Path | None:
        root = self._options.lora_root
        if root is None or NAME.fullmatch(name) is None:
            return None
        folder = (Path(root) / name).resolve()
        return folder if folder.is_relative_to(Path(root).resolve()) and folder.is_dir() else None

    async def _load_adapter(self, name: str) -> LoadedAdapter:
        """Load an adapter beside the requests that run. Raises GemcutterError."""
        folder = self._adapter_folder(name)
        if folder is None:
            raise RequestError(f"model: there is no adapter {name!r}")
        try:
            await asyncio.to_thread(self.model.load_adapter, name, folder)
        except CheckpointError as error:
            raise ApiError(400, str(error), param="model") from error
        return LoadedAdapter(self.model, name)
