"""Prompts with images, videos and sounds against transformers, in float32: all logits, whatever the chunks and the batch.

Owns whole decoders with their towers, run by the engine. Read `test_vision.py` and `test_audio_tower.py` for the towers alone,
`tests/wrappers.py` for the models and for how transformers is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemcutter.engine.engine import Engine
from gemcutter.engine.request import PromptReport, Request
from gemcutter.engine.runner import PendingStep
from gemcutter.engine.scheduler import ScheduledChunk
from gemcutter.errors import RequestError
from gemcutter.media.audio import SoundFrames
from gemcutter.media.image import ImagePatches, cut_image
from gemcutter.model.audio import AudioTower
from gemcutter.model.text import Decoder
from gemcutter.model.vision import VisionTower
from tests.images import drawing
from tests.topologies import KERNELS, TOLERANCE, relative_error
from tests.wrappers import (
    AUDIO,
    VISION,
    Media,
    build_audio_tower,
    build_text,
    build_tower,
    build_wrapper,
    cut_drawings,
    cut_tones,
    media_request,
    official_logits,
    patch_shape,
)

CONTEXT = 512
LARGEST = 70  # soft tokens of the images here


LENGTHS = (6000, 17_000, 161)  # samples of the sounds: 10, 27 and 1 soft tokens


@cache
def model_of(size: str) -> tuple[PreTrainedModel, VisionTower, tuple[ImagePatches, ...]]:
    model = build_wrapper(size, hears=size in AUDIO)
    return model, build_tower(model), tuple(cut_drawings(model, [(60, 90, LARGEST), (200, 30, LARGEST), (48, 48, LARGEST)]))


@cache
def hearing_of(size: str) -> tuple[AudioTower, tuple[SoundFrames, ...]]:
    model = model_of(size)[0]
    return build_audio_tower(model), tuple(cut_tones(model, LENGTHS))


@cache
def decoder_of(size: str, kernels: str = "reference") -> Decoder:
    return build_text(model_of(size)[0], kernels)


@cache
def case(size: str, name: str) -> tuple[Request, Tensor]:
    """Return a prompt with images or sounds, and transformers' logits of all its rows."""
    model, vision, (first, second, third) = model_of(size)
    parts: dict[str, Sequence[int | Media]] = {
        "between texts": (5, first, 9),
        "side by side": (3, first, second, 4),
        "at both ends": (third, 20, first),
        "text": (30,),
        "a video": (5, (first, third, first), 9),
        "videos and an image": ((third, first), 2, second, 4, (first,)),
    }
    towers: list[VisionTower | AudioTower] = [vision]
    if size in AUDIO:
        audio, (low, high, short) = hearing_of(size)
        towers.append(audio)
        parts["a sound"] = (5, high, 9)
        parts["sounds"] = (low, short, 3, high)
        parts["all kinds"] = (4, high, (third, first), 2, first, low, 6)
        parts["sounds and images"] = (2, low, first, 7, third, high, 4)
    media = [part for part in parts[name] if not isinstance(part, int)]
    request = media_request(towers, parts[name], hidden_states=True, max_tokens=0)
    return request, official_logits(model, request, media) if media else official_text(model, request)


def official_text(model: PreTrainedModel, request: Request) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([request.prompt]), use_cache=False).logits[0]
    return logits


def run(engine: Engine, requests: Sequence[Request], joining: int = 0) -> list[PromptReport]:
    """Run requests to their ends, each submitted `joining` steps after the one before; return the reports on their prompts."""
    waiting, numbers, reports, steps = list(requests), list[int](), dict[int, PromptReport](), 0
    while waiting or engine.has_work:
        while waiting and steps >= joining * len(numbers):
            numbers.append(engine.submit(waiting.pop(0)))
        for event in engine.step():
            assert event.error is None, event.error
            if event.prompt is not None:
                reports[event.request] = event.prompt
        steps += 1
    return [reports[number] for number in numbers]


