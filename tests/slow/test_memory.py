"""What gemcutter holds in memory, as the kernel counts it: weights stay mapped, the cache is as large as the plan says.

Every probe runs in a process of its own, whose resident set nothing else has touched: this file is its own script. The weights
have E2B's true widths in fewer layers; GEMCUTTER_FULL_MEMORY=1 adds the whole model, which takes 9.3 GB of disk and minutes.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MB = 1_000_000
SLACK = 16 * MB  # of the allocator, of code that is loaded on first use, of huge pages
TOKENS = 32768  # in the cache
ROWS = 512  # of one step
PROMPT_TOKENS, NEW_TOKENS = 64, 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="resident sets are read from Linux's /proc"),
]


# ---- probes: these run in the child ----


def status() -> dict[str, int]:
    """Read the process's own pages, its mapped ones, and the peak of both, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return {"anon": found["RssAnon"], "file": found["RssFile"], "peak": found["VmHWM"]}


def present_bytes(address: int, nbytes: int) -> int:
    """Count the bytes of a range whose pages are mapped into this process right now (bit 63 of their pagemap entry)."""
    first, last = address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = file.read(8 * (last - first))
    return mmap.PAGESIZE * sum(byte >> 7 for byte in entries[7::8])


def forget_cached(folder: Path) -> None:
    """Drop a checkpoint from the page cache: kernels map cached blocks of megabytes at one fault, which says nothing of us."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def probe_model(folder: str, dtype_name: str) -> dict[str, Any]:
    """Load a checkpoint, run a short prompt and decode, watching memory after each."""
    import torch

    from gemcutter.checkpoint.load.load_params import load_params
    from gemcutter.checkpoint.load.match import open_checkpoint
    from gemcutter.engine.engine import Engine
    from gemcutter.engine.request import Request
    from gemcutter.model.text import Decoder

    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype_name]
    forget_cached(Path(folder))
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the library allocates once is not the model's
    found: dict[str, Any] = {"start": status()}
    checkpoint = open_checkpoint(Path(folder))
    params = load_params(checkpoint, dtype, torch.device("cpu"))
    engine = Engine(Decoder(checkpoint.plan, params, dtype), context=128)
    found["loaded"] = status()
    prompt = tuple(range(100, checkpoint.plan.vocab, checkpoint.plan.vocab // PROMPT_TOKENS))
    for name, requests in (("first", 1), ("last", 3)):
        for _ in range(requests):
            engine.submit(Request(prompt, max_tokens=NEW_TOKENS))
            while engine.has_work:
                engine.step()
        found[name] = status()
    (table,) = params["embed.ple"].parts  # type: ignore[union-attr]
    assert isinstance(table, torch.Tensor)
    return found | {
        "dense": checkpoint.plan.weight_bytes(rows_access=False),
        "table": table.nbytes,
        "table_row": table[0].nbytes,
        "table_present": present_bytes(table.data_ptr(), table.nbytes),
    }


def probe_cache() -> dict[str, Any]:
    """Write keys and values of 32k positions of E2B, without a model, watching memory halfway and at the end."""
    import torch

    from gemcutter import config as configs
    from gemcutter.cache.block_table import BlockTable
    from gemcutter.cache.kv_cache import PagedKVCache
    from gemcutter.checkpoint.write.synth import SIZES, spell_config
    from gemcutter.engine.memory import page_counts
    from gemcutter.plan import derive

    plan = derive(configs.read(spell_config(SIZES["E2B"])))
    rows = {layer.index: torch.ones(ROWS, layer.kv_heads, layer.head_dim, dtype=torch.bfloat16) for layer in plan.writers}
    found: dict[str, Any] = {"start": status()}
    pool = PagedKVCache(plan, page_counts(plan, TOKENS, ROWS), torch.bfloat16)
    table = BlockTable(pool)
    found["allocated"] = status()
    while table.length < TOKENS:
        table.reserve(ROWS)
        for layer in plan.writers:
            pool.write(layer.index, torch.tensor(table.slot_mapping(layer.group)), rows[layer.index], rows[layer.index])
        table.commit(ROWS)
        if table.length == TOKENS // 2:
            found["half"] = status()
    found["full"] = status()
    per_slot = sum(2 * layer.kv_elements() for layer in plan.writers if layer.window)
    return found | {"pool": pool.nbytes, "planned": plan.kv_bytes(TOKENS), "sliding_slot": per_slot}


# ---- tests ----


@functools.cache
def run_probe(*arguments: str) -> dict[str, Any]:
    # Without the threshold the allocator keeps large freed blocks, more or fewer of them from run to run.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(arguments, done.stdout)  # shown by pytest -s, and whenever a test fails
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", params=["E2B's widths", "E2B"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write a checkpoint of E2B's widths, with all of its layers or one of each kind; remove it afterwards."""
    from gemcutter.checkpoint.write.synth import SIZES, write_size

    size = SIZES["E2B"]
    if request.param != "E2B":
        size = replace(size, layers=4, period=2, readers=2, vocab=24576)
    elif os.environ.get("GEMCUTTER_FULL_MEMORY") != "1":
        pytest.skip("GEMCUTTER_FULL_MEMORY=1 writes and runs the whole model")
    path = tmp_path_factory.mktemp("memory")
    write_size(size, path)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_mapped_and_never_copied(folder: Path, dtype: str) -> None:
    found = run_probe("model", str(folder), dtype)
    start, loaded, first, last, dense = (found[name] for name in ("start", "loaded", "first", "last", "dense"))
    assert dense > 450 * MB, "a copy would not stand out"
    assert loaded["anon"] - start["anon"] < SLACK
    assert loaded["file"] - start["file"] < SLACK  # mapped, and not even read yet
    assert last["anon"] - start["anon"] < 4 * SLACK  # activations, cache and one tile of a weight
    assert last["anon"] - first["anon"] < SLACK / 4  # nothing piles up from request to request
    assert dense < last["file"] - start["file"] < dense + 4 * SLACK
    assert last["peak"] - start["anon"] - start["file"] < dense + 4 * SLACK  # not for a moment either
    assert last["peak"] < dense + 400 * MB  # Python and torch included


def test_per_layer_embeddings_are_read_by_the_row(folder: Path) -> None:
    found = run_probe("model", str(folder), "bfloat16")
    rows = PROMPT_TOKENS + 1 + 4 * NEW_TOKENS
    assert 0 < found["table_present"] <= rows * (found["table_row"] + 16 * mmap.PAGESIZE)  # a page comes with 15 neighbours
    assert found["table_present"] < found["table"] / 4


def test_cache_takes_what_the_plan_says() -> None:
    found = run_probe("cache")
    start, allocated, half, full = (found[name]["anon"] for name in ("start", "allocated", "half", "full"))
    # Beside the windows there is room for the rows in flight, in whole pages of 64: 1088 positions instead of 512.
    assert found["planned"] == 198 << 20
    assert found["pool"] == found["planned"] + (1088 - 512) * found["sliding_slot"]
    assert allocated - start < SLACK  # pages are only touched as far as a sequence gets
    sliding = 1088 * found["sliding_slot"]
    assert half - start == pytest.approx(sliding + (found["pool"] - sliding) / 2, abs=SLACK)
    assert full - start == pytest.approx(found["pool"], abs=SLACK)


if __name__ == "__main__":
    probes: dict[str, Callable[..., dict[str, Any]]] = {"model": probe_model, "cache": probe_cache}
    print(json.dumps(probes[sys.argv[1]](*sys.argv[2:])))
