"""The chat page in a real browser, against canned replies: what is drawn, sent and kept, and that no text does more than be text.

Every test also fails for a request to another host, an error in the page's console, or a breach of the page's own policy.
Knows nothing of engines. Read `visit.py` for a visitor's window, and `canned_server.py` for what each prompt is answered with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server's extra is not installed")
pytest.importorskip("uvicorn", reason="the server's extra is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from gemcutter.server.routes import chat_page  # noqa: E402
from tests.server.canned_server import PICTURED, CannedServer, serving  # noqa: E402
from tests.server.visit import CHROMIUM, Visit, chromium  # noqa: E402

Browser, expect = sync_api.Browser, sync_api.expect

ROOT = Path(__file__).parents[2]
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def port() -> Iterator[CannedServer]:
    with serving(CannedServer()) as running:
        yield running


@pytest.fixture
def server(port: CannedServer) -> CannedServer:
    """Return the server without memory of the test before."""
    port.bodies, port.keys, port.abandoned, port.wanted_key, port.models = [], [], 0, None, ("gem-small",)
    return port


@pytest.fixture(scope="module")
def desk(browser: Browser, port: CannedServer) -> Iterator[Visit]:
    """Open one window for all tests that need no other: opening is most of what they take."""
    visiting = Visit(browser, port)
    yield visiting
    visiting.context.close()


@pytest.fixture
def visit(desk: Visit, server: CannedServer) -> Iterator[Visit]:
    """Return the window as a first visitor's."""
    desk.page.goto(server.url)  # ends what the test before left running
    desk.page.evaluate("localStorage.clear(), sessionStorage.clear()")
    desk.page.goto(server.url)
    server.bodies.clear()
    desk.faults.clear()
    yield desk
    assert desk.faults == []


