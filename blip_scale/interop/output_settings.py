"""Settings that, besides the weights, determine a checkpoint's output. Every conversion keeps them.

They are stored in these places:

- `recipe.yaml` of a run,
- `output_settings.json` of a converted training checkpoint,
- the key `output_settings` of `.pth` files that this package writes,
- `config.json` of Hugging Face folders, whose `generation_config.json` has beams and lengths.

BLIP's own files do not have them; `published` gives the settings of the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import NoneType
from typing import Any, get_args

from blip_scale.model.generation import BeamSettings, Scoring
from blip_scale.model.heads import Head

KEY = "output_settings"
"""Key of these settings in files, and stem of the file that holds only them."""
_PUBLISHED_PROMPT = "a picture of "
_GENERATION_CONFIG = ("num_beams", "max_length", "min_length", "repetition_penalty")
"""Fields that transformers' GenerationConfig also has, with the same meaning."""


@dataclass(frozen=True)
class OutputSettings:
    """Prompt, lengths, beams and scoring of a checkpoint; the defaults are BLIP's for captions."""

    prompt: str = ""
    """Text with which captions begin."""
    num_beams: int = 3
    max_length: int = 20
    """Maximum number of tokens of a caption or answer, including the prompt and [SEP]."""
    min_length: int = 5
    """Number of tokens, including the prompt, before which [SEP] is not allowed."""
    repetition_penalty: float = 1.0
    scoring: Scoring = "huggingface"
    """Scoring of captions and answers outside an evaluation (`BeamSettings.scoring`)."""
    evaluation_scoring: Scoring = "published"
    """Scoring of captions and answers in an evaluation."""
    text_tokens: int | None = None
    """Number of tokens to which texts are truncated, including [CLS] and [SEP]. None: the published
    number for the task."""
    rerank_top_k: int | None = None
    """Number of candidates that an evaluation re-ranks. None: the published number for the task."""
    label_smoothing: float = 0.1
    """Label smoothing of the likelihoods that select an answer from a list."""

    def beam(self) -> BeamSettings:
        """Return the settings of the beam search that generates captions or answers."""
        return BeamSettings(
            num_beams=self.num_beams,
            max_length=self.max_length,
            min_length=self.min_length,
            repetition_penalty=self.repetition_penalty,
            scoring=self.scoring,
        )

    def generation_config(self, max_positions: int) -> dict[str, Any]:
        """Return GenerationConfig fields, with max_length limited to `max_positions`."""
        values = {name: getattr(self, name) for name in _GENERATION_CONFIG}
        return values | {"max_length": min(self.max_length, max_positions)}

    def with_generation_config(self, values: Mapping[str, Any]) -> OutputSettings:
        """Copy the settings with the values of a generation_config.json.

        Raises:
            ValueError: a value has the wrong type.
        """
        settings = {
            name: values[name] for name in _GENERATION_CONFIG if values.get(name) is not None
        }
        return from_json(asdict(self) | settings)


_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "num_beams": (int,),
    "max_length": (int,),
    "min_length": (int,),
    "repetition_penalty": (int, float),
    "scoring": (str,),
    "evaluation_scoring": (str,),
    "text_tokens": (int, NoneType),
    "rerank_top_k": (int, NoneType),
    "label_smoothing": (int, float),
}


def published(head: Head) -> OutputSettings:
    """Return the settings of the published code, for BLIP's own files, which have none."""
    prompt = _PUBLISHED_PROMPT if head == "captioning" else ""
    settings = OutputSettings(prompt, scoring="published")
    return replace(settings, max_length=10, min_length=1) if head == "vqa" else settings


def turned(settings: OutputSettings, source: Head, head: Head) -> OutputSettings:
    """Return the settings after weights of head `source` are converted to `head`.

    Lengths change when a captioning network becomes a VQA network: answers are shorter.
    """
    if head != "vqa" or source == "vqa":
        return settings
    return replace(
        published("vqa"),
        scoring=settings.scoring,
        evaluation_scoring=settings.evaluation_scoring,
    )


def from_json(values: Mapping[str, Any]) -> OutputSettings:
    """Build settings from the dictionary that `dataclasses.asdict` makes of them.

    Raises:
        ValueError: a field is missing or unknown, or a value is not allowed.
    """
    unexpected = sorted(set(_TYPES) ^ set(values))
    if unexpected:
        raise ValueError(f"{KEY}: {unexpected[0]} is missing, or unknown to this blip_scale")
    for name, wanted in _TYPES.items():
        value = values[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{KEY}: {name} can't be {value!r}")
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{KEY}: {name} can't be {value!r}")
    for name in ("scoring", "evaluation_scoring"):
        if values[name] not in get_args(Scoring):
            raise ValueError(f"{KEY}: {name}: expected one of {', '.join(get_args(Scoring))}")
    return OutputSettings(**values)
