"""Images on the chat page, in a real browser: chosen, dropped and pasted, shown small, sent, kept and taken back.

The last test asks a real server with a real model. Read `test_chat_page.py` for all else of the page.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the server's extra is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import gemcutter  # noqa: E402
from gemcutter.server.options import ServerOptions  # noqa: E402
from tests.server.canned_server import CannedServer, serving  # noqa: E402
from tests.server.conftest import running  # noqa: E402
from tests.server.seeing import PICTURE, data_url, png  # noqa: E402
from tests.server.visit import CHROMIUM, Visit, chromium  # noqa: E402
from tests.sounds import saved, tones  # noqa: E402
from tests.trained import release_folder  # noqa: E402

Browser, expect = sync_api.Browser, sync_api.expect
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")

HAND_OVER = """([name, kind, data, event]) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], name, { type: kind }));
  const options = { bubbles: true, cancelable: true };
  const target = document.querySelector("#input");
  if (event === "paste") return target.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: given }));
  return ["dragover", "drop"].map((name) => target.dispatchEvent(new DragEvent(name, { ...options, dataTransfer: given })));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def server() -> Iterator[CannedServer]:
    with serving(CannedServer()) as found:
        yield found


@pytest.fixture
def visit(browser: Browser, server: CannedServer) -> Iterator[Visit]:
    server.modalities = ("text", "image")
    server.bodies.clear()
    visiting = Visit(browser, server)
    expect(visiting.page.get_by_role("button", name="Attach images")).to_be_visible()
    yield visiting
    visiting.context.close()
    assert visiting.faults == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a small image, a large one, and what is none."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2400, 3)).astype(np.uint8)
    found = {name: folder / f"{name}.{kind}" for name, kind in (("lamp", "png"), ("wall", "jpg"), ("notes", "txt"))}
    found["lamp"].write_bytes(png())
    Image.fromarray(noise).save(found["wall"], quality=80)
    found["notes"].write_text("no image")
    return found


def hand_over(visit: Visit, event: str, file: Path, kind: str = "image/png") -> None:
    """Drop a file on the page, or paste it into the message."""
    visit.page.evaluate(HAND_OVER, [file.name, kind, base64.b64encode(file.read_bytes()).decode(), event])


def shown(visit: Visit) -> Any:
    return visit.page.get_by_role("list", name="Attached").get_by_role("img")


def sent(server: CannedServer) -> list[dict[str, Any]]:
    """Return the parts of the last message that was sent."""
    parts = server.bodies[-1]["messages"][-1]["content"]
    assert isinstance(parts, list)
    return parts


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_an_image_goes_with_the_next_message(visit: Visit, server: CannedServer, files: dict[str, Path], way: str) -> None:
    if way == "choose":
        visit.page.locator("#attach-file").set_input_files(files["lamp"])
    else:
        hand_over(visit, way, files["lamp"])
    expect(shown(visit)).to_have_attribute("alt", "lamp.png")
    visit.settle("document.querySelector('#attached img').naturalWidth === 90")
    reply = visit.ask("What is it?")
    expect(reply).to_contain_text("You said: What is it?")
    image, said = sent(server)
    assert image == {"type": "image_url", "image_url": {"url": data_url(png())}}  # small ones as they are
    assert said == {"type": "text", "text": "What is it?"}
    expect(visit.page.get_by_role("list", name="Attached")).to_be_hidden()
    expect(visit.page.get_by_role("article", name="You").get_by_role("img", name="lamp.png")).to_be_visible()
    visit.ask("And now?")
    assert server.bodies[-1]["messages"][0]["content"] == [image, said]
    assert server.bodies[-1]["messages"][-1]["content"] == "And now?"


def test_a_large_image_is_sent_as_large_as_a_model_sees_it(visit: Visit, server: CannedServer, files: dict[str, Path]) -> None:
    visit.page.locator("#attach-file").set_input_files([files["wall"], files["lamp"]])
    expect(shown(visit)).to_have_count(2)
    visit.ask("Compare.")
    urls = [part["image_url"]["url"] for part in sent(server)[:2]]
    assert urls[1] == data_url(png())
    found = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2])))
    assert found.format == "WEBP"
    assert 2_600_000 < found.width * found.height <= 2_710_000
    assert abs(found.width / found.height - 2400 / 1500) < 0.01


def test_what_was_attached_can_be_taken_back_and_sent_alone(visit: Visit, server: CannedServer, files: dict[str, Path]) -> None:
    send = visit.page.get_by_role("button", name="Send", exact=True)
    expect(send).to_be_disabled()
    visit.page.locator("#attach-file").set_input_files([files["lamp"], files["wall"]])
    visit.page.get_by_role("button", name="Remove wall.jpg").click()
    expect(shown(visit)).to_have_count(1)
    send.click()
    expect(visit.page.get_by_role("article", name="Reply")).to_have_attribute("aria-busy", "false")
    assert [part["type"] for part in sent(server)] == ["image_url"]
    expect(visit.page.get_by_role("button", name="lamp.png", exact=True)).to_be_visible()  # the conversation's name


