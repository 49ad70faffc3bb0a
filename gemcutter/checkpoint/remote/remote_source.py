"""Opens a checkpoint wherever it is: on this machine, in the hub's cache, on the hub, or at any web address.

Owns what an address means and which files of a remote folder are read: the headers of its weights and the small files beside
them, never the weights. What comes out is the same `Source`, except that its tensors can't be mapped. Refuses to know formats.
Read `http_file.py` for the requests, `hub.py` for the hub's names and errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from gemcutter.checkpoint.container.shard_index import INDEX_NAME, SINGLE_NAME, parse_index
from gemcutter.checkpoint.container.source import Source, gather, weight_files
from gemcutter.checkpoint.remote.http_file import Client, HttpFile, origin_of, place, refuse
from gemcutter.checkpoint.remote.hub import HubId, cached_snapshot, diagnose, parse
from gemcutter.errors import CheckpointError

BESIDE_BYTES = 64_000_000  # of one small file; the largest, tokenizer.json, is not read but measured
URL = re.compile(r"https?://.*", re.IGNORECASE | re.DOTALL)
SUFFIXES = (".safetensors", ".gguf")
MAX_PARTS = 999  # of a split file, by its name's word

_HUB_PAGE = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/?(?:(?:tree|blob|resolve)/(?P<revision>[^/]+)/?(?P<file>[^/]+)?)?", re.ASCII)

_PART = re.compile(r"(?P<stem>.+)-[0-9]{5}-of-(?P<total>[0-9]{5})\.gguf", re.DOTALL)


@dataclass(slots=True)
class WebFolder:
    """The files beside remote weights: `address` gives a file's URL, `names` lists all files where a server can list them."""

    client: Client
    address: Callable[[str], str]
    names: frozenset[str] | None = None
    _read: dict[str, bytes | None] = field(default_factory=dict)

    def read(self, name: str) -> bytes | None:
        """Return a small file's bytes, None if there is no such file. Raises CheckpointError."""
        if name not in self._read:
            self._read[name] = self._fetch(name)
        return self._read[name]

    def size_of(self, name: str) -> int | None:
        """Return a file's size, None if there is no such file; its content stays where it is. Raises CheckpointError."""
        if self.names is not None and name not in self.names:
            return None
        try:
            return self.open(name, Path(name)).size_bytes
        except ValueError:
            return None

    def open(self, name: str, path: Path) -> HttpFile:
        """Open a large file, to be known as `path`. Raises ValueError if there is none, CheckpointError."""
        return HttpFile(self.client, self.address(name), path)

    def _fetch(self, name: str) -> bytes | None:
        if self.names is not None and name not in self.names:
            return None
        reply = self.client.get(self.address(name), BESIDE_BYTES)
        try:
            refuse(reply, self.address(name))
        except ValueError:
            return None
        return reply.body


def open_source(model: str) -> Source:
    """Open any checkpoint, local or remote, for its headers. Raises CheckpointError with every problem."""
    problems: list[str] = []
    source = survey(model, problems)
    source.insist_on_none(problems)
    return source


def survey(model: str, problems: list[str]) -> Source:
    """Open any checkpoint as `open_source` does, noting every problem. Raises CheckpointError where there is nothing to read."""
    if URL.fullmatch(model):
        return _from_url(model, problems)
    found = parse(model)
    if isinstance(found, Path):
        return Source.survey(found, problems)
    cached = cached_snapshot(found.repo, found.revision)
    if found.file is None:
        cached = _complete(cached)
    elif cached is not None:
        cached = cached / found.file if (cached / found.file).is_file() else None
    return _from_hub(found, found.file, problems) if cached is None else Source.survey(cached, problems)


def received(source: Source) -> Client | None:
    """Return the client that a remote source was read by, with its counts; None for a local one."""
    return source.remote.client if isinstance(source.remote, WebFolder) else None


def _complete(folder: Path | None) -> Path | None:
    """Return a cached folder if all its weights are there: headers of the rest are better read from the hub."""
    if folder is None:
        return None
    if not (folder / INDEX_NAME).is_file():
        return folder if any(file.suffix in SUFFIXES and "mmproj" not in file.name for file in folder.iterdir()) else None
    shards = parse_index((folder / INDEX_NAME).read_bytes(), []).values()
    return folder if all((folder / shard).is_file() for shard in shards) else None


# ---- the hub ----


