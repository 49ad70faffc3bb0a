"""Feeds the project's parsers with mutated files: headers of weights, everything that lies beside them, and media of requests.

Every case runs in a forked worker with limits of memory and time, and is made from its number alone, so that a failure can be
repeated: `--only NUMBER`. What counts as a failure: an exception outside the project's error classes, a crash, more than
two seconds, or more than 1 GiB beyond what the worker began with. The files of `tests/fuzz_corpus/` are tried first.

    python tools/fuzz.py --headers 100000 --texts 2000 --media 3000 [--seed 1]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gemcutter
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.doctor.sidecar_files import read_sidecar_files
from gemcutter.checkpoint.formats import FORMATS
from gemcutter.checkpoint.formats.lora import open_adapter
from gemcutter.checkpoint.load.match import compare, open_checkpoint
from gemcutter.errors import GemcutterError
from gemcutter.media.audio import SoundShape, cut_sound
from gemcutter.media.image import PatchShape, cut_image
from gemcutter.media.video import cut_video
from gemcutter.plan import derive
from gemcutter.text_assets import read_text_assets
from tests.formats.media_files import media_files
from tests.formats.mutations import BESIDE, write_sound

LIMITS: dict[str, Any] = {"seconds": 2.0, "bytes": 1 << 30}  # of one case
BATCH = 500  # cases of one worker
CORPUS = Path(__file__).resolve().parents[1] / "tests" / "fuzz_corpus"
NUMBERS = (0, 1, -1, 2**31, 2**32 - 1, 2**63, 2**63 - 1, 2**64 - 1, 255, 65536)
INDEX = "model.safetensors.index.json"
WORDS = (
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"-1",
    b"1e999",
    b"NaN",
    b"[" * 2000,
    b'{"a":' * 500,
    b"\xff\xfe",
    b"\x00" * 9,
    b'"\\ud800"',
)
TEMPLATES = (
    *("{% for i in range(99999) %}", "{{ 9 ** 9 ** 9 }}", "{% endfor %}", "{{ x.__class__ }}"),
    *(
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% generation %}",
        '{{ "%99999999d" % 1 }}',
        "{{ messages * 99999999 }}",
    ),
)
Case = Callable[[random.Random, Path, int], None]


def mutate(content: bytes, draw: random.Random, reach: int) -> bytes:
    """Return a file with bytes, numbers or words changed within its first `reach` bytes, or cut, or with a part repeated."""
    found, reach = bytearray(content), min(reach, len(content))
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        at, how = draw.randrange(max(reach, 1)), draw.randrange(7)
        if how == 0 and found:
            found[min(at, len(found) - 1)] = draw.randrange(256)
        elif how == 1:
            found[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS) % 2**64)
        elif how == 2:
            found[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS) % 2**32)
        elif how == 3:
            found[at : at + draw.randrange(1, 40)] = draw.choice(WORDS)
        elif how == 4:
            del found[at : at + draw.randrange(1, 64)]
        elif how == 5:
            found[at:at] = found[at : at + draw.randrange(1, 200)] * draw.choice((1, 2, 50))
        elif draw.random() < 0.2:
            del found[at:]
    return bytes(found)


class Seeds:
    """Sound files to mutate, and a folder in which to put each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf = write_sound("hf", folder / "hf")
        self.gguf = write_sound("gguf", folder / "gguf")
        self.mlx = write_sound("mlx", folder / "mlx")
        self.adapter = folder / "adapter"
        self.adapter.mkdir()
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
        (self.adapter / "adapter_config.json").write_text(json.dumps(config))
        weights = (self.hf / "model.safetensors", self.mlx / "model.safetensors", self.gguf)
        self.headers = {path: self._head(path) for path in weights}
        self.texts = {name: (self.hf / name).read_bytes() for name in (*BESIDE, "config.json")}
        self.plan = open_checkpoint(self.hf).plan
        self.starts = {path: min(t.offset for t in Source.open(path).tensors.values()) for path in weights[1:]}
        self.corpus = sorted(CORPUS.glob("*--*"))

    @staticmethod
    def _head(path: Path) -> tuple[bytes, int]:
        """Return a file's header with the size of the whole: its data need not be there, only long enough."""
        content = path.read_bytes()
        size = 8 + struct.unpack("<Q", content[:8])[0] if path.suffix == ".safetensors" else min(len(content), 400_000)
        return content[:size], len(content)

    def header_case(self, draw: random.Random, work: Path, number: int) -> None:
        """Open weights with a mutated header, and match what it promises with the plan."""
        path = draw.choice(list(self.headers))
        head, size = self.headers[path]
        target = work / path.name
        target.write_bytes(mutate(head, draw, draw.choice((64, 600, 6000, len(head)))))
        if target.stat().st_size < size and draw.random() < 0.9:
            os.truncate(target, size)
        config = work / "config.json"
        if not config.exists():
            config.write_bytes(self.texts["config.json"])
        problems: list[str] = []
        source = Source.survey(target, problems)
        form = next(form for form in FORMATS if form.sniff(source))
        plan = derive(form.config(source))
        compare(plan, form.pieces(source, plan), problems)

    def values_case(self, draw: random.Random, work: Path, number: int) -> None:
        """Generate from packed weights whose codes and scales are random in places: native kernels meet all of it."""
        source = draw.choice((self.gguf, self.mlx / "model.safetensors"))
        content = bytearray(source.read_bytes())
        for _ in range(draw.choice((1, 3, 30))):
            at = draw.randrange(self.starts[source], len(content))
            count = min(draw.choice((1, 8, 400)), len(content) - at)
            content[at : at + count] = draw.choice((draw.randbytes(count), b"\xff" * count, b"\x7f" * count, bytes(count)))
        folder = work / source.parent.name
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
        (folder / source.name).write_bytes(content)
        model = folder / source.name if source.suffix == ".gguf" else folder
        with gemcutter.load(str(model), context=64, max_num_seqs=2, max_batched_tokens=16) as loaded:
            prompts = [[draw.randrange(4096) for _ in range(draw.choice((1, 3, 20)))] for _ in range(2)]
            loaded.generate(prompts, max_tokens=3, ignore_eos=True, top_logits=draw.choice((0, 2)))

    def text_case(self, draw: random.Random, work: Path, number: int) -> None:
        """Read everything beside the weights, one file of which is mutated."""
        name = draw.choice((*self.texts, "adapter_config.json", INDEX))
        if name == "adapter_config.json":
            (work / name).write_bytes(mutate((self.adapter / name).read_bytes(), draw, 1 << 20))
            open_adapter(work, self.plan)
            return
        content = self.texts.get(name, b'{"weight_map": {"model.norm.weight": "model.safetensors", "x": "../../etc/passwd"}}')
        if name.endswith(".jinja") and draw.random() < 0.5:
            at = draw.randrange(len(content))
            content = content[:at] + draw.choice(TEMPLATES).encode() + content[at:]
        self._read_all(work, name, mutate(content, draw, 1 << 20))

    def corpus_case(self, draw: random.Random, work: Path, number: int) -> None:
        """Read a file of the corpus, under the name that it had, among sound ones."""
        path = self.corpus[number]
        self._read_all(work, path.name.partition("--")[2], path.read_bytes())

    def _read_all(self, work: Path, name: str, content: bytes) -> None:
        for path in work.iterdir():
            path.unlink()
        for other, sound in self.texts.items():
            (work / other).write_bytes(sound)
        os.link(self.hf / "model.safetensors", work / "model.safetensors")
        (work / name).unlink(missing_ok=True)
        (work / name).write_bytes(content)
        checkpoint = open_checkpoint(work)
        text = read_text_assets(checkpoint)
        read_sidecar_files(checkpoint.source, checkpoint.config)
        text.tokenizer.encode("Some text, é and 🙂 <bos>", bos=True)
        if text.template is not None:
            text.template.encode([{"role": "user", "content": "Hi"}])


