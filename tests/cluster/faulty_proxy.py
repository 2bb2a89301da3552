"""A proxy in front of an HTTP server that fails a seeded share of the requests."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from s3_server import environment

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests, alternating between two kinds of faults.

    One fault answers 503 without contacting the server. The other cuts the connection in the middle
    of the server's answer.
    """

    daemon_threads = True

    def __init__(self, port: int, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = port
        self.requests = 0
        self.downloads: Counter[str] = Counter()
        """GET requests by path."""
        self.faults = {"refused": 0, "cut": 0}
        self.share = share
        """Of the requests that fail; may be changed while it runs."""
        self.pause_s = 0.0
        """Time that every request takes longer; may be changed while it runs."""
        self._dice = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self, command: str, path: str) -> str | None:
        """Decide the fate of the next request."""
        with self._lock:
            self.requests += 1
            self.downloads[path] += command == "GET"
            if self._dice.random() >= self.share:
                return None
            fault = "cut" if self.faults["refused"] > self.faults["cut"] else "refused"
            self.faults[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that was killed, instead of printing a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.server.pause_s)
        fault = self.server.draw(self.command, self.path)
        if fault == "refused":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=60)
        try:  # the client has signed the Host header, so it must not change
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            content = answer.read()
        except OSError:  # the server is down, so the proxy drops the connection
            self.close_connection = True
            return
        finally:
            upstream.close()
        length = str(len(content))
        if self.command == "HEAD":
            length = answer.getheader("Content-Length", "0")
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@contextmanager
def faulty_proxy(
    port: int, monkeypatch: pytest.MonkeyPatch, share: float = 0.05, seed: int = 0
) -> Iterator[FaultyProxy]:
    """Run a proxy in front of the S3 server at `port`, and point clients to it."""
    proxy = FaultyProxy(port, share, seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    for name, value in environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
