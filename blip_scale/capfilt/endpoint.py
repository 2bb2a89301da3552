"""A captioner behind HTTP: any server that speaks OpenAI's chat completions, such as vLLM.

Each image is sent in its own request: the prompt, and the image as a base64 data URL. Several
requests run at a time. Each attempt has a deadline, and failures are retried. An image for which
the server returns no usable caption is rejected.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any

from blip_scale.data.captions import plain
from blip_scale.data.pixels.decoding import to_rgb
from blip_scale.data.pixels.formats import open_image
from blip_scale.errors import RefusedInput
from blip_scale.storage.objects import RemoteError
from blip_scale.storage.untrusted import parse_json

KEY_VARIABLE = "CAPTIONER_API_KEY"
"""Environment variable with the API key, if the server requires one."""
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_LARGEST_ANSWER_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_USELESS_TRIES = 3
"""Number of responses without a usable caption after which an image is rejected."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_ITS_IMAGE_AT_FAULT = (400, 413, 415, 422)
_MAY_PASS = (408, 409, 425, 429)
"""Status codes below 500 that are retried."""


@dataclass(frozen=True)
class Endpoint:
    """Address and settings of a captioner."""

    url: str
    """Base of the API, such as http://127.0.0.1:8000/v1."""
    model: str
    """Name of the model on the server."""
    prompt: str = "Describe the image in one sentence."
    max_tokens: int = 128
    """Maximum number of tokens in a caption, counted by the server's tokenizer."""
    temperature: float = 0.0
    requests: int = 16
    """Number of concurrent requests."""
    timeout_s: float = 120.0
    """Time limit of one attempt in seconds."""
    retry_s: float = 600.0
    """Seconds for which a failing server is retried."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: the URL is not HTTP, the model is missing, or a number is out of range.
        """
        try:
            parts = urllib.parse.urlsplit(self.url)
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # invalid port, or unclosed brackets
            is_web = False
        if not is_web:
            raise ValueError(
                f"--captioner-url {self.url}: expected a URL such as http://127.0.0.1:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise ValueError(f"--captioner-url: give the key in {KEY_VARIABLE}, not in the URL")
        if not self.model:
            raise ValueError("--captioner-model is missing: name the server's model")
        seconds_fit = 0 < self.timeout_s < math.inf and 0 <= self.retry_s < math.inf
        if min(self.max_tokens, self.requests) < 1 or not seconds_fit:
            raise ValueError(
                "--captioner-tokens, --captioner-requests and --captioner-timeout: expected "
                "numbers above 0; --captioner-retry: 0 or more"
            )

    @property
    def host(self) -> str:
        """Host and port of the server."""
        return urllib.parse.urlsplit(self.url).netloc

    def provenance(self) -> dict[str, Any]:
        """Settings that determine the captions, for the manifest."""
        return {
            "model": self.model,
            "url_host": self.host,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }


class NoCaption(Exception):
    """The server gives no caption for an image; the message says why."""


class _Useless(Exception):
    """The response holds no usable caption."""


class _Failed(Exception):
    """The attempt failed for a reason that may be temporary."""


def caption_of(endpoint: Endpoint, image: bytes, seed: int) -> str:
    """Request a caption for an encoded image.

    Args:
        endpoint: the captioner.
        image: the encoded image.
        seed: random seed, sent with the request; a server may ignore it.

    Raises:
        NoCaption: the server refuses the image, or its responses hold no usable caption.
        RemoteError: the server still fails after `retry_s`.
        RefusedInput: the server refuses the model, the path or the key.
    """
    body = json.dumps(_request(endpoint, image, seed)).encode()
    deadline = time.monotonic() + endpoint.retry_s
    pause_s, useless = _FIRST_PAUSE_S, 0
    while True:
        try:
            return _parse(_post(endpoint, body))
        except _Useless as error:
            useless += 1
            if useless == _USELESS_TRIES:
                raise NoCaption(str(error)) from error
        except _Failed as error:
            if time.monotonic() + pause_s > deadline:
                raise RemoteError(
                    f"the captioner {endpoint.url} has failed for {endpoint.retry_s:g} s "
                    f"({error}); finished work is kept; the same command continues"
                ) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _request(endpoint: Endpoint, image: bytes, seed: int) -> dict[str, Any]:
    kind, data = _sendable(image)
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    content = [
        {"type": "text", "text": endpoint.prompt},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": endpoint.max_tokens,
        "temperature": endpoint.temperature,
        "seed": seed,
    }


def _sendable(image: bytes) -> tuple[str, bytes]:
    """MIME type and bytes of an image, converted to JPEG unless it is JPEG, PNG or WebP."""
    with open_image(image) as opened:
        if opened.format in _SENT_AS_THEY_ARE:
            return _SENT_AS_THEY_ARE[opened.format], image
        encoded = io.BytesIO()
        to_rgb(opened).save(encoded, "JPEG", quality=95)
    return "image/jpeg", encoded.getvalue()


def _post(endpoint: Endpoint, body: bytes) -> bytes:
    """Send a request and read the response, within `timeout_s` in total.

    Raises:
        _Failed: the server can't be reached, is busy, or takes too long.
        NoCaption: the server refuses this image.
        RefusedInput: the server refuses the key, the model or the path.
    """
    parts = urllib.parse.urlsplit(endpoint.url)
    is_tls = parts.scheme == "https"
    connect = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
    deadline = time.monotonic() + endpoint.timeout_s
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
    assert parts.hostname is not None
    connection = connect(parts.hostname, parts.port, timeout=endpoint.timeout_s)
    try:
        path = f"{parts.path.rstrip('/')}/chat/completions"
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = _read(answer, deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Failed(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return content
    problem = f"status {answer.status}: {content[:200].decode('utf-8', 'replace')!r}"
    if answer.status in _ITS_IMAGE_AT_FAULT:
        raise NoCaption(problem)
    if answer.status < http.client.INTERNAL_SERVER_ERROR and answer.status not in _MAY_PASS:
        raise RefusedInput(
            f"the captioner {endpoint.url} refuses requests for {endpoint.model} ({problem}); "
            f"check --captioner-url, --captioner-model and {KEY_VARIABLE}"
        )
    raise _Failed(problem)


def _read(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """Read the body of a response. The deadline holds even if the server sends slowly.

    Raises:
        TimeoutError: the body is incomplete at the deadline.
        ValueError: the body has more than `_LARGEST_ANSWER_BYTES` bytes.
    """
    content = b""
    while part := answer.read1(_READ_BYTES):
        content += part
        if len(content) > _LARGEST_ANSWER_BYTES:
            raise ValueError(f"the response has more than {_LARGEST_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the response is not complete in time")
    if answer.length:  # fewer bytes than Content-Length
        raise http.client.IncompleteRead(content, answer.length)
    return content


def _parse(content: bytes) -> str:
    """Extract the caption from a response, as one line of text.

    Raises:
        _Useless: the response holds no usable caption.
    """
    try:
        answer = parse_json(content)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        shown = content[:100].decode("utf-8", "replace")
        raise _Useless(f"a response without choices[0].message.content: {shown!r}") from error
    if not isinstance(text, str):
        raise _Useless(f"the caption is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Useless("the caption has half a surrogate pair") from error
    caption = plain(text)
    if not caption:
        raise _Useless("an empty caption")
    return caption
