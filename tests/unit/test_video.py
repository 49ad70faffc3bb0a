"""Videos to frames with their times, against the official processors and transformers' reader, and what strangers may send.

The processors that transformers runs need torchvision, so what they made of videos drawn by formula is kept as a golden; the
reader of files and the choice of frames are asked here.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import video_utils
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

from gemcutter.errors import RequestError
from gemcutter.media import decode_video
from gemcutter.media.decode_video import pick, read_frames
from gemcutter.media.image import PatchShape
from gemcutter.media.video import FRAMES, cut_video, spell_time
from tests.images import drawing
from tests.real_tokenizer import real_tokenizer
from tests.sounds import saved, tones
from tests.videos import CONTAINERS, filmed, rolling

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "video_frames.json").read_text())
SHAPE = PatchShape()
COUNTED = ("mp4", "mov", "avi")  # containers that say how many frames they hold, on which transformers relies


@pytest.fixture(scope="module")
def film() -> bytes:
    return filmed(rolling(50, 96, 128))


# ---- against the official processors ----


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['frames']} of {c['width']}x{c['height']} {c['merges']}")
def test_frames_and_times_are_the_official_processors(case: dict[str, Any]) -> None:
    pictures, shape = rolling(case["frames"], case["height"], case["width"]), PatchShape(merges=case["merges"])
    found = cut_video(pictures if case["fps"] is None else (pictures, case["fps"]), shape)
    assert [len(found), *found[0].image.levels_PC.shape] == case["shape"]
    assert {frame.image.soft_tokens for frame in found} == {case["soft_tokens"]}
    assert found[-1].image.positions()[-1].tolist() == case["last_position"]
    assert " ".join(f"{frame.time} <|image>...<image|>" for frame in found) == case["text"]
    some = torch.stack([frame.image.levels_PC for frame in found]).flatten()[:: case["step"]].int()
    difference = (some - torch.tensor(case["levels"])).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= 0.999


@pytest.mark.parametrize("total", [32, 33, 47, 64, 100, 1801])
def test_the_frames_that_are_taken_are_the_official_ones(total: int) -> None:
    metadata = video_utils.VideoMetadata(total_num_frames=total, fps=10)
    assert pick(total, FRAMES) == video_utils.default_sample_indices_fn(metadata, num_frames=FRAMES).tolist()


def test_short_videos_are_taken_whole() -> None:
    assert pick(5, FRAMES) == [0, 1, 2, 3, 4]  # where the official processor gives up
    assert [frame.time for frame in cut_video((rolling(3, 48, 48), 0.5), SHAPE)] == ["00:00", "00:02", "00:04"]


@pytest.mark.parametrize(("form", "codec"), CONTAINERS, ids=str)
def test_files_of_many_kinds_hold_the_same_frames(form: str, codec: str) -> None:
    frames = rolling(50, 96, 128)
    found = list(read_frames(filmed(frames, form=form, codec=codec), FRAMES))
    assert [round(10 * frame.seconds) for frame in found] == pick(50, FRAMES)
    for frame, number in zip(found, pick(50, FRAMES), strict=True):
        blurred, other = (pixels.astype(float).mean(axis=(0, 2)) for pixels in (frame.pixels_HWC, frames[number]))
        assert np.abs(blurred - other).mean() < 8  # codecs lose detail, and would lose more if it were another frame
        assert np.abs(blurred - np.roll(other, 32)).mean() > np.abs(blurred - other).mean()


@pytest.mark.parametrize("form", COUNTED)
@pytest.mark.parametrize("count", [32, 45, 77])
def test_frames_of_files_are_those_of_transformers(form: str, count: int, tmp_path: Path) -> None:
    file = tmp_path / f"a.{form}"
    file.write_bytes(filmed(rolling(count, 64, 80), 24, form, "mpeg4"))
    wanted, metadata = video_utils.read_video_pyav(
        str(file), lambda metadata, **_: video_utils.default_sample_indices_fn(metadata, num_frames=FRAMES)
    )
    found = list(read_frames(file, FRAMES))
    assert np.array_equal(np.stack([frame.pixels_HWC for frame in found]), wanted)
    assert [frame.seconds for frame in found] == pytest.approx(metadata.timestamps)


def test_times_are_written_as_the_official_processor_writes_them() -> None:
    seconds = [0, 0.99, 1, 59.999, 60, 61.5, 599, 3599, 6000.2]
    metadata = SimpleNamespace(fps=1, timestamps=seconds)
    own: Any = SimpleNamespace(boi_token="", video_token="", eoi_token="")
    text = Gemma4Processor.replace_video_token(own, {"num_soft_tokens_per_video": [1], "video_metadata": [metadata]}, 0)
    assert " ".join(f"{spell_time(each)} " for each in seconds) == text


def test_a_time_is_tokens_of_its_own_whatever_stands_around_it() -> None:
    tokenizer = real_tokenizer()
    for before in ("", "user\n", "Watch this.", "It is 12", "\n\n", "at ", "a:", "v1.", "日本", "“"):
        for time in ("00:00 ", "01:59 ", "100:07 "):
            joined = tokenizer.encode(before + time, bos=False)
            assert joined == [*tokenizer.encode(before, bos=False), *tokenizer.encode(time, bos=False)], (before, time)
    assert tokenizer.encode(" 00:01 ", bos=False)[1:] == tokenizer.encode("00:01 ", bos=False)


# ---- what may be a video ----


def test_frames_as_images_need_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    frames = rolling(6, 60, 90)
    png = io.BytesIO()
    Image.fromarray(frames[0]).save(png, "PNG")
    alike = [[png.getvalue(), *frames[1:]], list(map(Image.fromarray, frames)), frames, tuple(frames)]
    found = [[(frame.time, frame.image.digest) for frame in cut_video((each, 2), SHAPE)] for each in alike]
    assert [time for time, _ in found[0]] == ["00:00", "00:00", "00:01", "00:01", "00:02", "00:02"]
    assert found[0] == found[1] == found[2] == found[3]
    assert [frame.time for frame in cut_video(rolling(49, 8, 8), SHAPE)][-1] == "00:01"  # 24 a second, where none is given
    with pytest.raises(RequestError, match=r"video: video files can't be decoded here; install PyAV \(pip install 'gemcutter"):
        cut_video(b"a file", SHAPE)


def test_a_file_is_given_by_path_or_bytes(film: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(film)
    found = [
        [frame.image.digest for frame in cut_video(each, SHAPE)] for each in (film, tmp_path / "a.mp4", str(tmp_path / "a.mp4"))
    ]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == FRAMES


@pytest.mark.parametrize(("turn", "matrix"), [(-1, (0, 1, -1, 0)), (1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1))], ids=str)
def test_frames_are_turned_as_the_file_says(turn: int, matrix: tuple[int, ...], film: bytes) -> None:
    a, b, c, d = (number << 16 for number in matrix)
    turned, place = bytearray(film), film.index(b"tkhd") + 44  # the display matrix of a track's header
    turned[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    for frame, upright in zip(read_frames(bytes(turned), 4), read_frames(film, 4), strict=True):
        assert np.array_equal(frame.pixels_HWC, np.rot90(upright.pixels_HWC, turn))


# ---- errors ----


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "video: an empty file"),
        (b"%PDF-1.7 not a video", "video: no video that can be read; give MP4, MOV, WebM, Matroska, AVI or MPEG"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "no video that can be read"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "no video that can be read"),
        ("http://localhost/a.mp4", "addresses are not followed"),
        ("no/such.mp4", "there is no file no/such.mp4"),
        (17, "expected a path, a file's bytes, or a list of images with their rate, found 17"),
        ([], "0 frames; expected 1 to 100,000"),
        (drawing(40, 40), r"expected an array \[frames, height, width, 3\], found \[40, 40, 3\]"),
        ((rolling(2, 8, 8), 0), "expected a rate of frames a second above 0, found 0"),
        ((rolling(2, 8, 8), float("nan")), "expected a rate of frames a second above 0, found nan"),
        ([drawing(40, 40), b"no image"], "video, frame 1: no image that can be read"),
        ((drawing(40, 40), "1"), "video, frame 1: there is no file 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_video_is_refused(source: Any, message: str) -> None:
    if isinstance(source, bytes) and source:
        pytest.importorskip("av", reason="PyAV is not installed (gemcutter[video])")
    with pytest.raises(RequestError, match=message):
        cut_video(source, SHAPE)


def test_sounds_and_damaged_files_are_refused(film: bytes) -> None:
    with pytest.raises(RequestError, match="no video that can be read"):
        cut_video(saved(tones(4000)), SHAPE)
    with pytest.raises(RequestError, match="no pictures in this file; a sound is read as audio"):
        cut_video(saved(tones(4000), form="OGG"), SHAPE)
    with pytest.raises(RequestError, match="no video that can be read"):
        cut_video(film[: len(film) // 2], SHAPE)
    begin = film.index(b"mdat") + 4
    with pytest.raises(RequestError, match="is the file damaged"):
        cut_video(film[:begin] + bytes(len(film) - begin - 3000) + film[-3000:], SHAPE)


@pytest.mark.parametrize("form", ["matroska", "mpegts"])
def test_of_a_file_that_was_cut_off_what_is_there_is_taken(form: str) -> None:
    whole = filmed(rolling(60, 96, 128), form=form)
    found = list(read_frames(whole[: int(0.7 * len(whole))], 8))
    seconds = [frame.seconds for frame in found]
    assert len(found) == 8
    assert seconds == sorted(set(seconds))
    assert 2 < seconds[-1] < 5


def test_limits_hold_before_anything_is_decoded(film: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr(decode_video, "_decode", refused)
    limits = {
        "MAX_SECONDS": "longer than 1 s",
        "MAX_PIXELS": "128 x 96 pixels, more than 1",
        "MAX_DECODED_PIXELS": "50 frames of",
        "MAX_FILE_BYTES": "more than 0 MiB; save it smaller",
    }
    for name, message in limits.items():
        monkeypatch.setattr(decode_video, name, 1)
        with pytest.raises(RequestError, match=message):
            list(read_frames(film, FRAMES))
        monkeypatch.setattr(decode_video, name, 1 << 40)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_mutated_files_are_videos_or_clear_errors(data: st.DataObject) -> None:
    form, codec = data.draw(st.sampled_from(CONTAINERS[:6]))
    mutated = bytearray(filmed(rolling(6, 32, 48), form=form, codec=codec))
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(mutated[: data.draw(st.integers(1, len(mutated)))])
    with contextlib.suppress(RequestError):
        assert 1 <= len(cut_video(cut, SHAPE)) <= FRAMES


def test_goldens_name_their_maker() -> None:
    assert cast(str, GOLDEN["engine"]).startswith("transformers 5.24")
