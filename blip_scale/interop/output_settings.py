"""What decides about a checkpoint's output beside its weights; travels through every conversion.

Where it stands: `recipe.yaml` of a run; `output_settings.json` of a converted training checkpoint;
under the key `output_settings` of our `.pth` files; in `config.json` of Hugging Face folders, whose
`generation_config.json` says beams and lengths. BLIP's own files say nothing: `published`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import NoneType
from typing import Any, get_args

from blip_scale.model.generation import BeamSettings, Scoring
from blip_scale.model.heads import Head

KEY = "output_settings"
"""Key of these settings in files, and the stem of a file that holds nothing else."""
_PUBLISHED_PROMPT = "a picture of "
_GENERATION_CONFIG = ("num_beams", "max_length", "min_length", "repetition_penalty")
"""Fields with a name in transformers' GenerationConfig, where they have the same meaning."""


@dataclass(frozen=True)
class OutputSettings:
    """Prompt, lengths, beams and scoring of a checkpoint; the defaults are BLIP's for captions."""

    prompt: str = ""
    """How captions begin."""
    num_beams: int = 3
    max_length: int = 20
    """Most tokens of a caption or answer, prompt and [SEP] included."""
    min_length: int = 5
    """No [SEP] before so many tokens, prompt included."""
    repetition_penalty: float = 1.0
    scoring: Scoring = "huggingface"
    """Of captions and answers outside of an evaluation (`BeamSettings.scoring`)."""
    evaluation_scoring: Scoring = "published"
    """Of captions and answers that are measured."""
    text_tokens: int | None = None
    """Texts are cut to so many tokens, [CLS] and [SEP] included; None: as published for the use."""
    rerank_top_k: int | None = None
    """Candidates that an evaluation re-ranks; None: as published for the task."""
    label_smoothing: float = 0.1
    """Of the likelihoods by which an answer is chosen from a list."""

    def beam(self) -> BeamSettings:
        """The beam search that writes captions or answers."""
        return BeamSettings(
            num_beams=self.num_beams,
            max_length=self.max_length,
            min_length=self.min_length,
            repetition_penalty=self.repetition_penalty,
            scoring=self.scoring,
        )

    def generation_config(self, max_positions: int) -> dict[str, Any]:
        """The fields of transformers' GenerationConfig; no text is longer than the positions."""
        values = {name: getattr(self, name) for name in _GENERATION_CONFIG}
        return values | {"max_length": min(self.max_length, max_positions)}

    def with_generation_config(self, values: Mapping[str, Any]) -> OutputSettings:
        """The same with what a generation_config.json says.

        Raises:
            ValueError: a value of another type.
        """
        found = {name: values[name] for name in _GENERATION_CONFIG if values.get(name) is not None}
        return from_json(asdict(self) | found)


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
    """Settings of BLIP's own files, which say none."""
    prompt = _PUBLISHED_PROMPT if head == "captioning" else ""
    settings = OutputSettings(prompt, scoring="published")
    return replace(settings, max_length=10, min_length=1) if head == "vqa" else settings


def turned(settings: OutputSettings, source: Head, head: Head) -> OutputSettings:
    """The settings after the weights of `source` became those of another head: answers have
    lengths of their own."""
    if head != "vqa" or source == "vqa":
        return settings
    return replace(
        published("vqa"),
        scoring=settings.scoring,
        evaluation_scoring=settings.evaluation_scoring,
    )


def from_json(values: Mapping[str, Any]) -> OutputSettings:
    """Settings from what `dataclasses.asdict` made of them.

    Raises:
        ValueError: a field that is not there, one too many, or a value that can't be.
    """
    strange = sorted(set(_TYPES) ^ set(values))
    if strange:
        raise ValueError(f"{KEY}: {strange[0]} is missing, or unknown to this blip_scale")
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