@pytest.fixture
def own_visit(browser: Browser, server: CannedServer, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """Return a window with the options of the test's parameter."""
    visiting = Visit(browser, server, **request.param)
    yield visiting
    visiting.context.close()
    assert visiting.faults == []


# ---- the document ----


def test_page_is_one_document_under_its_own_policy() -> None:
    app = FastAPI()
    app.include_router(chat_page.router)
    client = TestClient(app)
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == answer.text.count("<script>") + answer.text.count("<style>") == 5
    assert ' src="' not in answer.text
    assert "stylesheet" not in answer.text
    again = client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert "/" not in client.get("/openapi.json").json()["paths"]


def test_script_that_would_end_its_element_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat_page.html").write_text('<script src="bad.js"></script>')
    (tmp_path / "bad.js").write_text('const tag = "</script>";')
    monkeypatch.setattr(chat_page, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"bad\.js holds a tag"):
        chat_page.chat_page.__wrapped__()


# ---- a reply ----


@needs_browser
def test_markdown_is_drawn(visit: Visit) -> None:
    reply = visit.ask("markdown")
    expect(reply.get_by_role("heading", level=1)).to_have_text("A small tour")
    expect(reply.locator("h1 em")).to_have_text("small")
    expect(reply.locator("p strong").first).to_have_text("bold")
    expect(reply.locator("p code").first).to_have_text("inline <code>")
    expect(reply.locator("del")).to_have_text("gone")
    link = reply.get_by_role("link", name="the docs")
    expect(link).to_have_attribute("href", "https://example.org/a_(b)?q=1")
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    expect(reply.locator("ol > li")).to_have_count(2)
    expect(reply.locator("ol > li ul > li")).to_have_text(["nested one", "nested two"])
    expect(reply.locator("ol > li pre")).to_have_text("echo hi # say so")
    expect(reply.locator("li.task")).to_have_text(["☑ done", "☐ open"])
    expect(reply.locator("th")).to_have_text(["name", "share"])
    expect(reply.locator("td")).to_have_text(["a | b", "12 %", "c", "3 %"])
    expect(reply.locator("td.right strong")).to_have_text("3")
    expect(reply.locator("blockquote")).to_contain_text("going on.")
    assert "    while b:\n        a, b" in reply.locator(".block pre").last.text_content()
    expect(reply.locator(".k").first).to_have_text("def")
    expect(reply.locator(".c").last).to_have_text('# "done"')
    expect(reply.locator("p").last).to_have_text("snake_case_name and 2 * 3 * 4 and *stars* and https://example.org/x.")


@needs_browser
def test_growing_text_keeps_the_blocks_that_are_done(visit: Visit) -> None:
    script = """() => {
      const show = (size) => {
        const box = document.createElement("div"), draw = Markdown.view(box);
        const source = "# One\\n\\ntwo **three**\\n\\n- a\\n- b\\n\\n```js\\nlet x;\\n```";
        let first = null, same = true;
        for (let end = size; end < source.length + size; end += size) {
          draw(source.slice(0, end));
          if (end > 12) same &&= first === null || first === box.firstChild, first = box.firstChild;
        }
        return [box.innerHTML, same];
      };
      return [1, 3, 1000].map(show);
    }"""
    shown = visit.page.evaluate(script)
    assert len({html for html, _ in shown}) == 1
    assert all(same for _, same in shown)
    assert shown[0][0].startswith("<h1>One</h1><p>two <strong>three</strong></p><ul><li>a</li><li>b</li></ul>")


@needs_browser
@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("*see **this** now*", "<p><em>see <strong>this</strong> now</em></p>"),
        ("***both*** and __init__ and a_b_c", "<p><strong><em>both</em></strong> and <strong>init</strong> and a_b_c</p>"),
        ("2 * 3 **open `code", "<p>2 * 3 **open `code</p>"),
        ("`` a`b `` \\*no\\* &lt;i&gt; &unknown;", "<p><code>a`b</code> *no* &lt;i&gt; &amp;unknown;</p>"),
        ("1. a\n\n   b\n2. c\n\nd", '<ol start="1"><li><p>a</p><p>b</p></li><li>c</li></ol><p>d</p>'),
        ("text\n- a\n    - b\n- c\n# D", "<p>text</p><ul><li>a<ul><li>b</li></ul></li><li>c</li></ul><h1>D</h1>"),
        ("> a\n> - b\n\n[rel](../x) #tag", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p><span>rel</span> #tag</p>"),
    ],
)
def test_markdown_reads_as_commonmark_does(visit: Visit, source: str, html: str) -> None:
    script = """(source) => {
      const box = document.createElement("div");
      Markdown.view(box)(source);
      return box.innerHTML;
    }"""
    assert visit.page.evaluate(script, source) == html


@needs_browser
def test_repeated_marks_take_linear_time(visit: Visit) -> None:
    """A reader that searches on from each mark that never closes takes minutes for these: the browser would give the page up."""
    script = """(source) => {
      const box = document.createElement("div");
      Markdown.view(box)(source);
      return box.textContent.length;
    }"""
    for source in ("*a " * 60_000, "`a" * 60_000, "[" * 60_000, "_a **b " * 30_000, "> " * 3_000 + "x", "http://" * 9_000):
        assert visit.page.evaluate(script, source) > 0


@needs_browser
def test_hostile_text_stays_text(visit: Visit) -> None:
    reply = visit.ask("hostile")
    assert visit.page.evaluate("window.pwned") is None
    expect(reply.locator("img, script, iframe, svg[onload], [onclick], [onmouseover]")).to_have_count(0)
    expect(reply).to_contain_text('<img src=x onerror="window.pwned = 1">')
    links = reply.locator("a").evaluate_all("nodes => nodes.map((node) => node.protocol)")
    assert links
    assert set(links) <= {"http:", "https:"}
    visit.ask("<b>me</b>")
    expect(visit.page.locator(".bubble b")).to_have_count(0)
    expect(visit.page.get_by_role("button", name="hostile", exact=True)).to_be_visible()


