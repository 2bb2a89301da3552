"""ASGI middleware that prevents the browser from sending requests to other hosts.

The page of gradio 6.10 loads a script from a CDN and connects to a font server
(gradio/templates/frontend/index.html). tests/inference/test_demo_page.py checks every request.
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
"""Content-Security-Policy with which the browser blocks every request to another host. Inline
scripts, inline styles and eval are allowed, because gradio needs them."""

_TAG = re.compile(
    r"<(?:link|script)\b[^>]*?\b(?:href|src)=\"(https?://[^\"]*)\"[^>]*>(?:\s*</script>)?"
)


class SameHostOnly:
    """Middleware that restricts responses to this host.

    It adds the policy to every response, and removes link and script tags for other hosts from the
    HTML. It replaces a redirect to another host by status 404.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, and change its response."""
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
                # Gradio redirects to any URL that follows "file=".
                if urlsplit(headers.get("location", "")).netloc not in ("", host):
                    del headers["location"]
                    message["status"] = 404
                if headers.get("content-type", "").startswith("text/html"):
                    html_start = message  # sent later: Content-Length depends on the changed HTML
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
    """Remove link and script tags whose URL is on a host other than `host`."""

    def kept(tag: re.Match[str]) -> str:
        return tag[0] if urlsplit(tag[1]).netloc == host else ""

    return _TAG.sub(kept, html)
