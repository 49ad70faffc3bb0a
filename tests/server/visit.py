"""A visitor of the chat page: one window of a browser, what a person does in it again and again, and what went wrong.

Owns the list of faults: requests to other hosts, errors of scripts, breaches of the page's policy. Refuses to know what a test
expects. Read `test_chat_page.py` next.
"""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Browser, Page, expect

from tests.server.canned_server import CannedServer

REFUSED = "Failed to load resource"  # how the browser logs a 4xx, whoever handles it


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