@needs_browser
@pytest.mark.parametrize(
    ("prompt", "thought", "answer"), [("think", "both", "The answer is 42."), ("think elsewhere", "Weighing", "It is 7.")]
)
def test_thoughts_are_folded(visit: Visit, prompt: str, thought: str, answer: str) -> None:
    reply = visit.ask(prompt)
    expect(reply.get_by_text(answer)).to_be_visible()
    expect(reply.get_by_text(thought)).to_be_hidden()
    reply.locator("summary").focus()
    visit.page.keyboard.press("Enter")
    expect(reply.get_by_text(thought)).to_be_visible()
    visit.ask("and more")
    expect(visit.page.get_by_text(thought)).to_be_visible()


@needs_browser
def test_call_is_shown_and_its_result_sent(visit: Visit, server: CannedServer) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    visit.setting("Tools", json.dumps(tools))
    reply = visit.ask("call")
    expect(reply.locator(".call summary")).to_have_text("Calls get_weather")
    expect(reply.locator(".call pre")).to_have_text('{\n  "city": "<b>Oslo</b>"\n}')
    reply.get_by_label("Result of get_weather").fill("rain")
    reply.get_by_role("button", name="Send results").click()
    expect(visit.page.get_by_role("article", name="Reply").last).to_contain_text("You said: rain")
    first, second = server.bodies
    assert first["tools"] == tools
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "<b>Oslo</b>"}'}}
    assert second["messages"][1] == {"role": "assistant", "content": "Let me look.", "tool_calls": [call]}
    assert second["messages"][2] == {"role": "tool", "content": "rain", "name": "get_weather", "tool_call_id": "call_1"}


@needs_browser
def test_stop_keeps_what_came_and_frees_the_server(visit: Visit, server: CannedServer) -> None:
    reply = visit.ask("slow", until_end=False)
    expect(reply).to_contain_text("word3")
    expect(visit.page.get_by_role("button", name="Stop")).to_be_visible()
    visit.page.keyboard.press("Escape")
    expect(reply).to_have_attribute("aria-busy", "false")
    expect(reply).to_contain_text("Stopped")
    expect(visit.page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    for _ in range(100):
        if server.abandoned:
            break
        visit.page.wait_for_timeout(20)
    assert server.abandoned == 1
    visit.ask("and then?")
    said = server.bodies[-1]["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert said[1]["content"].startswith("word0 word1 ")


@needs_browser
def test_other_conversations_can_be_read_while_one_is_written(visit: Visit) -> None:
    visit.ask("first one")
    visit.page.get_by_role("button", name="New conversation").click()
    visit.ask("slow", until_end=False)
    visit.page.get_by_role("button", name="first one", exact=True).click()
    expect(visit.page.get_by_role("article", name="Reply")).to_have_count(1)
    expect(visit.page.get_by_role("article", name="Reply")).to_contain_text("You said: first one")
    visit.page.get_by_role("button", name="slow", exact=True).click()
    reply = visit.page.get_by_role("article", name="Reply")
    expect(reply).to_have_attribute("aria-busy", "true")
    expect(reply).to_contain_text("word3")
    visit.page.get_by_role("button", name="Stop").click()
    expect(reply).to_contain_text("Stopped")


@needs_browser
def test_speed_and_tokens_are_shown(visit: Visit) -> None:
    reply = visit.ask("long")
    expect(reply.locator(".stats")).to_contain_text("Cut at the token limit")
    expect(reply.locator(".stats")).to_contain_text("25 tokens · prompt 40 (32 cached)")
    assert reply.locator(".stats").text_content().count("first token ") == 1
    script = """() => {
      const message = { stats: {} }, run = { began: 0, first: 1000, last: 3000 };
      countTokens(message, run, { completion_tokens: 101 });
      return message.stats.rate;
    }"""
    assert visit.page.evaluate(script) == 50  # 100 tokens after the first, in 2 s


@needs_browser
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("too much", "The prompt has 9000 tokens; the context holds 8192. (HTTP 400)"),
        ("busy", "Too many requests. (HTTP 429, try again in 3 s)"),
        ("breaks", "The engine <b>failed</b>."),
        ("cut off", "The connection closed before the reply was complete."),
    ],
)
def test_errors_are_in_the_servers_words(visit: Visit, prompt: str, message: str) -> None:
    reply = visit.ask(prompt)
    expect(reply.get_by_role("alert")).to_have_text(message)
    expect(reply.get_by_role("button", name="Try again")).to_be_visible()