def logits_of(engine: Engine, report: PromptReport) -> Tensor:
    with torch.inference_mode():
        return engine.decoder.logits(torch.cat(report.hidden_states))


def engine_of(size: str, chunk: int, kernels: str = "reference", **more: int) -> Engine:
    return Engine(decoder_of(size, kernels), CONTEXT, chunk, more.pop("max_num_seqs", 1), largest_block=LARGEST, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("size", VISION)
def test_logits_are_those_of_transformers(size: str, chunk: int, kernels: str) -> None:
    engine = engine_of(size, chunk, kernels)
    names = ("between texts", "side by side", "at both ends")
    for name in names[:1] if (chunk, kernels) == (1, "reference") else names:
        request, wanted = case(size, name)
        (report,) = run(engine, [request])
        assert relative_error(logits_of(engine, report), wanted) < TOLERANCE, name


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("size", AUDIO)
def test_logits_behind_sounds_are_those_of_transformers(size: str, chunk: int, kernels: str) -> None:
    engine = engine_of(size, chunk, kernels)
    names = ("sounds and images", "a sound", "sounds", "all kinds")
    for name in names[:1] if (chunk, kernels) == (1, "reference") else names:
        request, wanted = case(size, name)
        (report,) = run(engine, [request])
        assert relative_error(logits_of(engine, report), wanted) < TOLERANCE, name


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("size", VISION)
def test_logits_behind_videos_are_those_of_transformers(size: str, chunk: int, kernels: str) -> None:
    engine = engine_of(size, chunk, kernels)
    for name in ("a video", "videos and an image"):
        request, wanted = case(size, name)
        (report,) = run(engine, [request])
        assert relative_error(logits_of(engine, report), wanted) < TOLERANCE, name


@pytest.mark.parametrize("joining", [0, 2])
@pytest.mark.parametrize("size", AUDIO)
def test_batches_of_text_images_and_sounds_that_join_and_leave(size: str, joining: int) -> None:
    engine = engine_of(size, 24, max_num_seqs=3)
    cases = [case(size, name) for name in ("text", "sounds and images", "a sound", "between texts", "sounds", "text")]
    for report, (_, wanted) in zip(run(engine, [request for request, _ in cases], joining), cases, strict=True):
        assert relative_error(logits_of(engine, report), wanted) < TOLERANCE


@pytest.mark.parametrize("joining", [0, 1, 3])
@pytest.mark.parametrize("size", VISION)
def test_batches_of_text_and_images_that_join_and_leave(size: str, joining: int) -> None:
    engine = engine_of(size, 24, max_num_seqs=3)
    cases = [case(size, name) for name in ("text", "side by side", "between texts", "text", "at both ends")]
    for report, (_, wanted) in zip(run(engine, [request for request, _ in cases], joining), cases, strict=True):
        assert relative_error(logits_of(engine, report), wanted) < TOLERANCE


# ---- chunks and blocks ----


@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_only_blocks_that_see_themselves_are_kept_whole(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, chunks = engine_of(size, 10, max_num_seqs=2), list[list[tuple[int, int, int]]]()
    launch = engine.runner.launch

    def noted(scheduled: Sequence[ScheduledChunk]) -> PendingStep:
        chunks.append([(chunk.sequence.number, chunk.start, chunk.start + chunk.rows) for chunk in scheduled])
        return launch(scheduled)

    monkeypatch.setattr(engine.runner, "launch", noted)
    requests = [case(size, name)[0] for name in ("side by side", "at both ends")]
    run(engine, requests)
    edges = [(number, edge) for step in chunks for number, start, stop in step for edge in (start, stop)]
    cut = [
        (number, edge)
        for number, edge in edges
        for span in requests[number].media
        if span.start < edge < span.stop  # numbers count from 0, in the order of submission
    ]
    assert bool(cut) == (size == "E2B")
    larger = [step for step in chunks if sum(stop - start for _, start, stop in step) > 10]
    assert bool(larger) == (size == "31B")
    assert all(sum(stop - start > 10 for _, start, stop in step) == 1 for step in larger)


def test_a_block_larger_than_a_step_may_be_is_refused() -> None:
    request = case("31B", "between texts")[0]
    engine = Engine(decoder_of("31B"), CONTEXT, 16)
    with pytest.raises(RequestError, match=r"request.media\[0\]: 60 rows, a step holds 16; lower max_soft_tokens, or raise"):
        engine.submit(request)
    Engine(decoder_of("E2B"), CONTEXT, 16).check(case("E2B", "between texts")[0])


def test_spans_must_fit_their_prompt() -> None:
    request = case("E2B", "between texts")[0]
    engine, (span,) = engine_of("E2B", 16), request.media
    wrong = {
        "ascend within the prompt": (replace(span, start=20),),
        "each apart": (span, span),
        r"rows of 48 numbers, found \[3, 4\]": (replace(span, embeds_KD=torch.zeros(3, 4)),),
        "a tuple of MediaSpan": [span],
    }
    for message, media in wrong.items():
        with pytest.raises(RequestError, match=message):
            engine.check(replace(request, media=media))  # type: ignore[arg-type]


# ---- reuse ----


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_prefixes_with_images_are_told_apart_by_content(size: str) -> None:
    _, tower, (first, _, _) = model_of(size)
    same_size = cut_image(255 - drawing(60, 90), LARGEST, patch_shape(tower.plan))
    assert same_size.soft_tokens == first.soft_tokens
    engine = engine_of(size, 64, prefix_cache_bytes=None)
    requests = [media_request([tower], (70, image, 20), max_tokens=0, top_logits=5) for image in (first, same_size, first)]
    assert requests[0].prompt == requests[1].prompt
    reports = [run(engine, [request])[0] for request in requests]
    fresh = [run(engine_of(size, 64), [request])[0] for request in requests]
    assert [report.cached_tokens for report in reports[:1]] == [0]
    assert reports[1].cached_tokens <= 71  # the text before the image, and its marker
    assert reports[2].cached_tokens > 71 + first.soft_tokens // 2
    for report, other in zip(reports, fresh, strict=True):
        assert report.top_logits == other.top_logits
    assert reports[0].top_logits != reports[1].top_logits


@pytest.mark.parametrize("size", ["E4B", "12B"])
def test_prefixes_with_sounds_are_told_apart_by_content(size: str) -> None:
    tower, (_, sound, _) = hearing_of(size)
    other = SoundFrames(-sound.values_FC, sound.soft_tokens, "f" * 64)
    engine = engine_of(size, 64, prefix_cache_bytes=None)
    requests = [media_request([tower], (70, each, 20), max_tokens=0, top_logits=5) for each in (sound, other, sound)]
    assert requests[0].prompt == requests[1].prompt
    reports = [run(engine, [request])[0] for request in requests]
    assert [report.cached_tokens for report in reports[:1]] == [0]
    assert reports[1].cached_tokens <= 71
    assert reports[2].cached_tokens > 71 + sound.soft_tokens // 2
    assert reports[1].top_logits == run(engine_of(size, 64), [requests[1]])[0].top_logits != reports[0].top_logits


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_sequences_that_lose_their_pages_compute_images_anew(size: str) -> None:
    """A pool for one sequence is shared by three: the less urgent ones start again, within or after their images."""
    _, tower, images = model_of(size)
    requests = [media_request([tower], (8 * n, image, 6), seed=n, max_tokens=6) for n, image in enumerate(images)]
    alone = [tokens(engine_of(size, 16), [request])[0] for request in requests]
    small = Engine(decoder_of(size), 128, 16, 1, largest_block=LARGEST)
    small.scheduler.max_num_seqs = 3
    assert tokens(small, requests) == alone
    assert small.stats().preemptions or size != "E2B"


def tokens(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Return the replies to requests that are submitted at once."""
    replies: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            replies[event.request] += [] if event.token is None else [event.token]
    return list(replies.values())
