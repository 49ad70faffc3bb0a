"""The index of a sharded checkpoint: which file holds which tensor.

Owns the index file's name and contents, taken for hostile: a shard is the name of a file in the same folder and nothing else.
Refuses to know what shards contain. Read next: `source.py`, which opens them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gemcutter.sidecar.small_file import parse_object, read_small, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def indexed_files(folder: Path, problems: list[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Return the shards that the index names and its weight map, noting what is wrong with either."""
    try:
        raw = read_small(folder / INDEX_NAME)
    except ValueError as error:
        problems.append(f"{INDEX_NAME}: {error}")
        return (), {}
    weight_map = parse_index(raw, problems)
    shards: list[Path] = []
    for shard in dict.fromkeys(weight_map.values()):
        if not os.path.isfile(folder / shard):
            remedy = f"remove the index to read {SINGLE_NAME} alone" if os.path.isfile(folder / SINGLE_NAME) else "download it"
            problems.append(f"{INDEX_NAME}: shard {shown(shard)} is absent; {remedy}")
        else:
            shards.append(folder / shard)
    return tuple(shards), weight_map


def parse_index(raw: bytes, problems: list[str]) -> dict[str, str]:
    """Return the map from tensor to file name in an index's bytes, noting what is wrong; empty if it can't be used."""
    try:
        weight_map = parse_object(raw, "the file").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()) or not weight_map:
            raise ValueError("holds no weight_map, an object from tensor names to file names")
    except ValueError as error:
        problems.append(f"{INDEX_NAME}: {error}")
        return {}
    # Judge the name and not the resolved path: a hub cache rightly links its files from elsewhere.
    strange = {
        shard
        for shard in weight_map.values()
        if shard in ("", ".", "..") or not shard.isprintable() or any(mark in shard for mark in "/\\:")
    }
    problems += [f"{INDEX_NAME}: shard {shown(shard)} is not the name of a file in the folder" for shard in sorted(strange)]
    return {name: shard for name, shard in weight_map.items() if shard not in strange}


def missing_from_shards(weight_map: Mapping[str, str], held: dict[str, set[str]]) -> list[str]:
    """Report, a line per shard, the tensors that the index places in it and that it lacks. `held` lists the sound shards."""
    missing: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if shard in held and name not in held[shard]:
            missing.setdefault(shard, []).append(name)
    return [
        f"{shard}: lacks {len(names)} tensor{'s' if len(names) > 1 else ''} that {INDEX_NAME} places in it: {shown(names)}"
        for shard, names in missing.items()
    ]
