"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the model serves.

Owns which folders a request may name: those directly below one root that the operator chose, and none without it. Read
`Model.load_adapter` in `api.py` for what is done.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from gemcutter.errors import CheckpointError
from gemcutter.server.errors import ApiError
from gemcutter.server.routes.models import describe
from gemcutter.server.service import Service
from gemcutter.server.wire.fields import refuse

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")


class UnloadRequest(BaseModel):
    """The name of an adapter."""

    model_config = ConfigDict(extra="allow")

    lora_name: str


class LoadRequest(BaseModel):
    """An adapter's name and the name of its folder below the root."""

    model_config = ConfigDict(extra="allow")

    lora_name: str
    lora_path: str = Field(description="name of a folder below the server's root of adapters")


def router(service: Service) -> APIRouter:
    """Return the routes over a service; there are none without a root."""
    routes, root = APIRouter(tags=["adapters"]), service.options.lora_root
    if root is None:
        return routes

    @routes.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> dict[str, Any]:
        """Load an adapter; requests may then name it as their model."""
        name, folder = check_name(body.lora_name, "lora_name"), find_folder(Path(root), body.lora_path)
        if name in service.options.names:
            refuse("lora_name", f"{name!r} is a name of the model itself")
        try:
            await service.work(lambda: service.model.load_adapter(name, folder))
        except CheckpointError as error:
            raise ApiError(400, str(error), param="lora_path") from error
        return describe(service, name)

    @routes.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> dict[str, Any]:
        """Unload an adapter that no request uses."""
        name = body.lora_name
        if name not in service.model.adapters:
            raise ApiError(404, f"no adapter {name!r} is loaded", param="lora_name", code="model_not_found")
        await service.work(lambda: service.model.unload_adapter(name))
        return {"id": name, "object": "model", "deleted": True}

    return routes


def check_name(name: str, where: str) -> str:
    """Return a name that is no path. Raises FieldError for anything else."""
    if NAME.fullmatch(name) is None:
        refuse(where, "expected letters, digits, '.', '_' and '-', at most 128 and no '.' first; paths are refused")
    return name


def find_folder(root: Path, name: str) -> Path:
    """Return the folder of a name below the root, links included. Raises FieldError where there is none."""
    folder = (root / check_name(name, "lora_path")).resolve()
    if not folder.is_relative_to(root.resolve()) or not folder.is_dir():
        refuse("lora_path", f"no folder {name!r} below the server's root of adapters")
    return folder
