"""Images, videos and sounds in conversations, raw text and ids, through the Python API on a trained model with its towers.

Owns where rows stand in a prompt, what is encoded how often, and the errors. What the rows and logits are is
`parity/test_golden.py`'s and `parity/test_media.py`'s; what may be an image is `test_image.py`'s, what a sound `test_audio.py`'s,
what a video `test_video.py`'s.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import gemcutter
from gemcutter import media_reader
from gemcutter.api import Model
from gemcutter.errors import RequestError
from gemcutter.media_parts import take_media
from gemcutter.media_reader import MediaReader
from gemcutter.model.audio import AudioTower
from gemcutter.model.vision import VisionTower
from tests.images import drawing
from tests.sounds import RATE, SPEECH, saved, tones
from tests.trained import release_folder
from tests.videos import filmed, rolling

BEGIN, PLACEHOLDER, END = 17, 18, 19  # ids of the markers of images
HEAR, SOUND, HEARD = 20, 21, 22  # and of sounds
MOVING = 23  # the placeholder of videos, whose frames have images' markers
SMALL = 70  # soft tokens
PICTURE = drawing(60, 90)
ROWS = 60  # that it becomes: 6 rows of 10 squares
TUNE = (tones(16_000), RATE)
TUNE_ROWS = 25  # that it becomes: 99 frames, four a row


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with gemcutter.load(release_folder(), media="image,audio", dtype="float32", context=4096) as found:
        yield found


def asked(image: Any, text: str = "What is it?", key: str = "image") -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image", key: image}, {"type": "text", "text": text}]}]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def heard(sound: Any, text: str = "What is it?", key: str = "audio") -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "audio", key: sound}, {"type": "text", "text": text}]}]


def encoded(model: Model, monkeypatch: pytest.MonkeyPatch, cache_bytes: int = 1 << 20) -> list[int]:
    """Return a list that will hold how many images or sounds each call of a tower gets, and forget what was seen before."""
    counts = list[int]()
    for tower in (VisionTower, AudioTower):

        def counted(self: Any, items: list[Any], body: Any = None, encode: Any = tower.encode) -> Any:
            counts.append(len(items))
            return encode(self, items, body)

        monkeypatch.setattr(tower, "encode", counted)
    vision, audio = model._towers
    monkeypatch.setattr(model, "media", MediaReader(model.tokenizer, vision, audio, cache_bytes))  # type: ignore[arg-type]
    return counts


# ---- where rows stand ----


def test_an_image_takes_its_placeholders_place_between_markers(model: Model) -> None:
    prepared = model.prepare(asked(PICTURE), max_soft_tokens=SMALL)
    ids, (span,) = list(prepared.request.prompt), prepared.request.media
    assert ids == [2, 6, 481, 288, BEGIN, *[PLACEHOLDER] * ROWS, END, 506, 491, 628, 319, 7, 288, 6, 483, 288]
    assert (span.start, span.rows, span.stop) == (5, ROWS, 5 + ROWS)
    assert list(prepared.written) == [2, 6, 481, 288, PLACEHOLDER, 506, 491, 628, 319, 7, 288, 6, 483, 288]
    assert model.encode(asked(PICTURE)) == list(prepared.written)


def test_several_images_in_any_order_of_parts(model: Model) -> None:
    wide, other = drawing(40, 200), 255 - PICTURE
    parts: list[dict[str, object]] = [
        {"type": "text", "text": "From"},
        {"type": "image", "image": wide},
        {"type": "image", "image": other},
        {"type": "text", "text": "to"},
        {"type": "image", "image": PICTURE},
    ]
    conversation = [{"role": "user", "content": parts[:3]}, {"role": "user", "content": parts[3:]}]
    request = model.prepare(conversation, max_soft_tokens=SMALL).request
    singles = [model.prepare(asked(image), max_soft_tokens=SMALL).request.media[0] for image in (wide, other, PICTURE)]
    assert [span.digest for span in request.media] == [span.digest for span in singles]
    assert len({span.digest for span in singles}) == 3
    for span in request.media:
        around = request.prompt[span.start - 1 : span.stop + 1]
        assert around == (BEGIN, *[PLACEHOLDER] * span.rows, END)
    assert sum(token == PLACEHOLDER for token in request.prompt) == sum(span.rows for span in singles)


def test_raw_text_and_ids_have_images_beside_them(model: Model) -> None:
    text = "<|turn>user\n<|image|>What is it?<turn|>\n<|turn>model\n"
    plain = model.prepare(asked(PICTURE), max_soft_tokens=SMALL)
    options: dict[str, Any] = {"images": [PICTURE], "max_soft_tokens": SMALL}
    for prompt in (text, plain.written):
        prepared = model.prepare(prompt, **options)
        assert prepared.request.prompt == plain.request.prompt
        assert prepared.request.media == plain.request.media
    both = model.generate([text, list(plain.written)], max_tokens=8, temperature=0, **options)
    assert (
        both[0].tokens == both[1].tokens == model.chat(asked(PICTURE), max_soft_tokens=SMALL, max_tokens=8, temperature=0).tokens
    )


def test_what_looks_like_a_placeholder_in_a_conversation_is_text(model: Model) -> None:
    prepared = model.prepare(asked(PICTURE, "Is <|image|> a marker?"), max_soft_tokens=SMALL)
    assert prepared.written.count(PLACEHOLDER) == 1
    assert len(prepared.request.media) == 1


def test_a_sound_takes_its_placeholders_place_between_markers(model: Model) -> None:
    prepared = model.prepare(heard(TUNE))
    ids, (span,) = list(prepared.request.prompt), prepared.request.media
    assert ids == [2, 6, 481, 288, HEAR, *[SOUND] * TUNE_ROWS, HEARD, 506, 491, 628, 319, 7, 288, 6, 483, 288]
    assert (span.start, span.rows, span.is_block) == (5, TUNE_ROWS, False)
    assert list(prepared.written) == [2, 6, 481, 288, SOUND, 506, 491, 628, 319, 7, 288, 6, 483, 288]
    assert model.encode(heard(TUNE)) == list(prepared.written)


def test_images_and_sounds_of_one_prompt_in_any_order(model: Model) -> None:
    other = (tones(7000, seed=3), RATE)
    parts: list[dict[str, object]] = [
        {"type": "audio", "audio": other},
        {"type": "text", "text": "and"},
        {"type": "image", "image": PICTURE},
        {"type": "audio", "audio": TUNE},
        {"type": "image", "image": 255 - PICTURE},
    ]
    request = model.prepare([{"role": "user", "content": parts}], max_soft_tokens=SMALL).request
    alone = [model.prepare(heard(sound)).request.media[0] for sound in (other, TUNE)]
    seen = [model.prepare(asked(image), max_soft_tokens=SMALL).request.media[0] for image in (PICTURE, 255 - PICTURE)]
    assert [span.digest for span in request.media] == [each.digest for each in (alone[0], seen[0], alone[1], seen[1])]
    assert [span.is_block for span in request.media] == [False, True, False, True]
    for span, begin, end in zip(request.media, (HEAR, BEGIN) * 2, (HEARD, END) * 2, strict=True):
        placeholder = PLACEHOLDER if begin == BEGIN else SOUND
        assert request.prompt[span.start - 1 : span.stop + 1] == (begin, *[placeholder] * span.rows, end)
    beside = {"images": [PICTURE, 255 - PICTURE], "audio": [other, TUNE], "max_soft_tokens": SMALL}
    text = "<|turn>user\n<|audio|>and<|image|><|audio|><|image|><turn|>\n<|turn>model\n"
    assert model.prepare(text, **beside).request.media == request.media  # type: ignore[arg-type]
    assert model.prepare(text, **beside).request.prompt == request.prompt  # type: ignore[arg-type]


def test_a_sound_of_less_than_a_frame_has_markers_alone(model: Model) -> None:
    prepared = model.prepare([*heard((tones(160), RATE)), *heard((tones(161), RATE))])
    assert [span.rows for span in prepared.request.media] == [1]
    ids = prepared.request.prompt
    assert [ids[index + 1] for index, token in enumerate(ids) if token == HEAR] == [HEARD, SOUND]
    assert len(model.chat(heard((tones(100), RATE)), max_tokens=3).tokens) > 0


def test_a_video_is_frames_between_their_times(model: Model) -> None:
    frames = rolling(40, 60, 90)
    prepared = model.prepare(
        [{"role": "user", "content": [{"type": "video", "video": (frames, 2)}, {"type": "text", "text": "Hi"}]}]
    )
    times = [f"00:{second:02}" for second in (number * 40 // 32 // 2 for number in range(32))]
    text = " ".join(f"{time} <|image>{'<|video|>' * ROWS}<image|>" for time in times)
    whole = f"<bos><|turn>user\n{text}Hi<turn|>\n<|turn>model\n"
    assert list(prepared.request.prompt) == model.tokenizer.encode(whole, bos=False)
    assert list(prepared.written).count(MOVING) == 1
    assert [span.rows for span in prepared.request.media] == [ROWS] * 32
    assert all(span.is_block for span in prepared.request.media)
    images = [model.prepare(asked(frames[number * 40 // 32]), max_soft_tokens=SMALL).request.media[0] for number in (0, 1, 31)]
    assert [prepared.request.media[number].digest for number in (0, 1, 31)] == [span.digest for span in images]
    beside = model.prepare("<|turn>user\n<|video|>Hi<turn|>\n<|turn>model\n", videos=[(frames, 2)], max_soft_tokens=280)
    assert beside.request.prompt == prepared.request.prompt  # a budget for images does not change a video's
    assert len(model.chat([{"role": "user", "content": [{"type": "video", "video": frames[:2]}]}], max_tokens=3).tokens) > 0


def test_a_video_file_beside_an_image_and_a_sound(model: Model, tmp_path: Path) -> None:
    film = tmp_path / "a.mp4"
    film.write_bytes(filmed(rolling(20, 60, 90)))
    parts: list[dict[str, object]] = [
        {"type": "video", "path": str(film)},
        {"type": "image", "image": PICTURE},
        {"type": "audio", "audio": TUNE},
    ]
    request = model.prepare([{"role": "user", "content": parts}], max_soft_tokens=SMALL).request
    assert [span.rows for span in request.media] == [*[ROWS] * 20, ROWS, TUNE_ROWS]
    assert request.prompt.count(MOVING) == 20 * ROWS
    assert request.prompt.count(PLACEHOLDER) == ROWS


# ---- what is read, and how often ----


def test_paths_bytes_pictures_and_arrays_are_alike(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(PICTURE))
    sources = (PICTURE, png(PICTURE), Image.fromarray(PICTURE), tmp_path / "a.png", str(tmp_path / "a.png"))
    requests = [model.prepare(asked(source), max_soft_tokens=SMALL).request for source in sources]
    requests.append(model.prepare(asked(str(tmp_path / "a.png"), key="path"), max_soft_tokens=SMALL).request)
    assert len({(request.prompt, request.media) for request in requests}) == 1


def test_sounds_of_files_and_arrays_are_alike(model: Model, tmp_path: Path) -> None:
    data = saved(TUNE[0], subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(data)
    sources = (TUNE, data, tmp_path / "a.wav", str(tmp_path / "a.wav"))
    requests = [model.prepare(heard(source)).request for source in sources]
    requests.append(model.prepare(heard(str(tmp_path / "a.wav"), key="path")).request)
    assert len({(request.prompt, request.media) for request in requests}) == 1


def test_the_reply_depends_on_the_sound(model: Model) -> None:
    best = [
        dict(model.chat(heard(sound), max_tokens=1, top_logits=5).prompt.top_logits)
        for sound in (TUNE, (-TUNE[0][::-1].copy(), RATE), TUNE)
    ]
    assert best[0] == pytest.approx(best[2], rel=1e-5)  # the second time, most of it comes from the prefix cache
    assert best[0] != pytest.approx(best[1], rel=1e-2)


def test_the_reply_depends_on_the_image(model: Model) -> None:
    best = [
        model.chat(asked(image), max_soft_tokens=SMALL, max_tokens=1, top_logits=5).prompt.top_logits
        for image in (PICTURE, 255 - PICTURE, PICTURE)
    ]
    assert best[0] == best[2] != best[1]


def test_budgets_decide_how_many_rows_an_image_gets(model: Model) -> None:
    rows = [model.prepare(asked(PICTURE), max_soft_tokens=budget).request.media[0].rows for budget in (70, 140)]
    default = model.prepare(asked(PICTURE)).request.media[0].rows
    assert rows == [60, 126]
    assert 126 < default <= 280


def test_an_image_that_comes_again_is_not_encoded_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = encoded(model, monkeypatch)
    conversation = [*asked(PICTURE), {"role": "assistant", "content": "A drawing."}, *asked(PICTURE), *asked(255 - PICTURE)]
    model.prepare(conversation, max_soft_tokens=SMALL)
    assert counts == [2]
    model.prepare(asked(png(PICTURE)), max_soft_tokens=SMALL)
    assert counts == [2]
    model.prepare(asked(PICTURE), max_soft_tokens=140)
    assert counts == [2, 1]


def test_a_sound_that_comes_again_is_not_encoded_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, other = encoded(model, monkeypatch), (tones(8000, seed=1), RATE)
    model.prepare([*heard(TUNE), {"role": "assistant", "content": "A tune."}, *heard(other), *heard(TUNE), *asked(PICTURE)])
    assert counts == [1, 2]
    model.prepare(heard(saved(TUNE[0], subtype="FLOAT")))
    assert counts == [1, 2]
    model.prepare([*asked(PICTURE), *heard((tones(9000, seed=2), RATE))])
    assert counts == [1, 2, 1]


def test_files_of_all_kinds_are_decoded_once(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, decoded = encoded(model, monkeypatch), list[str]()
    for name in ("cut_image", "cut_sound", "cut_video"):
        original = getattr(media_reader, name)
        monkeypatch.setattr(media_reader, name, lambda *given, name=name, cut=original: (decoded.append(name), cut(*given))[1])
    film = filmed(rolling(3, 60, 90))
    (tmp_path / "a.wav").write_bytes(saved(TUNE[0]))
    parts: list[dict[str, object]] = [
        {"type": "image", "image": png(PICTURE)},
        {"type": "audio", "path": str(tmp_path / "a.wav")},
        {"type": "video", "video": film},
    ]
    conversation: list[Any] = [{"role": "user", "content": parts}]
    first = model.prepare(conversation, max_soft_tokens=SMALL).request
    again = model.prepare(conversation, max_soft_tokens=SMALL).request
    assert (first.prompt, first.media) == (again.prompt, again.media)
    assert all(one.embeds_KD.equal(other.embeds_KD) for one, other in zip(first.media, again.media, strict=True))
    assert decoded == ["cut_image", "cut_sound", "cut_video"]
    assert counts == [4, 1]
    model.prepare(asked(png(PICTURE)), max_soft_tokens=140)
    assert decoded[3:] == ["cut_image"]
    (tmp_path / "a.wav").write_bytes(saved(TUNE[0][::-1]))  # another sound under the same path
    assert model.prepare(heard(tmp_path / "a.wav")).request.media[0].digest != first.media[1].digest


def test_what_is_known_does_not_wait_for_what_is_encoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(model, monkeypatch)
    model.prepare(asked(PICTURE), max_soft_tokens=SMALL)
    begun, may_end, encode = threading.Event(), threading.Event(), VisionTower.encode

    def slow(self: VisionTower, items: list[Any], body: Any = None) -> Any:
        begun.set()
        assert may_end.wait(60)
        return encode(self, items, body)

    monkeypatch.setattr(VisionTower, "encode", slow)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(model.prepare, asked(255 - PICTURE), max_soft_tokens=SMALL) for _ in range(2)]
        try:
            assert begun.wait(60)
            known = model.prepare(asked(PICTURE), max_soft_tokens=SMALL)
        finally:
            may_end.set()
        found = [each.result().request for each in waiting]
    assert known.request.media[0].digest != found[0].media[0].digest
    assert found[0].media[0].embeds_KD.equal(found[1].media[0].embeds_KD)


def test_a_file_whose_rows_were_forgotten_is_decoded_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = encoded(model, monkeypatch, cache_bytes=0)
    requests = [model.prepare(asked(png(PICTURE)), max_soft_tokens=SMALL).request for _ in range(2)]
    assert requests[0].media == requests[1].media
    assert counts == [1, 1]


def test_rows_that_are_kept_have_a_limit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ROWS * model.plan.hidden * 4
    counts = encoded(model, monkeypatch, cache_bytes=2 * one)
    images = [np.roll(PICTURE, shift, axis=1) for shift in (0, 7, 14)]
    for image in (*images, images[2], images[1], images[0]):
        model.prepare(asked(image), max_soft_tokens=SMALL)
    assert counts == [1, 1, 1, 1]
    assert model.media is not None
    assert model.media._size == 2 * one
    fresh, other = np.roll(PICTURE, 21, axis=1), np.roll(PICTURE, 28, axis=1)
    model.prepare([*asked(fresh), *asked(other), *asked(fresh)], max_soft_tokens=SMALL)
    kept = model.media._rows.values()
    assert {rows.untyped_storage().nbytes() for rows in kept} == {one}  # none holds on to what was encoded with it


def test_the_next_turn_finds_what_was_computed_for_the_image(model: Model) -> None:
    conversation: list[Any] = asked(np.roll(PICTURE, 3, axis=0), "Tell me more.")
    first = model.chat(conversation, max_soft_tokens=SMALL, max_tokens=12, temperature=0)
    assert first.metrics.cached_tokens < 10
    conversation += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    second = model.chat(conversation, max_soft_tokens=SMALL, max_tokens=1)
    assert second.metrics.cached_tokens > ROWS


def test_speech_becomes_as_many_rows_as_its_time_has(model: Model) -> None:
    """espeak-ng's voice (goldens/speech): the rows are those of the time, and the model answers."""
    rows = list[int]()
    for name in ("lantern", "window"):
        file = SPEECH / f"{name}.flac"
        samples, rate = soundfile.read(file)
        (span,) = model.prepare(heard(file, "Transcribe it.")).request.media
        at_16k = -(-len(samples) * RATE // rate)
        assert span.rows == -(-((at_16k - 1) // 160) // 4)
        assert len(model.chat(heard(file, "Transcribe it."), max_tokens=4).tokens) > 0
        rows.append(span.rows)
    assert rows == [22, 78]


# ---- errors ----


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("What is it?", {"images": [PICTURE]}, r"1 were given, and the prompt has 0 times <\|image\|>"),
        ("<|image|><|image|>", {"images": [PICTURE]}, r"1 were given, and the prompt has 2 times"),
        ("<|audio|>", {"audio": TUNE}, r"sounds: 2 were given, and the prompt has 1 times <\|audio\|>"),
        ("<|audio|>", {"audio": TUNE[0]}, "audio: expected a list of paths, bytes, or pairs of an array and its rate"),
        ("<|audio|>", {"audio": [b"no sound"]}, r"audio\[0\]: no sound that can be read"),
        ("<|audio|>", {"audio": [(tones(482_000), RATE)]}, r"audio\[0\]: longer than 30 s; cut it into several sounds"),
        ("<|audio|>", {"images": [PICTURE]}, "media and their places do not match"),
        (heard(TUNE), {"audio": [TUNE]}, "in a conversation they are parts of messages"),
        (heard(None), {}, r'a part of type audio without any; write {"type": "audio", "audio": ...}'),
        (heard(TUNE[0]), {}, r"messages\[0\].content\[0\]: expected a pair of a numpy array and its rate"),
        ([{**heard(TUNE)[0], "role": "assistant"}], {}, "sounds are read in messages of the user and of tools only"),
        ("<|image|>", {"images": PICTURE}, "images: expected a list of paths, bytes, PIL images or arrays, found ndarray"),
        ("<|image|>", {"images": [b"no image"]}, r"images\[0\]: no image that can be read"),
        ("<|image|>", {"images": [PICTURE], "max_soft_tokens": 100}, "max_soft_tokens: expected one of 70, 140"),
        ("Hello", {"max_soft_tokens": 100}, "max_soft_tokens: expected one of 70, 140"),
        ("<|image|>", {"images": [drawing(20, 900)], "max_soft_tokens": 280}, "the position table of this model has 64"),
        (asked(PICTURE), {"images": [PICTURE]}, "in a conversation they are parts of messages"),
        (asked(None), {}, r"messages\[0\].content\[0\]: a part of type image without any"),
        (asked(b""), {}, r"messages\[0\].content\[0\]: an empty file"),
        ([{**asked(PICTURE)[0], "role": "system"}], {}, "in messages of the user and of tools only"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, r"content\[0\]: a part of type video without any"),
        ([{"role": "user", "content": [{"type": "film"}]}], {}, "only text and image and audio and video can be read"),
        ("<|video|>", {"videos": [(rolling(2, 8, 8), 0)]}, r"videos\[0\]: expected a rate of frames a second above 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused(model: Model, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.prepare(prompt, **options)


def test_all_damaged_media_are_named_at_once(model: Model) -> None:
    with pytest.raises(RequestError, match="images and sounds can't be read") as raised:
        model.prepare([*asked(b"a"), *asked(b"%PDF"), *heard(b"RIFF")])
    assert [problem.split(": ")[0] for problem in raised.value.problems] == [f"messages[{n}].content[0]" for n in range(3)]


def test_a_model_without_its_tower_says_how_to_get_it() -> None:
    with gemcutter.load("demo", context=256) as plain:
        with pytest.raises(
            RequestError, match="a part of type 'image'; only text can be read; load the model with media 'image'"
        ):
            plain.prepare(asked(PICTURE))
        with pytest.raises(RequestError, match="loaded without its vision tower; load it with media 'image'"):
            plain.prepare("<|image|>", images=[PICTURE])
        with pytest.raises(RequestError, match="a part of type 'audio'; only text can be read; load the model with media"):
            plain.prepare(heard(TUNE))
    with gemcutter.load(release_folder(), media=["audio"], context=256) as deaf:
        assert deaf.kinds == ("audio",)
        assert len(deaf.prepare(heard(TUNE)).request.media) == 1
        with pytest.raises(RequestError, match="loaded without its vision tower; load it with media 'image'"):
            deaf.prepare("<|image|>", images=[PICTURE])


def test_messages_are_left_as_they_were() -> None:
    conversation = asked(PICTURE)
    left, items = take_media(conversation)
    assert conversation[0]["content"][0]["image"] is PICTURE  # type: ignore[index]
    assert left[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert [(item.kind, item.name) for item in items] == [("image", "messages[0].content[0]")]
