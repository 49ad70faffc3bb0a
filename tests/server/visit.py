"""A visitor of the chat page: one window of a browser, what a person does in it again and again, and what went wrong.

Owns the list of faults: requests to other hosts, errors of scripts, breaches of the page's policy. Refuses to know what a test
expects. Read `test_chat_page.py` next.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.canned_server import CannedServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REFUSED = "Failed to load resource"  # how the browser logs a 4xx, whoever handles it

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((byte) => linear(byte / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(node.parentElement) : colour;
  };
  const texts = ".bubble, .stats, .failure, .text p, .k, .c, .fine, summary, .bar, .text a, #new-chat";
  return [...document.querySelectorAll(texts)].filter((node) => node.checkVisibility()).map((node) => {
    const [more, less] = [getComputedStyle(node).color, behind(node)].map(light).sort((a, b) => b - a);
    return [node.className || node.tagName, (more + 0.05) / (less + 0.05)];
  });
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser without a window."""
    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Visit:
    """One visitor's page, and what went wrong in it."""

    def __init__(self, browser: Browser, server: CannedServer, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(5000)
        self.faults: list[str] = []
        self.server = server
        self.context.on("request", self.note_request)
        self.page = self.open()

    def open(self) -> Page:
        page = self.context.new_page()
        page.on("console", lambda message: self.note_log(message.type, message.text))
        page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error.message}"))
        page.goto(self.server.url)
        return page

    def note_request(self, request: Any) -> None:
        if not request.url.startswith((self.server.url, "data:", "blob:")):
            self.faults.append(f"asked another host: {request.url}")

    def note_log(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and REFUSED not in text:
            self.faults.append(f"{kind}: {text}")

    def ask(self, prompt: str, *, until_end: bool = True) -> Any:
        """Send a prompt by keyboard, and return the reply's element once it is complete."""
        self.page.get_by_label("Message", exact=True).fill(prompt)
        self.page.keyboard.press("Enter")
        reply = self.page.get_by_role("article", name="Reply").last
        expect(self.page.get_by_role("article", name="You").last).to_contain_text(prompt)
        if until_end:
            expect(reply).to_have_attribute("aria-busy", "false")
        return reply

    def setting(self, label: str, value: str) -> None:
        self.page.get_by_role("button", name="Settings").first.click()
        field = self.page.get_by_role("dialog").get_by_label(label)
        if field.evaluate("node => node.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
        self.page.keyboard.press("Escape")

    def settle(self, script: str) -> None:
        """Wait until an expression holds in the page, asking from outside: the page's policy forbids `eval` inside."""
        for _ in range(200):
            if self.page.evaluate(script):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never true: {script}")

    def contrasts(self) -> list[tuple[str, float]]:
        """Return the class of each text in sight with its contrast to what is behind it, as WCAG 2 defines the ratio."""
        return [(name, ratio) for name, ratio in self.page.evaluate(CONTRAST)]