def _from_hub(hub_id: HubId, file: str | None, problems: list[str]) -> Source:
    """Read a repository of the hub, or one file of it, all at one commit."""
    from huggingface_hub import HfApi, get_token, hf_hub_url

    try:
        info = HfApi().model_info(hub_id.repo, revision=hub_id.revision)
    except Exception as error:  # the hub's library lets its HTTP library's exceptions through, and those differ by version
        raise CheckpointError(diagnose(error, hub_id.repo, hub_id.revision)) from error
    revision = info.sha or hub_id.revision
    address = partial(hf_hub_url, hub_id.repo, revision=revision)
    listed = (sibling.rfilename for sibling in info.siblings or ())
    inside = "" if file is None else file.rpartition("/")[0]
    names = frozenset(name for name in listed if name.rpartition("/")[0] in ("", inside) and name.isprintable())
    token = get_token()
    client = Client(origin_of(address(SINGLE_NAME)), {"Authorization": f"Bearer {token}"} if token else {})
    folder = WebFolder(client, address, names)
    if file is not None:
        return _read(Path(hub_id.repo) / file, Path(hub_id.repo), _parts(file), {}, folder, problems)
    return _read_folder(Path(hub_id.repo), folder, sorted(names), problems)


def _is_hub(url: str) -> bool:
    from huggingface_hub import constants

    return origin_of(url) in (origin_of(constants.ENDPOINT), "https://huggingface.co")


# ---- any address ----


def _from_url(url: str, problems: list[str]) -> Source:
    """Read a file, or a folder with one of the usual names in it, or a page of the hub."""
    try:
        parts = urlsplit(url)
        is_sound = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_sound = False
    if not is_sound or not url.isprintable() or " " in url:
        raise CheckpointError(f"{url!r:.120} is no web address; pass https://host/path/model.safetensors")
    page = _HUB_PAGE.fullmatch(unquote(parts.path)) if _is_hub(url) else None
    if page:
        return _from_hub(HubId(page["repo"], page["revision"]), page["file"], problems)
    above, _, name = parts.path.rpartition("/")
    is_file = name.endswith(SUFFIXES)
    if not is_file and name:
        above = f"{above}/{name}"

    def address(wanted: str) -> str:
        query = parts.query if wanted == unquote(name) else ""  # a signature holds for one file
        return parts._replace(path=f"{above}/{quote(wanted)}", query=query, fragment="").geturl()

    folder = WebFolder(Client(), address)
    shown_as = Path(f"{parts.hostname}{above}")  # a path would swallow one of the slashes behind the scheme
    if is_file:
        return _read(shown_as / unquote(name), shown_as, _parts(unquote(name)), {}, folder, problems)
    return _read_folder(shown_as, folder, None, problems)


# ---- what both have in common ----


def _read_folder(path: Path, folder: WebFolder, names: list[str] | None, problems: list[str]) -> Source:
    """Read the weights of a remote folder: those of its index, or one file, or, where it can be listed, every file."""
    index = folder.read(INDEX_NAME)
    if index is not None:
        weight_map = parse_index(index, problems)
        return _read(path, path, tuple(dict.fromkeys(weight_map.values())), weight_map, folder, problems)
    if names is None:
        if folder.size_of(SINGLE_NAME) is None:
            raise CheckpointError(
                f"{place(folder.address(''))} has neither {INDEX_NAME} nor {SINGLE_NAME}; give the address of the file itself"
            )
        names = [SINGLE_NAME]
    dense = weight_files([name for name in names if not name.startswith("consolidated")])
    weights = [name for name in dense if name == SINGLE_NAME] or dense or _only_gguf(folder, names)
    if not weights:
        found = ", ".join(names[:6]) or "nothing"
        raise CheckpointError(f"{path} holds no .safetensors or .gguf file (but {found}); choose another release of the model")
    return _read(path, path, weights, {}, folder, problems)


def _only_gguf(folder: WebFolder, names: Iterable[str]) -> list[str]:
    """List the files of the one GGUF model among `names`. Raises CheckpointError if there are several."""
    models: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".gguf") and "mmproj" not in name:
            models.setdefault(_PART.sub(r"\g<stem>", name), []).append(name)
    if len(models) > 1:
        listed = [place(folder.address(files[0])) for files in models.values()]
        raise CheckpointError(f"there are {len(models)} GGUF models; give the address of one of them", listed)
    return next(iter(models.values()), [])


def _parts(name: str) -> list[str]:
    """List all files of the model that `name`, a whole file or a part of a split one, belongs to."""
    part = _PART.fullmatch(name)
    if part is None or int(part["total"]) > MAX_PARTS:
        return [name]
    return [f"{part['stem']}-{number:05}-of-{part['total']}.gguf" for number in range(1, int(part["total"]) + 1)]


def _read(
    path: Path, shown_as: Path, names: Iterable[str], weight_map: dict[str, str], folder: WebFolder, problems: list[str]
) -> Source:
    openers = {shown_as / name: partial(folder.open, name, shown_as / name) for name in names}
    return gather(path, shown_as, openers, weight_map, problems, folder)