def test_images_are_kept_and_exported_and_nothing_else_is_imported(
    visit: Visit, server: CannedServer, files: dict[str, Path], tmp_path: Path
) -> None:
    visit.page.locator("#attach-file").set_input_files(files["lamp"])
    expect(shown(visit)).to_have_count(1)
    visit.ask("Look.")
    visit.page.reload()
    expect(visit.page.get_by_role("article", name="You").get_by_role("img", name="lamp.png")).to_be_visible()
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Export").click()
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    kept = json.loads(path.read_text())
    (media,) = kept["chats"][0]["messages"][0]["media"]
    assert media == {"kind": "image", "name": "lamp.png", "url": data_url(png())}
    bad = [{"kind": "image", "url": "https://evil.example/a.png"}, {"kind": "script", "url": "data:script/x,"}, 7, None]
    kept["chats"][0] |= {"id": "other", "title": "Imported"}
    kept["chats"][0]["messages"][0]["media"] += bad
    path.write_text(json.dumps(kept))
    visit.page.locator("#import-file").set_input_files(path)
    visit.page.get_by_role("button", name="Imported", exact=True).click()
    expect(visit.page.get_by_role("article", name="You").get_by_role("img")).to_have_count(1)
    visit.page.get_by_role("button", name="Edit message").click()
    visit.page.get_by_label("Edit message").fill("Look again.")
    visit.page.keyboard.press("Enter")
    expect(visit.page.get_by_role("article", name="Reply")).to_contain_text("You said: Look again.")
    assert [part["type"] for part in sent(server)] == ["image_url", "text"]


def test_what_the_model_does_not_read_is_said(visit: Visit, server: CannedServer, files: dict[str, Path]) -> None:
    hand_over(visit, "drop", files["notes"], "text/plain")
    expect(visit.page.get_by_role("alert")).to_have_text("notes.txt: this model reads images.")
    server.modalities = ("text",)
    visit.page.reload()
    expect(visit.page.get_by_label("Model")).to_have_value("gem-small")
    expect(visit.page.get_by_role("button", name="Attach")).to_have_count(0)
    hand_over(visit, "drop", files["lamp"])
    expect(visit.page.get_by_role("alert")).to_have_text("lamp.png: this model reads text alone.")
    expect(visit.page.get_by_role("list", name="Attached")).to_be_hidden()


def test_text_is_pasted_and_dropped_as_ever(visit: Visit) -> None:
    script = """(event) => {
      const given = new DataTransfer();
      given.setData("text/plain", "words");
      const options = { bubbles: true, cancelable: true, clipboardData: given, dataTransfer: given };
      return document.querySelector("#input").dispatchEvent(new (event === "paste" ? ClipboardEvent : DragEvent)(event, options));
    }"""
    assert visit.page.evaluate(script, "paste")  # nobody has prevented what the browser does
    assert visit.page.evaluate(script, "drop")


def test_a_real_server_reads_the_image(browser: Browser, files: dict[str, Path]) -> None:
    with (
        gemcutter.load(release_folder(), media="image", dtype="float32", context=1024) as model,
        running(model, ServerOptions(names=("demo",), max_soft_tokens=70)) as found,
    ):
        asked = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}]}]
        wanted = model.chat(asked, max_soft_tokens=70, max_tokens=12, temperature=0).text
        visiting = Visit(browser, CannedServer(url=found.url))
        visiting.setting("Temperature", "0")
        visiting.setting("Max tokens", "12")
        visiting.page.locator("#attach-file").set_input_files(files["lamp"])
        expect(shown(visiting)).to_have_count(1)
        reply = visiting.ask("What is it?")
        expect(reply.locator(".text").last).to_contain_text(" ".join(wanted.split())[:30])
        expect(reply.get_by_role("alert")).to_have_count(0)
        visiting.context.close()
        assert visiting.faults == []


def test_a_sound_goes_with_the_next_message(browser: Browser, server: CannedServer, tmp_path: Path) -> None:
    file = tmp_path / "tune.wav"
    file.write_bytes(saved(tones(8000)))
    server.modalities = ("text", "image", "audio", "video")
    visiting = Visit(browser, server)
    expect(visiting.page.get_by_role("button", name="Attach images or sounds")).to_be_visible()
    visiting.page.locator("#attach-file").set_input_files(file)
    expect(visiting.page.get_by_role("list", name="Attached").locator("audio")).to_have_attribute("aria-label", "tune.wav")
    visiting.ask("What is said?")
    sound, said = sent(server)
    assert sound["input_audio"]["format"] == "wav"
    assert base64.b64decode(sound["input_audio"]["data"]) == file.read_bytes()
    assert said["text"] == "What is said?"
    visiting.page.reload()
    player = visiting.page.get_by_role("article", name="You").locator("audio")
    expect(player).to_have_count(1)
    visiting.settle("document.querySelector('.media audio').duration === 0.5")
    visiting.context.close()
    assert visiting.faults == []