# ---- what the user can do ----


@needs_browser
def test_retry_replaces_the_last_reply(visit: Visit, server: CannedServer) -> None:
    visit.ask("one")
    visit.ask("two")
    expect(visit.page.get_by_role("button", name="Try again")).to_have_count(1)
    visit.page.get_by_role("button", name="Try again").click()
    expect(visit.page.get_by_role("article", name="Reply").last).to_have_attribute("aria-busy", "false")
    expect(visit.page.get_by_role("article", name="Reply")).to_have_count(2)
    assert server.bodies[-1] == server.bodies[-2]


@needs_browser
def test_edit_of_an_earlier_message_goes_on_from_there(visit: Visit, server: CannedServer) -> None:
    visit.ask("one")
    visit.ask("long")
    visit.page.get_by_role("article", name="You").first.hover()
    visit.page.get_by_role("button", name="Edit message").first.click()
    area = visit.page.get_by_role("textbox", name="Edit message")
    expect(area).to_be_focused()
    expect(area).to_be_in_viewport()
    expect(visit.page.get_by_text("What follows is replaced.")).to_be_visible()
    area.press("Escape")
    expect(visit.page.get_by_role("article", name="You")).to_have_count(2)
    visit.page.get_by_role("button", name="Edit message").first.click()
    area.fill("uno")
    area.press("Enter")
    expect(visit.page.get_by_role("article", name="Reply")).to_have_count(1)
    expect(visit.page.get_by_role("article", name="Reply")).to_contain_text("You said: uno")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "uno"}]
    expect(visit.page.get_by_role("button", name="uno", exact=True)).to_be_visible()


@needs_browser
def test_settings_are_sent_and_kept(visit: Visit, server: CannedServer) -> None:
    visit.ask("plain")
    assert set(server.bodies[-1]) == {"model", "messages", "stream", "stream_options"}
    wanted = {"Temperature": "0.5", "Top p": "0.9", "Top k": "40", "Max tokens": "100", "Seed": "7", "Thinking": "on"}
    for label, value in wanted.items():
        visit.setting(label, value)
    visit.setting("System prompt", "Be brief.")
    visit.page.reload()
    visit.ask("again")
    body = server.bodies[-1]
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 100, "seed": 7,
    }  # fmt: skip
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    visit.setting("Tools", "{broken")
    expect(visit.ask("now?").get_by_role("alert")).to_contain_text("The tools are not JSON")
    assert server.bodies[-1] is body


@needs_browser
def test_model_is_chosen_from_those_served(visit: Visit, server: CannedServer) -> None:
    server.models = ("gem-small", "gem-large")
    visit.page.reload()
    visit.page.get_by_label("Model").select_option("gem-large")
    visit.ask("hello")
    assert server.bodies[-1]["model"] == "gem-large"
    expect(visit.page.get_by_label("Model")).to_have_value("gem-large")


@needs_browser
def test_conversations_survive_a_reload(visit: Visit) -> None:
    visit.ask("markdown")
    visit.page.get_by_role("button", name="New conversation").click()
    expect(visit.page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    visit.ask("slow", until_end=False)
    expect(visit.page.get_by_role("article", name="Reply")).to_contain_text("word3")
    visit.page.reload()
    reply = visit.page.get_by_role("article", name="Reply")
    expect(reply).to_contain_text("word3")
    expect(reply).to_contain_text("Interrupted")
    visit.page.get_by_role("button", name="markdown", exact=True).click()
    expect(reply.get_by_role("heading", level=1)).to_have_text("A small tour")
    visit.page.once("dialog", lambda dialog: dialog.accept())
    visit.page.get_by_role("button", name="Delete markdown").click()
    visit.page.reload()
    expect(visit.page.get_by_role("button", name="slow", exact=True)).to_be_visible()
    expect(visit.page.get_by_role("button", name="markdown", exact=True)).to_have_count(0)


@needs_browser
def test_export_is_imported_elsewhere(visit: Visit, browser: Browser, server: CannedServer, tmp_path: Path) -> None:
    visit.setting("API key", "secret-key")
    visit.ask("think")
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Export").click()
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    assert "secret-key" not in path.read_text()
    kept = json.loads(path.read_text())
    assert kept["chats"][0]["messages"][1]["content"] == "The answer is 42."
    kept["chats"][0]["messages"].append({"role": "user", "content": {"no": "text"}, "html": "<b>"})
    path.write_text(json.dumps(kept))
    other = Visit(browser, server)
    other.page.locator("#import-file").set_input_files(path)
    other.page.get_by_role("button", name="think", exact=True).click()
    expect(other.page.get_by_role("article", name="Reply")).to_contain_text("The answer is 42.")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"chats": 3}')
    other.page.locator("#import-file").set_input_files(wrong)
    expect(other.page.get_by_role("alert")).to_contain_text("wrong.json holds no exported conversations.")
    other.context.close()
    assert other.faults == []


