"""Files of `run` (`--image`, `--audio`, `--video`) and of chat (`/image`, ...): the Python API's tokens, and errors in time."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gemcutter
from gemcutter.cli import main
from tests.images import drawing
from tests.sounds import saved, tones
from tests.trained import release_folder
from tests.videos import filmed, rolling

SMALL = ("--max-soft-tokens", "70")
EXACT = ("--dtype", "float32")
QUESTION = "What is it?"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write an image that becomes 60 rows at most."""
    Image.fromarray(drawing(60, 90)).save(tmp_path / "a b.png")
    return tmp_path / "a b.png"


@pytest.fixture
def tune(tmp_path: Path) -> Path:
    """Write a sound of a second, which becomes 25 rows."""
    (tmp_path / "tune.flac").write_bytes(saved(tones(16_000), form="FLAC"))
    return tmp_path / "tune.flac"


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["run", str(release_folder()), "--json", "-n", "6", *EXACT, *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_run_shows_images_before_the_prompt(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.png"
    Image.fromarray(np.rot90(drawing(60, 90)).copy()).save(other)
    found = run_json(capsys, QUESTION, "--image", str(file), "--image", str(other), *SMALL)
    content = [*({"type": "image", "path": path} for path in (file, other)), {"type": "text", "text": QUESTION}]
    with gemcutter.load(release_folder(), media="image", dtype="float32") as model:
        wanted = model.chat([{"role": "user", "content": content}], max_soft_tokens=70, max_tokens=6)
    assert tuple(found["prompt_tokens"]) == wanted.prompt_tokens
    assert tuple(found["tokens"]) == wanted.tokens
    assert found["prompt_tokens"].count(18) == 120


@pytest.mark.parametrize("order", [("--image", "--audio", "--image"), ("--audio", "--image"), ("--audio", "--audio")], ids=str)
def test_run_keeps_the_order_in_which_files_are_given(
    order: tuple[str, ...], file: Path, tune: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(file if option == "--image" else tune) for option in order]
    words = [word for pair in zip(order, paths, strict=True) for word in pair]
    found = run_json(capsys, words[0], *words[1:], "--system", "--audio", QUESTION, *SMALL)  # --audio is a text there
    content = [{"type": option[2:], "path": path} for option, path in zip(order, paths, strict=True)]
    messages = [
        {"role": "system", "content": "--audio"},
        {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]},
    ]
    with gemcutter.load(release_folder(), media="image,audio", dtype="float32") as model:
        wanted = model.chat(messages, max_soft_tokens=70, max_tokens=6)
    assert tuple(found["prompt_tokens"]) == wanted.prompt_tokens
    assert tuple(found["tokens"]) == wanted.tokens
    assert found["prompt_tokens"].count(21) == 25 * order.count("--audio")


def test_run_puts_sounds_into_raw_text(tune: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"<|turn>user\n<|audio|>{QUESTION}<turn|>\n<|turn>model\n"
    found = run_json(capsys, text, "--raw", f"--audio={tune}")
    assert found["tokens"] == run_json(capsys, QUESTION, "--audio", str(tune))["tokens"]


def test_run_shows_frames_of_a_video(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "a.mp4"
    film.write_bytes(filmed(rolling(3, 60, 90), rate=2))
    found = run_json(capsys, QUESTION, "--video", str(film), "--image", str(file), *SMALL)
    content = [{"type": "video", "path": film}, {"type": "image", "path": file}, {"type": "text", "text": QUESTION}]
    with gemcutter.load(release_folder(), media="video", dtype="float32") as model:
        assert model.kinds == ("image", "video")
        wanted = model.chat([{"role": "user", "content": content}], max_soft_tokens=70, max_tokens=6)
    assert tuple(found["prompt_tokens"]) == wanted.prompt_tokens
    assert tuple(found["tokens"]) == wanted.tokens
    assert found["prompt_tokens"].count(23) == 3 * 60


def test_chat_shows_a_video_with_the_next_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    film = tmp_path / "a.mp4"
    film.write_bytes(filmed(rolling(3, 60, 90), rate=2))
    replies, notes = talk(monkeypatch, capsys, ("--media", "video"), f"/video {film}", QUESTION, "/video no.mp4")
    assert "a.mp4, 3 frames from 00:00 to 00:01, goes with the next message" in notes
    assert "no.mp4: there is no file" in notes
    assert len(replies) == 1


def test_run_puts_images_into_raw_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"<|turn>user\n<|image|>{QUESTION}<turn|>\n<|turn>model\n"
    found = run_json(capsys, text, "--raw", "--image", str(file), *SMALL)
    assert found["tokens"] == run_json(capsys, QUESTION, "--image", str(file), *SMALL)["tokens"]
    assert main(["run", str(release_folder()), QUESTION, "--raw", "--image", str(file)]) != 0
    assert "the prompt has 0 times <|image|>" in capsys.readouterr().err


def test_run_tells_of_bad_images_and_budgets(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(release_folder()), QUESTION, "--image", "no/such.png"]) != 0
    assert "there is no file no/such.png" in capsys.readouterr().err
    assert main(["run", "demo", QUESTION, "--image", str(file)]) != 0
    assert "this model has no vision tower" in capsys.readouterr().err
    assert main(["run", "demo", QUESTION, "--max-soft-tokens", "100"]) == 2
    assert "expected one of 70, 140, 280, 560, 1120" in " ".join(capsys.readouterr().err.split())


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], *lines: str) -> Any:
    """Hold a chat over a pipe; return the replies and what was told beside them."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8"))
    assert main(["chat", str(release_folder()), "-n", "6", *EXACT, *words]) == 0
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err


def test_chat_shows_an_image_with_the_next_message(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, kept = ("--media", "image", *SMALL), tmp_path / "talk.json"
    lines = (f"/image {file}", QUESTION, "And now?", "/show", f"/save {kept}")
    replies, notes = talk(monkeypatch, capsys, words, *lines)
    assert "90 x 60 pixels, goes with the next message" in notes
    first, second = re.findall(r"prompt (\d+) tokens, (\d+) of them from the cache", notes)
    assert int(first[0]) > 60
    assert int(second[1]) > 60
    assert re.search(r"messages +4, (\d+) of", notes)
    messages = json.loads(kept.read_text())
    assert messages[0]["content"] == [{"type": "image", "path": str(file)}, {"type": "text", "text": QUESTION}]
    assert messages[2]["content"] == "And now?"
    again, _ = talk(monkeypatch, capsys, words, f"/load {kept}", "/undo", "And now?")
    assert again == replies[1:]


def test_chat_plays_a_sound_with_the_next_message(
    file: Path, tune: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, kept = ("--media", "image,audio", *SMALL), tmp_path / "talk.json"
    lines = (f"/audio {tune}", f"/image {file}", QUESTION, "And now?", f"/save {kept}")
    replies, notes = talk(monkeypatch, capsys, words, *lines)
    assert "tune.flac, 1.0 s, goes with the next message" in notes
    first, second = re.findall(r"prompt (\d+) tokens, (\d+) of them from the cache", notes)
    assert int(first[0]) > 85
    assert int(second[1]) > 85
    messages = json.loads(kept.read_text())
    assert [part["type"] for part in messages[0]["content"]] == ["audio", "image", "text"]
    again, _ = talk(monkeypatch, capsys, words, f"/load {kept}", "/undo", "And now?")
    assert again == replies[1:]
    _, notes = talk(monkeypatch, capsys, ("--media", "image"), f"/audio {tune}", f"/load {kept}")
    assert "the audio tower is not loaded; start with --media audio" in notes
    assert "a part of type 'audio'; only text and image and video can be read" in notes


def test_chat_refuses_images_it_cannot_read(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies, notes = talk(monkeypatch, capsys, (), f"/image {file}", "/image", "Hi")
    assert "the vision tower is not loaded; start with --media image" in notes
    assert "/image needs more: /image FILE" in notes
    assert len(replies) == 1
    _, notes = talk(monkeypatch, capsys, ("--media", "image"), "/image no/such.png")
    assert re.search(r"error: /.*no/such.png: there is no file", notes)
    assert main(["chat", "demo", "--media", "sound"]) == 2
    assert "expected image or audio or video, found sound" in capsys.readouterr().err