class MediaSeeds:
    """Small images, sounds and videos of every form to mutate; no videos where PyAV is missing."""

    def __init__(self) -> None:
        self.files = media_files()

    def case(self, draw: random.Random, work: Path, number: int) -> None:
        """Read one mutated file as a request would."""
        kind, content = draw.choice(self.files)
        mutated = mutate(content, draw, draw.choice((16, 200, 2000, len(content))))
        if kind == "audio":
            cut_sound(mutated, SoundShape(draw.choice((None, 640))))
        elif kind == "image":
            cut_image(mutated, 70, PatchShape(merges=draw.random() < 0.5))
        else:
            cut_video(mutated, PatchShape())


# ---- workers ----


def run_batch(case: Case, seed: int, numbers: Sequence[int], work: Path) -> list[tuple[int, str]]:
    """Run cases in a forked worker, and again behind each one that kills it; return the failures."""
    failures: list[tuple[int, str]] = []
    while numbers:
        place = mmap.mmap(-1, 16)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _work(case, seed, numbers, work, place, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            told = [json.loads(line) for line in pipe.read().splitlines()]
        _, status = os.waitpid(child, 0)
        failures += [(number, what) for number, what in told]
        if not status:
            break
        number = struct.unpack("<q", place[:8])[0]
        failures.append((number, f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status >> 8}"))
        numbers = [each for each in numbers if each > number]
    return failures


def _work(case: Case, seed: int, numbers: Sequence[int], work: Path, place: mmap.mmap, pipe: int) -> None:
    """Run in the worker: never returns."""
    if LIMITS["bytes"] is not None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE + LIMITS["bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.disable()  # the parent tells
    for number in numbers:
        place[:8] = struct.pack("<q", number)
        signal.setitimer(signal.ITIMER_REAL, LIMITS["seconds"])
        try:
            case(random.Random(f"{seed}-{number}"), work, number)
        except GemcutterError:
            pass
        except BaseException as error:
            os.write(pipe, json.dumps([number, f"{type(error).__name__}: {str(error)[:160]}"]).encode() + b"\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
    os._exit(0)


def fuzz(name: str, case: Case, numbers: Sequence[int], seed: int, folder: Path) -> int:
    """Run cases and print every failure; return how many there were."""
    started, failures = time.perf_counter(), list[tuple[int, str]]()
    work = folder / name
    work.mkdir()
    for at in range(0, len(numbers), BATCH):
        failures += run_batch(case, seed, numbers[at : at + BATCH], work)
        if sys.stderr.isatty():
            print(f"\r{name}: {at:,} of {len(numbers):,}, {len(failures)} failures", end="", file=sys.stderr)
    took = time.perf_counter() - started
    rate = f"{took:.0f} s, {len(numbers) / max(took, 1e-9):,.0f} a second"
    print(f"{name}: {len(numbers):,} cases ({rate}), {len(failures)} failures")
    for number, what in failures[:20]:
        print(f"  {name} {number} (seed {seed}): {what}")
    return len(failures)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--headers", type=int, default=0)
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--values", type=int, default=0)
    parser.add_argument("--media", type=int, default=0)
    parser.add_argument("--unlimited", action="store_true", help="no limit of memory: sanitizers reserve terabytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    if options.unlimited:
        LIMITS.update(seconds=60.0, bytes=None)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        seeds = Seeds(folder)
        failed = fuzz("corpus", seeds.corpus_case, range(len(seeds.corpus)), 0, folder)
        kinds = {"headers": seeds.header_case, "texts": seeds.text_case, "values": seeds.values_case}
        if options.media:
            kinds["media"] = MediaSeeds().case
        for kind, case in kinds.items():
            if count := getattr(options, kind):
                numbers = range(count) if options.only is None else [options.only]
                failed += fuzz(kind, case, numbers, options.seed, folder)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
