"""Kills everything that writes checkpoints and caches at random instants, and looks at what is left.

After each kill the target must be absent or whole, as the same writer leaves it when nobody disturbs it; after some kills the
writer runs once more to its end, over whatever they have left.

    python tools/kill_writers.py --kills 1000
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.load.packed_weight_cache import PackedWeightCache
from gemcutter.checkpoint.write.synth import write_checkpoint
from gemcutter.ops.registry import CPU
from tests.formats.mutations import write_sound

Writer = Callable[[Path], None]  # writes a target, a file or a folder


def writers(folder: Path) -> dict[str, Writer]:
    """Return everything that writes, by name."""
    import torch

    plain, packed = write_sound("hf", folder / "plain"), write_sound("gguf", folder / "packed")

    def cache(target: Path) -> None:
        checkpoint = open_checkpoint(packed)
        kept, packer = PackedWeightCache.of(checkpoint, folder=target), CPU.packer("cpu", "bfloat16")
        load_params(checkpoint, torch.bfloat16, torch.device("cpu"), packer=packer, cache=kept)
        for thread in threading.enumerate():
            if thread.name == "packed weight cache":
                thread.join()

    return {
        "convert to hf": lambda target: _convert(plain, target, "hf", "none"),
        "convert to mlx": lambda target: _convert(plain, target, "mlx", "mlx4"),
        "convert to gguf": lambda target: _convert(plain, target.with_suffix(".gguf"), "gguf", "Q8_0"),
        "tiny": lambda target: _fresh(target, lambda: write_checkpoint("E2B", target)),
        "packed weights": cache,
    }


def _convert(source: Path, target: Path, to: str, quant: str) -> None:
    convert(source, target, to, quant, force=True)


def _fresh(target: Path, write: Callable[[], object]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    write()


def digest(target: Path) -> dict[str, str]:
    """Return a digest of every finished file of a target; of unfinished ones, which have names of their own, none."""
    base = target.parent
    found = {}
    for path in sorted(base.rglob("*")):
        name = str(path.relative_to(base))
        if path.is_file() and not UNFINISHED.search(name):
            content = path.read_bytes()
            found[name] = hashlib.sha256(VARYING.sub(b"", content)).hexdigest()
    return found


UNFINISHED = re.compile(r"\.(partial|replaced)-[0-9a-f]{8}|\.unfinished|\.tmp|\.part")
VARYING = re.compile(rb'"(created|seconds|date|time)":[^,}]*')


def kill_once(write: Writer, target: Path, delay: float) -> bool:
    """Run a writer in a child and kill it after a while; return whether it was still at work."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            write(target)
        except BaseException:
            os._exit(3)
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the writer failed by itself, exit {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def main() -> int:
    """Kill each writer the same number of times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, problems = random.Random(options.seed), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = writers(folder)
        for title, write in found.items():
            place = folder / title.replace(" ", "-")
            place.mkdir()
            target = place / "target"
            started = time.perf_counter()
            write(target)
            usual, whole = time.perf_counter() - started, digest(target)
            shutil.rmtree(place)
            kills = count = 0
            while kills < options.kills // len(found) and count < 20 * options.kills:
                place.mkdir(exist_ok=True)
                kills, count = kills + kill_once(write, target, draw.random() * usual * 1.1), count + 1
                left = digest(target)
                if any(left[file] != whole.get(file) for file in left):
                    problems.append(
                        f"{title}: after kill {kills} {[file for file in left if left[file] != whole.get(file)]} differ"
                    )
                if draw.random() < 0.1:
                    write(target)
                    if digest(target) != whole:
                        problems.append(f"{title}: a run after kill {kills} leaves something else")
                    shutil.rmtree(place)
            shutil.rmtree(place, ignore_errors=True)
            print(f"{title}: {kills} kills in {count} runs of {usual:.2f} s", flush=True)
    for problem in problems[:20]:
        print(f"  {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
