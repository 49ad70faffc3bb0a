"""The doctor's verdict is what loading with all media does: randomly damaged checkpoints are accepted by both or refused by both,
and whatever they claim, neither takes more memory than the sound ones need.

GEMCUTTER_CASES sets how many are tried for each container (100 by default; seeds are the numbers, so a failure is tried again by
its number).
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import gemcutter
from gemcutter.benchmark.memory import forget_peak, peak_rss_bytes
from gemcutter.checkpoint.doctor.doctor import examine
from gemcutter.cli.doctor import read_text
from gemcutter.errors import GemcutterError
from tests.formats.mutations import CONTAINERS, MUTATIONS, write_sound

ROOM_BYTES = 16 << 20  # that a case may take beyond what is resident already; the sound models' plans need 2 MB and less
CASES = int(os.environ.get("GEMCUTTER_CASES", "100"))


@pytest.fixture(scope="module", params=CONTAINERS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("sound") / request.param
    write_sound(request.param, folder)
    return request.param, folder


def verdicts(folder: Path) -> tuple[bool, str, bool, str]:
    """Return whether the doctor and loading accept a checkpoint, each with its reasons."""
    model = str(next(folder.glob("model.gguf"), folder))
    report = examine(model, read_text=read_text)
    words = "; ".join(f"{each['kind']} {each['text']}" for each in report["problems"])
    try:
        gemcutter.load(model, context=32, max_num_seqs=1, max_batched_tokens=8, prefix_cache_bytes=0, media="auto").close()
    except GemcutterError as error:
        return report["exit_code"] < 2, words, False, str(error)
    return report["exit_code"] < 2, words, True, ""


def test_sound_checkpoints_are_accepted(sound: tuple[str, Path]) -> None:
    assert verdicts(sound[1])[::2] == (True, True)


def test_damaged_checkpoints_get_one_verdict(sound: tuple[str, Path], tmp_path: Path) -> None:
    container, folder = sound
    refused, disagreeing, greedy = 0, list[str](), list[str]()
    for seed in range(CASES):
        draw = random.Random(seed)
        copy = shutil.copytree(folder, tmp_path / f"{container}-{seed}")
        mutation = draw.choice(MUTATIONS[container])
        mutation(copy, draw)
        forget_peak()
        before = peak_rss_bytes()
        says, words, loads, error = verdicts(copy)
        taken = peak_rss_bytes() - before
        if taken > ROOM_BYTES:
            greedy.append(f"case {seed}, {mutation.__name__}: {taken / 1e6:.0f} MB")
        refused += not loads
        if says != loads:
            what = f"doctor {says} ({words[:200]}), loading {loads} ({error[:200]})"
            disagreeing.append(f"case {seed}, {mutation.__name__}: {what}")
        shutil.rmtree(copy)
    assert not disagreeing, "\n".join(disagreeing)
    assert not greedy, "\n".join(greedy)
    assert CASES < 20 or 0.1 < refused / CASES < 0.95
