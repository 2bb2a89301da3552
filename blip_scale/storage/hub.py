"""Check the Hugging Face hub before a library uses it.

A cached repository is read from the cache. An unreachable hub is refused within seconds: the
libraries would retry every file, silently, for minutes.
"""

from __future__ import annotations

import http.client
import logging
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""Seconds to wait for the hub's answer."""


def is_local(name: str, files: Sequence[str], setting: str, instead: str = "FOLDER") -> bool:
    """Return True if `name` is a folder or a cached hub repository: nothing has to be downloaded.

    Otherwise log that the hub will be contacted, and check that it answers.

    Args:
        name: folder, or name of a repository on the hub.
        files: the repository counts as cached if one of these files is in the local cache.
        setting: setting that holds the name, for messages.
        instead: value to suggest for the setting if the hub is unreachable.

    Raises:
        ValueError: the repository is not cached and the hub does not answer.
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
    return False


@cache
def _problem(endpoint: str) -> str | None:
    """Reason why an endpoint cannot be reached, or None if it answers with any status."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # the libraries bring their own certificates
            return str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None
