"""Turns what a user calls a model into a path on this machine.

Owns the forms MODEL may take (the packaged demo, a local file or folder, a hub id or a short name of one, see `names.json`) and
the download of a repository: safetensors, JSON and chat templates only, never files that can run code. Refuses to know what is
in them.
huggingface_hub, imported only for a hub id, owns HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Read next: `source.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import shown

DEMO = "demo"
PRESET = "tiny:"  # begins a name that only the benchmark knows
DEMO_FOLDER = Path(__file__).resolve().parents[2] / "demo"

_FORMS = (
    f'MODEL is "{DEMO}", a folder or file, a hub id such as google/gemma-4-E2B-it, or a short name such as e2b; '
    "`gemcutter models` lists them"
)
_ELSEWHERE = "or download it on another machine and pass the folder"

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# The hub's "*" matches "/" too. Subfolders hold other exports (onnx/, original/); consolidated files repeat the weights.
_UNWANTED = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]  # but additional_chat_templates/

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(:(?P<file>(?:[\w.-]+/)*[\w.-]+\.gguf))?(@(?P<revision>[A-Za-z0-9][\w./-]*))?",
    re.ASCII,
)
_PART = re.compile(r"-[0-9]{5}(-of-[0-9]{5}\.gguf)$")
_LOCAL_LOOK = re.compile(r"[./~].*|[A-Za-z]:/.*|.*\\.*|.*(\.safetensors|\.gguf|\.json|/)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class HubId:
    """Name a repository of the hub, and maybe one of its revisions, and the one GGUF file of it that is meant."""

    repo: str
    revision: str | None
    file: str | None = None


def locate(model: str) -> Path:
    """Return the local path of a model: "demo", an existing file or folder, a hub id `owner/name[:file.gguf][@revision]` or a
    short name of one.

    A hub id is downloaded into the hub's cache; where the hub can't be reached, a cached copy is used as it is.
    Raises CheckpointError, with the remedy, for a path that does not exist, a malformed id and every failure of the hub.
    """
    found = parse(model)
    return found if isinstance(found, Path) else _fetch(found)


def parse(model: str) -> Path | HubId:
    """Return what a model's name means, without a look at the network. Raises CheckpointError if it means nothing."""
    if model == DEMO:
        return DEMO_FOLDER
    path = Path(os.path.expanduser(model))
    if model and os.path.exists(path):
        return path
    hub_id = _HUB_ID.fullmatch(expand(model))
    if _LOCAL_LOOK.fullmatch(model) and not (hub_id and hub_id["file"]):
        raise CheckpointError(f"{shown(model)} does not exist on this machine")
    if model.lower().startswith(PRESET):
        raise CheckpointError(
            f"{shown(model)} is a preset of `gemcutter bench --preset`; `gemcutter tiny --like {model[len(PRESET) :]} FOLDER` "
            "writes such a model, for all other commands"
        )
    if hub_id is None or ".." in model:
        raise CheckpointError(f"{shown(model)} is neither an existing path nor a hub id nor a short name; {_FORMS}")
    return HubId(hub_id["repo"], hub_id["revision"], hub_id["file"])


def expand(model: str) -> str:
    """Replace a short name, with or without a revision, by the hub id of the checkpoint that it recommends."""
    name, mark, revision = model.partition("@")
    return short_names().get(name.lower(), name) + mark + revision


def short_names() -> dict[str, str]:
    """Return the hub id that each short name stands for."""
    return {name: model.repo for name, model in named_models().items()}


@dataclass(frozen=True, slots=True)
class NamedModel:
    """What a short name stands for: a repository, the size of its model, how it is stored, and "chat" or "base"."""

    repo: str
    size: str
    stored: str
    kind: str


@cache
def named_models() -> dict[str, NamedModel]:
    """Return what each short name stands for."""
    raw = json.loads((Path(__file__).parent / "names.json").read_text(encoding="utf-8"))
    return {name: NamedModel(**found) for name, found in raw.items()}


def _fetch(hub_id: HubId) -> Path:
    """Return the folder of a hub repository's snapshot, downloaded or cached, or the GGUF file of it that is meant."""
    repo, revision, file = hub_id.repo, hub_id.revision, hub_id.file
    try:
        # Such a repository holds a file for each quantization, all parts of which are wanted.
        if file is None:
            folder = _snapshot(repo, revision, is_cached_only=False)
        else:
            folder = _snapshot(repo, revision, is_cached_only=False, wanted=[_PART.sub(r"-*\1", file)], unwanted=())
    except Exception as error:  # the download raises its HTTP library's exceptions too, and those differ by version
        cached = cached_snapshot(repo, revision)
        if cached is None:
            raise CheckpointError(diagnose(error, repo, revision)) from error
        folder = cached
    if file is not None:
        if not (folder / file).is_file():
            raise CheckpointError(f"{repo}: there is no file {file} in it, or in its copy in {folder}; check the spelling")
        return folder / file
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{repo}: its copy in {folder} holds no .safetensors file; choose a safetensors release of the model, name a file of "
            f"a GGUF release ({repo}:file.gguf), {_ELSEWHERE}"
        )
    return folder


def _snapshot(
    repo: str,
    revision: str | None,
    *,
    is_cached_only: bool,
    wanted: Sequence[str] = _WANTED,
    unwanted: Sequence[str] = _UNWANTED,
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
            local_files_only=is_cached_only,
        )
    )


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the complete cached copy, if there is one. The hub's own fallback covers some network failures, not all."""
    try:
        return _snapshot(repo, revision, is_cached_only=True)
    except Exception:  # whatever it is, the failure to tell is the download's
        return None


def diagnose(error: Exception, repo: str, revision: str | None) -> str:
    """Return, in one line, why the hub gave nothing, and what to do."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, errors.HfHubHTTPError):
        error = cause  # "not in the cache" hides what the hub answered
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"{repo} is not a valid hub id: {_first_line(error)}; {_FORMS}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms on the hub, then set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r} on the hub; check its spelling, or leave it out"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo} is neither a local folder nor a repository that the hub shows you; check the spelling, "
            "and if the repository is private set HF_TOKEN to a token that may read it"
        )
    if status in (401, 403):
        return f"the hub refuses access to {repo} (HTTP {status}); set HF_TOKEN to a token that may read it"
    if status is not None:
        return f"the hub can't deliver {repo} (HTTP {status}) and no copy is cached; try again later, {_ELSEWHERE}"
    if isinstance(cause, errors.OfflineModeIsEnabled) or isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} has no complete copy in the cache and HF_HUB_OFFLINE forbids the network; unset it, {_ELSEWHERE}"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return (
            f"{repo} is neither a local folder nor completely cached, and the hub can't be reached; check the network "
            f"(with HF_HUB_OFFLINE=1 only the cache under HF_HOME is used), {_ELSEWHERE}"
        )
    return (
        f"{repo} can't be downloaded ({type(error).__name__}: {_first_line(error)}) and no complete copy is cached; "
        f"check the network and the disk under HF_HOME, {_ELSEWHERE}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
