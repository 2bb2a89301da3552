"""Fetch files from the Hugging Face hub into its cache before a library uses them.

A cached repository is read from the cache. If the hub is unreachable, this module raises an error
within seconds; the libraries would silently retry every file for minutes. A download that stalls or
is very slow fails; the libraries would wait forever as long as some bytes arrive.
"""

from __future__ import annotations

import http.client
import logging
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from blip_scale.storage import objects

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""Seconds to wait for a response of the hub."""
WINDOW_S = 60.0
LEAST_RATE = 1000.0
"""Minimum bytes per second of a download, averaged over WINDOW_S seconds."""
_POLL_S = 0.2
_FETCH = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # incomplete files grow by this many bytes
name, small, *files = sys.argv[1:]

def has(file):
    try:
        return hf_hub_download(name, file)
    except EntryNotFoundError:
        return None

for file in small.split():
    has(file)
sys.exit(not any(map(has, files)))
"""
"""Program that downloads the small files of a repository, and the first of `files` that exists. It
ends when its parent closes stdin or dies."""
_SMALL = (
    "config.json tokenizer_config.json tokenizer.json vocab.txt special_tokens_map.json "
    "added_tokens.json"
)
"""Files that a tokenizer or a configuration may need in addition to those named by the caller."""


def is_local(name: str, files: Sequence[str], setting: str, instead: str = "FOLDER") -> bool:
    """Return True if `name` is a folder or a cached hub repository, downloading it if necessary.

    Before a download, log that the hub will be contacted and check that it responds. Return False
    if the repository can't be downloaded; the caller's library then reports the reason.

    Args:
        name: folder, or name of a repository on the hub.
        files: the repository counts as cached if one of these files is in the local cache.
        setting: name of the setting, for messages.
        instead: value to suggest for the setting if the hub is unreachable.

    Raises:
        ValueError: the repository is not cached and the hub does not respond.
        RemoteError: the download stalled in every attempt.
    """
    if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
        return True
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return True
    except HFValidationError:  # not a valid repository name: the caller's library reports it
        return True
    # A warning, because commands that do not configure logging show warnings only.
    logger.warning("%s: fetching %s from %s", setting, name, constants.ENDPOINT)
    problem = _problem(constants.ENDPOINT)
    if problem:
        raise ValueError(
            f"{setting}: {name} is not in the local cache, and {constants.ENDPOINT} does not "
            f"answer ({problem}); without a connection, set {setting}={instead}"
        )
    location = f"{constants.ENDPOINT}/{name}"
    return objects.retried(lambda: _download(name, files), "fetched", location, objects.RETRY_S)


def _download(name: str, files: Sequence[str]) -> bool:
    """Download a repository in a process that can be killed, and return True on success.

    Raises:
        TimeoutError: the download was slower than LEAST_RATE for WINDOW_S seconds.
    """
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    hub_variables = {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_HUB_DISABLE_XET": "1",  # its files don't grow during a download, which hides the rate
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _FETCH, name, _SMALL, *files], env=os.environ | hub_variables,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    window_began, bytes_then = time.monotonic(), _bytes_of(folder)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            if time.monotonic() - window_began < WINDOW_S:
                continue
            bytes_now = _bytes_of(folder)
            if bytes_now - bytes_then < LEAST_RATE * WINDOW_S:
                raise TimeoutError(f"fewer than {LEAST_RATE:g} bytes/s for {WINDOW_S:g} s")
            window_began, bytes_then = time.monotonic(), bytes_now
    finally:
        process.kill()
        process.communicate()
    return process.returncode == 0


def _bytes_of(folder: Path) -> int:
    """Bytes of the files in a folder of the cache, including unfinished downloads."""
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed since the listing
            continue
    return total


@cache
def _problem(endpoint: str) -> str | None:
    """Reason why an endpoint is unreachable, or None if it responds with any status."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # the libraries have their own certificates
            return str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None
