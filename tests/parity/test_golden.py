"""The trained tiny models against what transformers said of them: the same text, the same logits, the same losses.

Random weights can't show a wrong token, trained ones can. The release-style checkpoint is put together here from the demo (the
same weights, as `save_pretrained` wrote them) and what publishers add: towers, redundant shared keys and values, another prefix,
shards. Read `tests/goldens/` for the numbers.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.engine.engine import Engine
from gemcutter.engine.media import MediaSpan
from gemcutter.engine.request import PromptReport, Request, RequestEvent
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_model
from gemcutter.media.image import grid_positions
from gemcutter.model.text import Decoder
from tests.trained import release_folder

GOLDENS = Path(__file__).parents[1] / "goldens"
MODELS = ["tiny-e", "tiny-e-release", "tiny-a"]


@functools.cache
def read(name: str) -> Any:
    """Read a golden file."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def release() -> Path:
    """Return the published layout over the demo's weights."""
    return release_folder()


@functools.cache
def opened(folder: Path) -> Checkpoint:
    """Open a checkpoint once."""
    return open_checkpoint(folder)


def build(name: str, release: Path, dtype: torch.dtype, kernels: str) -> Engine:
    """Load a model into an engine whose steps are shorter than most prompts and whose batch is smaller than the test's."""
    folder = {"tiny-e": DEMO_FOLDER, "tiny-e-release": release, "tiny-a": GOLDENS / "tiny-a"}[name]
    checkpoint = opened(folder)
    params = load_params(checkpoint, dtype, torch.device("cpu"))
    return Engine(Decoder(checkpoint.plan, params, dtype, "cpu", kernels), 1024, max_batched_tokens=64, max_num_seqs=6)


def run(engine: Engine, requests: list[Request]) -> list[list[RequestEvent]]:
    """Run requests together and give each one's events."""
    events: dict[int, list[RequestEvent]] = {engine.submit(request): [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request].append(event)
    return list(events.values())


def report(events: list[RequestEvent]) -> PromptReport:
    """Return the report that a request's first event carries."""
    assert events[0].prompt is not None
    return events[0].prompt


def loss(engine: Engine, windows: list[list[int]]) -> tuple[float, int]:
    """Return the mean negative log-likelihood over windows of ids, in nats a token, and how many tokens were predicted."""
    answers = run(engine, [Request(tuple(ids), max_tokens=0, prompt_logprobs=0) for ids in windows])
    logprobs = [entry.logprob for events in answers for entry in report(events).logprobs]
    return -math.fsum(logprobs) / len(logprobs), len(logprobs)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logits(name: str, kernels: str, release: Path) -> None:
    goldens = read(name)["prompts"]
    requests = [Request(tuple(each["token_ids"]), max_tokens=len(each["greedy_ids"]), top_logits=10) for each in goldens]
    answers = run(build(name, release, torch.float32, kernels), requests)
    assert len(answers) == 12
    for golden, events in zip(goldens, answers, strict=True):
        assert [event.token for event in events] == golden["greedy_ids"], golden["id"]
        ids, values = zip(*report(events).top_logits, strict=True)
        assert list(ids) == golden["top10_ids"], golden["id"]
        assert list(values) == pytest.approx(golden["top10_logits"], rel=1e-4), golden["id"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)], ids=str)
@pytest.mark.parametrize("text", ["passage_600", "ppl_8k"])
@pytest.mark.parametrize("name", MODELS)
def test_losses(name: str, text: str, dtype: torch.dtype, tolerance: float, release: Path) -> None:
    prompts, golden = read("prompts")[text], read(name)[text]
    mean, count = loss(build(name, release, dtype, "auto"), prompts.get("windows") or [prompts["token_ids"]])
    assert count == golden["n_predicted"]
    assert mean == pytest.approx(golden["nll_mean"], rel=tolerance)


def test_a_release_is_the_demo_and_more(release: Path) -> None:
    """The same numbers above would mean little if the loader had not met what it must skip."""
    mine, bare = opened(release), opened(DEMO_FOLDER)
    assert mine.plan == bare.plan
    assert len(mine.matched.redundant) == 12
    assert {piece.name for piece in mine.matched.redundant} == {
        f"layers.{layer.index}.attn.{name}" for layer in mine.plan.layers if not layer.writes for name in ("in", "k_norm")
    }
    assert set(mine.matched.other_modules) == {"audio tower", "vision tower"}
    assert not bare.matched.notes(bare.plan)


@dataclass(frozen=True)
class Waves:
    """The golden's image: its values are a formula's, no pixels."""

    rows: int = 6
    columns: int = 9

    def values(self) -> Tensor:
        patches, channels = torch.arange(54.0, dtype=torch.float64)[:, None], torch.arange(768.0, dtype=torch.float64)
        return (0.5 + 0.5 * torch.sin(0.37 * patches + 0.011 * channels)).float()

    def positions(self) -> Tensor:
        return grid_positions(self.rows, self.columns)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_an_images_rows_and_logits(kernels: str, release: Path) -> None:
    golden = read("tiny-e-release-image")
    opened = open_model(LoadOptions(model=str(release), dtype="float32", kernels=kernels, media=("image",)))
    assert opened.vision is not None
    (rows_KD,) = opened.vision.encode([Waves()])
    wanted = torch.tensor(golden["soft_tokens"])
    assert (rows_KD - wanted).abs().max() / wanted.abs().max() < 2e-5
    ids = golden["image_prompt"]["token_ids"]
    image = 18
    span = MediaSpan(ids.index(image), "0" * 64, rows_KD)
    assert ids.count(image) == span.rows
    for chunk in (1, 7, 64):
        engine = Engine(opened.decoder, 1024, max_batched_tokens=chunk)
        (events,) = run(engine, [Request(tuple(ids), max_tokens=1, top_logits=10, media=(span,))])
        found, values = zip(*report(events).top_logits, strict=True)
        assert list(found) == golden["image_prompt"]["top10_ids"]
        assert list(values) == pytest.approx(golden["image_prompt"]["top10_logits"], rel=2e-5)


@dataclass(frozen=True)
class Swings:
    """The golden's sound: its frames are a formula's, no samples."""

    soft_tokens: int = 16

    @property
    def values_FC(self) -> Tensor:
        frames, bins = torch.arange(64.0, dtype=torch.float64)[:, None], torch.arange(128.0, dtype=torch.float64)
        return (0.8 * torch.sin(0.05 * frames * (1 + bins % 7) + 0.1 * bins)).float()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_sounds_rows_and_logits(kernels: str, release: Path) -> None:
    golden = read("tiny-e-release-sound")
    opened = open_model(LoadOptions(model=str(release), dtype="float32", kernels=kernels, media=("audio",)))
    assert opened.audio is not None
    (rows_KD,) = opened.audio.encode([Swings()])
    wanted = torch.tensor(golden["soft_tokens"])
    assert (rows_KD - wanted).abs().max() / wanted.abs().max() < 2e-5
    ids, sound = golden["audio_prompt"]["token_ids"], 21
    span = MediaSpan(ids.index(sound), "0" * 64, rows_KD, is_block=False)
    assert ids.count(sound) == span.rows
    for chunk in (1, 7, 64):
        engine = Engine(opened.decoder, 1024, max_batched_tokens=chunk)
        (events,) = run(engine, [Request(tuple(ids), max_tokens=1, top_logits=10, media=(span,))])
        found, values = zip(*report(events).top_logits, strict=True)
        assert list(found) == golden["audio_prompt"]["top10_ids"]
        assert list(values) == pytest.approx(golden["audio_prompt"]["top10_logits"], rel=2e-5)
