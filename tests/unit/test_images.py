"""Images in conversations, raw text and ids, through the Python API on a trained model with its vision tower.

Owns where rows stand in a prompt, what is encoded how often, and the errors. What the rows and logits are is
`parity/test_golden.py`'s and `parity/test_media.py`'s; what may be an image is `test_image.py`'s.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gemcutter
from gemcutter.api import Model
from gemcutter.errors import RequestError
from gemcutter.images import ImageReader, take_images
from gemcutter.model.vision import Patches, VisionTower
from tests.images import drawing
from tests.trained import release_folder

BEGIN, PLACEHOLDER, END = 17, 18, 19  # ids of the markers of images
SMALL = 70  # soft tokens
PICTURE = drawing(60, 90)
ROWS = 60  # that it becomes: 6 rows of 10 squares


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with gemcutter.load(release_folder(), media="image", dtype="float32", context=1024) as found:
        yield found


def asked(image: Any, text: str = "What is it?", key: str = "image") -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image", key: image}, {"type": "text", "text": text}]}]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that will hold how many images each call of the tower gets, and forget what it saw before."""
    counts, encode = list[int](), VisionTower.encode

    def counted(self: VisionTower, images: list[Patches]) -> Any:
        counts.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(VisionTower, "encode", counted)
    assert model.images is not None
    monkeypatch.setattr(model, "images", ImageReader(model.images._tower, model.tokenizer))
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


# ---- what is read, and how often ----


def test_paths_bytes_pictures_and_arrays_are_alike(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(PICTURE))
    sources = (PICTURE, png(PICTURE), Image.fromarray(PICTURE), tmp_path / "a.png", str(tmp_path / "a.png"))
    requests = [model.prepare(asked(source), max_soft_tokens=SMALL).request for source in sources]
    requests.append(model.prepare(asked(str(tmp_path / "a.png"), key="path"), max_soft_tokens=SMALL).request)
    assert len({(request.prompt, request.media) for request in requests}) == 1


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
    assert counts == [2, 0]
    model.prepare(asked(PICTURE), max_soft_tokens=140)
    assert counts == [2, 0, 1]


def test_rows_that_are_kept_have_a_limit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = encoded(model, monkeypatch)
    assert model.images is not None
    one = ROWS * model.plan.hidden * 4
    monkeypatch.setattr(model, "images", ImageReader(model.images._tower, model.tokenizer, cache_bytes=2 * one))
    images = [np.roll(PICTURE, shift, axis=1) for shift in (0, 7, 14)]
    for image in (*images, images[2], images[1], images[0]):
        model.prepare(asked(image), max_soft_tokens=SMALL)
    assert counts == [1, 1, 1, 0, 0, 1]
    assert model.images._size == 2 * one


def test_the_next_turn_finds_what_was_computed_for_the_image(model: Model) -> None:
    conversation: list[Any] = asked(np.roll(PICTURE, 3, axis=0), "Tell me more.")
    first = model.chat(conversation, max_soft_tokens=SMALL, max_tokens=12, temperature=0)
    assert first.metrics.cached_tokens < 10
    conversation += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    second = model.chat(conversation, max_soft_tokens=SMALL, max_tokens=1)
    assert second.metrics.cached_tokens > ROWS


# ---- errors ----


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("What is it?", {"images": [PICTURE]}, r"1 were given, and the prompt has 0 times <\|image\|>"),
        ("<|image|><|image|>", {"images": [PICTURE]}, r"1 were given, and the prompt has 2 times"),
        ("<|image|>", {"images": PICTURE}, "images: expected a list of paths, bytes, PIL images or arrays, found ndarray"),
        ("<|image|>", {"images": [b"no image"]}, r"images\[0\]: no image that can be read"),
        ("<|image|>", {"images": [PICTURE], "max_soft_tokens": 100}, "max_soft_tokens: expected one of 70, 140"),
        ("Hello", {"max_soft_tokens": 100}, "max_soft_tokens: expected one of 70, 140"),
        ("<|image|>", {"images": [drawing(20, 900)], "max_soft_tokens": 280}, "the position table of this model has 64"),
        (asked(PICTURE), {"images": [PICTURE]}, "in a conversation they are parts of messages"),
        (asked(None), {}, r"messages\[0\].content\[0\]: an image part without an image"),
        (asked(b""), {}, r"messages\[0\].content\[0\]: an empty file"),
        ([{**asked(PICTURE)[0], "role": "system"}], {}, "in messages of the user and of tools only"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, "a part of type 'video'; only text and image can be read"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(model: Model, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.prepare(prompt, **options)


def test_all_damaged_images_are_named_at_once(model: Model) -> None:
    with pytest.raises(RequestError) as raised:
        model.prepare([*asked(b"a"), *asked(b"%PDF")])
    assert [problem.split(": ")[0] for problem in raised.value.problems] == ["messages[0].content[0]", "messages[1].content[0]"]


def test_a_model_without_its_tower_says_how_to_get_it() -> None:
    with gemcutter.load("demo", context=256) as plain:
        with pytest.raises(
            RequestError, match="a part of type 'image'; only text can be read; load the model with media 'image'"
        ):
            plain.prepare(asked(PICTURE))
        with pytest.raises(RequestError, match="loaded without its vision tower; load it with media 'image'"):
            plain.prepare("<|image|>", images=[PICTURE])


def test_messages_are_left_as_they_were() -> None:
    conversation = asked(PICTURE)
    left, images = take_images(conversation)
    assert conversation[0]["content"][0]["image"] is PICTURE  # type: ignore[index]
    assert left[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert [image.name for image in images] == ["messages[0].content[0]"]
