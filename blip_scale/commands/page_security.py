"""ASGI middleware that keeps the page's browser from asking other hosts.

The page of gradio 6.10 loads a script from a CDN and opens connections to a host of fonts
(gradio/templates/frontend/index.html). tests/inference/test_demo_page.py looks at every request.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    [
        "default-src 'self' data: blob:",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
"""Content-Security-Policy: the browser refuses whatever would go to another host. Gradio needs
inline scripts, inline styles and evaluated templates."""

_TAG = re.compile(
    r"<(?:link|script)\b[^>]*?\b(?:href|src)=\"(https?://[^\"]*)\"[^>]*>(?:\s*</script>)?"
)


class SameHostOnly:
    """Sends the policy with every answer. Takes tags that point elsewhere out of the HTML, and
    answers 404 in place of a redirect to another host."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and change its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        html_start: Message | None = None
        html = b""

        async def changed(message: Message) -> None:
            nonlocal html_start, html
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers["content-security-policy"] = POLICY
                headers["referrer-policy"] = "no-referrer"
                # Gradio redirects to whatever URL stands behind "file=".
                if urlsplit(headers.get("location", "")).netloc not in ("", host):
                    del headers["location"]
                    message["status"] = 404
                if headers.get("content-type", "").startswith("text/html"):
                    html_start = message  # its length is known once the HTML is whole
                    return
            elif html_start is not None:
                html += message.get("body", b"")
                if message.get("more_body", False):
                    return
                html = without_other_hosts(html.decode(), host).encode()
                MutableHeaders(raw=html_start["headers"])["content-length"] = str(len(html))
                await send(html_start)
                await send({"type": "http.response.body", "body": html})
                return
            await send(message)

        await self._app(scope, receive, changed)


def without_other_hosts(html: str, host: str) -> str:
    """HTML without the scripts, styles and connections that name another host than `host`."""

    def kept(tag: re.Match[str]) -> str:
        return tag[0] if urlsplit(tag[1]).netloc == host else ""

    return _TAG.sub(kept, html)
