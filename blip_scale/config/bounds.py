"""Types with bounds, for the settings in the dataclasses of a recipe."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Configuration of a recipe's dataclasses: unknown settings and infinite numbers are refused."""

MOST = 10**12
"""Largest number of steps, samples or pixels."""
MOST_S = 10**9
"""Largest number of seconds, rate or factor. As seconds it is 32 years; Python's timeouts allow
292 years."""
MOST_BATCH = 10**6
"""Largest number of epochs, and of pairs, images or texts in a batch."""
MOST_SIDE = 4096
"""Largest side of the network's images in pixels."""
MOST_WIDTH = 2**16
"""Largest number of channels, tokens or words."""
MOST_LAYERS = 1000
MOST_PROCESSES = 1024
"""Largest number of concurrent processes or threads on a machine."""
MOST_BEAMS = 100
"""Largest number of beams, and of captions generated for an image."""


def _one_line(text: str) -> str:
    """Refuse control characters, such as a newline at the end of a shell variable."""
    for character in text:
        if unicodedata.category(character) == "Cc":
            raise ValueError(f"{text!r} has the control character {character!r}; remove it")
    return text


Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
BatchSize = Annotated[int, Field(ge=1, le=MOST_BATCH)]
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
Width = Annotated[int, Field(ge=1, le=MOST_WIDTH)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Rate = Annotated[float, Field(ge=0, le=MOST_S)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Above0 = Annotated[float, Field(gt=0, le=MOST_S)]
Line = Annotated[str, AfterValidator(_one_line)]
"""Path or name."""
