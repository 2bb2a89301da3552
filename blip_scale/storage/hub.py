"""Hugging Face's hub: what is cached is taken from the cache, and a hub that does not answer is
refused within seconds. Libraries ask for each file, with retries: minutes without a word."""

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
"""Wait for the hub's answer."""


def is_local(name: str, files: Sequence[str], setting: str, instead: str = "FOLDER") -> bool:
    """Whether a folder or a cached hub repository is meant, so that nothing has to be fetched.

    Otherwise the hub is about to be asked: that is logged, and a hub that cannot be reached is
    refused here.

    Args:
        name: a folder, or the name of a repository on the hub.
        files: a repository with one of these in the local cache has been fetched before.
        setting: where the name comes from, for messages.
        instead: what to set it to without a hub, for the refusal.

    Raises:
        ValueError: the repository is not in the cache and the hub does not answer.
    """
    if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
        return True
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return True
    except HFValidationError:  # no name that a repository can have: the caller's library says so
        return True
    # A warning, because it is shown in commands that set up no log as well.
    logger.warning("%s: fetching %s from %s", setting, name, constants.ENDPOINT)
    problem = _problem(constants.ENDPOINT)
    if problem:
        raise ValueError(
            f"{setting}: {name} is not in the local cache, and {constants.ENDPOINT} does not "
            f"answer ({problem}); without it, give {setting}={instead}"
        )
    return False


@cache
def _problem(endpoint: str) -> str | None:
    """Why an endpoint cannot be reached; None: it answers, whatever it says."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # libraries have certificates of their own
            return str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None