@needs_browser
def test_key_is_asked_for_and_kept_for_the_tab_only(visit: Visit, server: CannedServer) -> None:
    server.wanted_key = "k-1"
    visit.page.reload()
    expect(visit.page.get_by_role("alert")).to_have_text("This server wants an API key: set it in Settings.")
    reply = visit.ask("hello")
    expect(reply.get_by_role("alert")).to_contain_text("Incorrect API key. (HTTP 401) Set the API key in Settings.")
    reply.get_by_role("button", name="Open Settings").click()
    visit.page.get_by_label("API key").fill("k-1")
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator("#banner")).to_be_hidden()
    visit.page.get_by_role("button", name="Try again").click()
    expect(visit.page.get_by_role("article", name="Reply")).to_contain_text("You said: hello")
    assert server.keys[-1] == "Bearer k-1"
    assert "k-1" not in visit.page.evaluate("JSON.stringify({ ...localStorage })")


@needs_browser
def test_lost_server_is_said_and_found_again(visit: Visit) -> None:
    expect(visit.page.get_by_label("Model")).to_have_value("gem-small")
    visit.context.set_offline(True)
    expect(visit.page.get_by_role("alert")).to_have_text("Offline: the server can’t be reached. Trying again…")
    reply = visit.ask("hello")
    expect(reply.get_by_role("alert")).to_have_text("The server can’t be reached, or the connection broke.")
    visit.context.set_offline(False)
    expect(visit.page.locator("#banner")).to_be_hidden()
    visit.page.get_by_role("button", name="Try again").click()
    expect(reply).to_contain_text("You said: hello")


@needs_browser
@pytest.mark.parametrize("own_visit", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True, ids=["clipboard"])
def test_code_is_copied(own_visit: Visit) -> None:
    reply = own_visit.ask("markdown")
    reply.get_by_role("button", name="Copy the python code").click()
    expect(reply.get_by_text("Copied")).to_be_visible()
    copied = own_visit.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("def gcd(a: int, b: int) -> int:\n    # Euclid\n")
    reply.get_by_role("button", name="Copy reply").click()
    own_visit.settle("navigator.clipboard.readText().then((text) => text.startsWith('# A *small* tour'))")


# ---- how it can be used ----


