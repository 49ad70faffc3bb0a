"""Images to patches: sizes, resampling and the order of values against the official processors, and what strangers may send.

The processors that transformers runs by default need torchvision, so what they made of images drawn by formula is kept as a
golden; their arithmetic of sizes and patches needs only transformers and is asked here.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.gemma4 import image_processing_pil_gemma4 as official

from gemcutter.errors import RequestError
from gemcutter.media import decode
from gemcutter.media.budgets import BUDGETS
from gemcutter.media.image import PatchShape, cut_image, fit_size, resize
from tests.images import drawing, resampled

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "image_patches.json").read_text())
SHAPE = PatchShape()


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray:
    found = decode.read_pixels(source)
    assert found.dtype == np.uint8
    return found


# ---- against the official processors ----


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['width']}x{c['height']} at {c['budget']}")
def test_patches_are_the_official_processors(case: dict[str, Any]) -> None:
    found = cut_image(drawing(case["height"], case["width"]), case["budget"], PatchShape(merges=case["merges"]))
    assert list(found.levels_PC.shape) == case["shape"]
    assert found.soft_tokens == case["soft_tokens"]
    assert found.positions()[-1].tolist() == case["last_position"]
    some = found.levels_PC.flatten()[:: case["step"]].int()
    difference = (some - torch.tensor(case["levels"])).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= 0.999


@pytest.mark.parametrize("size", [(624, 960), (96, 144), (48, 1008), (100, 150)], ids=str)
def test_resampling_is_antialiased_bicubic_on_whole_levels(size: tuple[int, int]) -> None:
    image = drawing(100, 150)
    difference = np.abs(resize(image, *size).numpy().astype(int) - resampled(image, *size))
    assert difference.max() <= 2  # weights are rounded to 16 bits, so a level may be rounded otherwise in each pass
    assert (difference == 0).mean() >= 0.99


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(BUDGETS))
def test_sizes_are_the_official_ones(height: int, width: int, budget: int) -> None:
    found = fit_size(height, width, budget, SHAPE)
    assert found == official.get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)


@pytest.mark.parametrize(("height", "width"), [(20, 1000), (1000, 20), (50, 2500), (7, 900), (1, 4000)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_odd_aspect_ratios_fill_the_budget_and_no_more(height: int, width: int, budget: int) -> None:
    found = cut_image(drawing(height, width), budget, SHAPE)
    assert found.soft_tokens <= budget
    assert found.soft_tokens * 9 == found.rows * found.columns
    assert found.soft_tokens > budget // 2


def test_patches_are_rows_of_pixels_in_the_official_order() -> None:
    image = drawing(96, 480)  # 20 soft tokens at 70 would be scaled; cut as it is
    assert fit_size(480, 336, 70, SHAPE) == (480, 336)
    whole = drawing(480, 336)
    found = cut_image(whole, 70, SHAPE)
    assert np.array_equal(found.levels_PC.numpy(), official.convert_image_to_patches(whole.transpose(2, 0, 1), 16))
    assert (found.values() - found.levels_PC / 255).abs().max() < 1e-7
    merged = cut_image(whole, 70, PatchShape(merges=True))
    assert np.array_equal(merged.levels_PC[8].numpy(), whole[48:96, 48:96].flatten())
    assert merged.positions()[8].tolist() == [1, 1]
    assert found.soft_tokens == merged.soft_tokens == len(merged.levels_PC)
    assert len({found.digest, merged.digest, cut_image(image, 70, SHAPE).digest}) == 3


def test_the_digest_tells_contents_and_budgets_apart() -> None:
    image = drawing(60, 90)
    other = image.copy()
    other[0, 0, 0] ^= 255
    digests = [cut_image(each, budget, SHAPE).digest for each in (image, other) for budget in (70, 140)]
    assert len(set(digests)) == 4
    assert cut_image(saved(Image.fromarray(image)), 70, SHAPE).digest == digests[0]


@pytest.mark.parametrize("budget", [0, 256, 281, True, "280", None])
def test_other_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(RequestError, match="max_soft_tokens: expected one of 70, 140, 280, 560, 1120"):
        cut_image(drawing(60, 90), budget, SHAPE)


# ---- kinds of images ----


def test_sources_are_alike(tmp_path: Path) -> None:
    image = drawing(40, 60)
    picture = Image.fromarray(image)
    (tmp_path / "a.png").write_bytes(saved(picture))
    for source in (image, picture, saved(picture), tmp_path / "a.png", str(tmp_path / "a.png"), bytearray(saved(picture))):
        assert np.array_equal(pixels(source), image)


def test_orientation_is_applied() -> None:
    image = drawing(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    assert np.array_equal(pixels(saved(Image.fromarray(image), exif=exif)), np.rot90(image, -1))


def test_transparency_is_laid_on_white() -> None:
    levels = np.zeros((4, 4, 4), np.uint8)
    levels[..., 0] = 200
    levels[0, 0, 3], levels[0, 1, 3] = 255, 51
    found = pixels(saved(Image.fromarray(levels)))
    assert found[0, 0].tolist() == [200, 0, 0]
    assert found[0, 1].tolist() == [244, 204, 204]
    assert found[3, 3].tolist() == [255, 255, 255]
    assert np.array_equal(pixels(levels), found)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([9, 9, 9, 7, 7, 7])
    assert pixels(saved(palette, transparency=0)).tolist() == [[[255] * 3, [7] * 3]]
    opaque = Image.new("RGB", (2, 1), (1, 2, 3))
    opaque.putpixel((1, 0), (4, 5, 6))
    assert pixels(saved(opaque, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8), "LA")
    assert pixels(saved(grey)).tolist() == [[[255] * 3, [100] * 3]]


def test_sixteen_bits_are_read_by_their_high_byte() -> None:
    wide = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    expected = [[[level] * 3 for level in (0, 0, 1, 0x80, 0xFF)]]
    assert pixels(saved(Image.fromarray(wide))).tolist() == expected
    assert pixels(wide).tolist() == expected
    assert pixels(np.stack([wide] * 3, -1)).tolist() == expected
    assert pixels(Image.fromarray(wide.astype(np.int32))).tolist() == expected


def test_other_colours_become_rgb() -> None:
    image = drawing(8, 8)
    picture = Image.fromarray(image)
    grey = picture.convert("L")
    assert np.array_equal(pixels(saved(grey)), np.stack([np.asarray(grey)] * 3, -1))
    assert np.array_equal(pixels(np.asarray(grey)), pixels(grey))
    assert np.array_equal(pixels(np.asarray(grey)[..., None]), pixels(grey))
    assert pixels(saved(picture.convert("1"))).max() == 255
    cmyk = picture.convert("CMYK")
    assert np.array_equal(pixels(saved(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    paletted = picture.quantize(16)
    assert np.array_equal(pixels(saved(paletted)), np.asarray(paletted.convert("RGB")))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(animated)[0, 0].tolist() == [255, 0, 0]
    webp = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels(webp)[0, 0].tolist() == [255, 0, 0]


# ---- what is refused ----


def bomb(width: int, height: int) -> bytes:
    """Make a PNG whose header promises pixels that it does not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "an empty file"),
        (b"hello", "no image that can be read"),
        (b"%PDF-1.7 ...", "a PDF document; give its pages as images"),
        (b"  <svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
        (bomb(9000, 9000), "9000 x 9000 pixels, more than 67,108,864; make it smaller"),
        (bomb(60000, 60000), "more than 67,108,864 pixels"),
        (bomb(64, 64), "can't be decoded"),
        (saved(Image.fromarray(drawing(64, 64)))[:-400], "can't be decoded"),
        (saved(Image.fromarray(drawing(64, 64)), "JPEG")[:-400], "can't be decoded"),
        ("no/such/file.png", "there is no file no/such/file.png"),
        (".", "there is no file"),
        ("https://example.com/a.png", "addresses are not followed"),
        (7, "expected a path, a file's bytes, a PIL image or a numpy array"),
        (np.zeros((4, 4, 2), np.uint8), r"found \[4, 4, 2\] of uint8"),
        (np.zeros((4, 4, 3), np.float32), r"found \[4, 4, 3\] of float32"),
        (np.zeros((0, 4), np.uint8), "nothing to see"),
        (Image.new("RGB", (0, 4)), "nothing to see"),
        (Image.new("F", (4, 4)), "floating-point pixels"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "values from 70000 to 70000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_one_clear_error(source: Any, message: str) -> None:
    with pytest.raises(RequestError, match=rf"^images\[3\]: .*{message}"):
        decode.read_pixels(source, "images[3]")


def test_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "large.png").write_bytes(bytes(2 << 20))
    for source in (bytes(2 << 20), tmp_path / "large.png"):
        with pytest.raises(RequestError, match="more than 1 MiB"):
            decode.read_pixels(source)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_mutated_files_are_images_or_clear_errors(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")))
    mutated = bytearray(saved(Image.fromarray(drawing(24, 32)), form))
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(mutated[: data.draw(st.integers(1, len(mutated)))])
    with contextlib.suppress(RequestError):
        assert decode.read_pixels(cut).shape[2] == 3
