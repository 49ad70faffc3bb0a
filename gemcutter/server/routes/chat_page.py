"""The chat page at `/`: one HTML document that asks this server for replies, and nobody else for anything.

Owns how the files beside `gemcutter/server/chat_page.html` become one document, and the policy that holds the browser to it:
scripts and styles run only if their hash is listed, requests go to this server only. Refuses to know models and keys: the page
is the same for everyone, and its requests go through the routes that all clients use. Read `gemcutter/server/chat_page.js` next.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).parents[1]
STYLE = re.compile(r'<link rel="stylesheet" href="([a-z_]+\.css)">')
SCRIPT = re.compile(r'<script src="([a-z_]+\.js)"></script>')
ENDS_A_SCRIPT = re.compile(r"<!--|</?(?:script|style)", re.IGNORECASE)  # what an HTML parser would act on inside of one
ALWAYS_ASK = "no-cache"  # keep a copy, but ask whether it still holds: a new version shows at once

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class ChatPage:
    """One document as it is sent: its bytes, the policy that its scripts and styles run under, and its entity tag."""

    html: bytes
    policy: str
    tag: str


@functools.cache
def chat_page() -> ChatPage:
    """Return the page with its style and scripts inside. Raises ValueError where one of them would end its own element."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inside(element: str, found: re.Match[str]) -> str:
        text = (FOLDER / found[1]).read_text(encoding="utf-8")
        if ENDS_A_SCRIPT.search(text):
            raise ValueError(
                f"{FOLDER / found[1]} holds a tag or comment that HTML would read inside <{element}>; write it otherwise"
            )
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[element].append(f"'sha256-{digest}'")
        return f"<{element}>{text}</{element}>"

    html = (FOLDER / "chat_page.html").read_text(encoding="utf-8")
    html = STYLE.sub(functools.partial(inside, "style"), html)
    html = SCRIPT.sub(functools.partial(inside, "script"), html)
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "connect-src 'self'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return ChatPage(html.encode(), policy, f'"{hashlib.sha256(html.encode()).hexdigest()[:32]}"')


@router.api_route("/", methods=["GET", "HEAD"])
async def get_chat_page(request: Request) -> Response:
    """Return the page, or 304 to a browser that has this very one."""
    page = chat_page()
    headers = {
        "Cache-Control": ALWAYS_ASK,
        "ETag": page.tag,
        "Content-Security-Policy": page.policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if page.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(page.html, media_type="text/html; charset=utf-8", headers=headers)