@needs_browser
def test_keyboard_is_enough(visit: Visit, server: CannedServer) -> None:
    page = visit.page
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="Reply")).to_contain_text("line two")
    assert server.bodies[0]["messages"][0]["content"] == "line one\nline two"
    expect(page.get_by_role("status")).to_contain_text("You said: line one")  # what a screen reader is told
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("textbox", name="Edit message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.get_by_role("link", name="Skip to the message field").focus()
    expect(page.get_by_role("link", name="Skip to the message field")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"


@needs_browser
def test_every_control_has_a_name(visit: Visit) -> None:
    visit.ask("call")
    visit.ask("markdown")
    visit.page.get_by_role("button", name="Settings").click()
    script = """() => {
      const isNamedByText = (node) => node.matches("button, a") && node.textContent.trim();
      const isNamed = (node) => node.getAttribute("aria-label") || node.labels?.length || isNamedByText(node);
      const controls = [...document.querySelectorAll("button, input:not([type=file]), select, textarea, a")];
      return controls.filter((node) => !isNamed(node)).map((node) => node.outerHTML);
    }"""
    assert visit.page.evaluate(script) == []


@needs_browser
@pytest.mark.parametrize("own_visit", [PHONE], indirect=True, ids=["phone"])
def test_phone_has_no_sideways_scroll(own_visit: Visit) -> None:
    fits = "document.documentElement.scrollWidth <= innerWidth && document.querySelector('#scroller').scrollWidth <= innerWidth"
    assert own_visit.page.evaluate(fits)
    for prompt in ("call", "markdown", "hostile", "x" * 400):
        own_visit.ask(prompt)
        assert own_visit.page.evaluate(fits), prompt
    expect(own_visit.page.get_by_role("button", name="New conversation")).to_be_hidden()
    own_visit.page.get_by_role("button", name="Conversations").tap()
    expect(own_visit.page.get_by_role("button", name="call", exact=True)).to_be_in_viewport()
    own_visit.page.get_by_role("button", name="New conversation").tap()
    expect(own_visit.page.get_by_role("button", name="New conversation")).to_be_hidden()
    own_visit.page.get_by_role("button", name="Settings").tap()
    assert own_visit.page.evaluate("document.querySelector('#settings').scrollWidth <= innerWidth")


@needs_browser
def test_long_replies_are_followed_unless_the_reader_scrolls(visit: Visit) -> None:
    at_end = "((box) => box.scrollHeight - box.scrollTop - box.clientHeight < 2)(document.querySelector('#scroller'))"
    visit.ask("long")
    visit.settle(at_end)
    visit.page.evaluate("document.querySelector('#scroller').scrollTop = 0")
    jump = visit.page.get_by_role("button", name="Jump to the end")
    expect(jump).to_be_visible()
    jump.click()
    visit.settle(at_end)
    expect(jump).to_be_hidden()


@needs_browser
@pytest.mark.parametrize("own_visit", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=["light", "dark"])
def test_both_themes_can_be_read(own_visit: Visit) -> None:
    own_visit.ask("think")
    own_visit.ask("markdown")
    own_visit.ask("busy")
    found = own_visit.contrasts()
    assert {"failure", "k", "c", "stats"} <= {name for name, _ in found}
    assert [(name, round(ratio, 2)) for name, ratio in found if ratio < 4.5] == []  # WCAG 2, level AA


@needs_browser
@pytest.mark.parametrize("own_visit", [{"color_scheme": "dark"}], indirect=True, ids=["dark"])
def test_theme_follows_the_system_until_chosen(own_visit: Visit) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    dark = own_visit.page.evaluate(background)
    own_visit.page.get_by_role("button", name="Colours: as the system").click()
    light = own_visit.page.evaluate(background)
    assert light == "rgb(255, 255, 255)" != dark
    own_visit.page.reload()
    assert own_visit.page.evaluate(background) == light
    own_visit.page.get_by_role("button", name="Colours: light").click()
    assert own_visit.page.evaluate(background) == dark


@needs_browser
@pytest.mark.skipif(
    not os.environ.get("GEMCUTTER_SCREENSHOTS"), reason="GEMCUTTER_SCREENSHOTS=1 draws the picture for the docs again"
)
@pytest.mark.parametrize("own_visit", [{"viewport": {"width": 1100, "height": 820}}], indirect=True, ids=["desk"])
def test_screenshot_for_the_docs(own_visit: Visit) -> None:
    own_visit.ask("Plan a weekend in Oslo")
    own_visit.page.get_by_role("button", name="New conversation").click()
    reply = own_visit.ask(PICTURED)
    reply.locator("summary").click()
    own_visit.page.locator("#scroller").evaluate("box => { box.scrollTop = 0; }")
    path = ROOT / "docs" / "images" / "chat-page.png"
    own_visit.page.screenshot(path=path)
    assert path.stat().st_size < 200_000
