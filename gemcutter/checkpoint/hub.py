"""Turns what a user calls a model into a path on this machine.

Owns the forms MODEL may take (the packaged demo, a local file or folder, a hub id) and the download of a hub repository:
safetensors, JSON and chat templates only, never files that can run code. Refuses to know what the files hold.
huggingface_hub, imported only for a hub id, owns HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Read next: `source.py`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemcutter.checkpoint.source import shown
from gemcutter.errors import CheckpointError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"

_FORMS = (
    f'MODEL is "{DEMO}" (the small packaged model), a folder that holds .safetensors files, one such file (./gemma), '
    "or a hub id (google/gemma-4-E2B-it, with a revision google/gemma-4-E2B-it@main)"
)
_ELSEWHERE = "or download it on another machine and pass the folder"

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# The hub's "*" matches "/" too. Subfolders hold other exports (onnx/, original/); consolidated files repeat the weights.
_UNWANTED = ["*/*", "consolidated*"]

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII)
_LOCAL_LOOK = re.compile(r"[./~].*|[A-Za-z]:/.*|.*\\.*|.*(\.safetensors|\.gguf|\.json|/)", re.DOTALL)


def locate(model: str) -> Path:
    """Return the local path of a model: "demo", an existing file or folder, or a hub id `owner/name` or `owner/name@revision`.

    A hub id is downloaded into the hub's cache; where the hub can't be reached, a cached copy is used as it is.
    Raises CheckpointError, with the remedy, for a path that does not exist, a malformed id and every failure of the hub.
    """
    if model == DEMO:
        return DEMO_FOLDER
    path = Path(os.path.expanduser(model))
    if model and os.path.exists(path):
        return path
    if _LOCAL_LOOK.fullmatch(model):
        raise CheckpointError(f"{shown(model)} does not exist on this machine; {_FORMS}")
    hub_id = _HUB_ID.fullmatch(model)
    if hub_id is None or ".." in model:
        raise CheckpointError(f"{shown(model)} is neither an existing path nor a hub id; {_FORMS}")
    return _fetch(hub_id["repo"], hub_id["revision"])


def _fetch(repo: str, revision: str | None) -> Path:
    """Return the folder of a hub repository's snapshot, downloaded or cached."""
    try:
        folder = _snapshot(repo, revision, is_cached_only=False)
    except Exception as error:  # the download raises its HTTP library's exceptions too, and those differ by version
        cached = _cached_snapshot(repo, revision)
        if cached is None:
            raise CheckpointError(_diagnosis(error, repo, revision)) from error
        folder = cached
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{repo}: its copy in {folder} holds no .safetensors file; choose a safetensors release of the model, {_ELSEWHERE}"
        )
    return folder


def _snapshot(repo: str, revision: str | None, *, is_cached_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=is_cached_only
        )
    )


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the complete cached copy, if there is one. The hub's own fallback covers some network failures, not all."""
    try:
        return _snapshot(repo, revision, is_cached_only=True)
    except Exception:  # whatever it is, the failure to tell is the download's
        return None


def _diagnosis(error: Exception, repo: str, revision: str | None) -> str:
    """Say in one line why the hub gave nothing, and what to do."""
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
    if isinstance(cause, errors.OfflineModeIsEnabled):
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
