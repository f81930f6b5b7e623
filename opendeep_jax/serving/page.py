"""The built-in chat page: one file, whose own script and style are all that a browser may run or load."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


@functools.cache
def page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers. What is not in the file by its hash does not run, wherever it came from."""
    html = Path(__file__).with_name("page.html").read_text("utf-8")
    allowed = {tag: " ".join(_hashes(html, tag)) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html, headers


async def page_response(_: Request) -> Response:
    """GET /"""
    html, headers = page()
    return HTMLResponse(html, headers=headers)


def _hashes(html: str, tag: str) -> list[str]:
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in contents]
