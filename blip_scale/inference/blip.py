"""Inference with a trained BLIP: captions, answers, matching probabilities, features.

Shapes: I images, S texts, N image tokens, D width, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from blip_scale.data.captions import clean_caption, clean_question
from blip_scale.data.pixels.transforms import normalize_images
from blip_scale.data.tokenizer import prompt_ids
from blip_scale.inference import arguments
from blip_scale.interop.output_settings import OutputSettings
from blip_scale.model.generation import BeamSettings, NucleusSettings, caption_beam, caption_nucleus
from blip_scale.model.heads import Head
from blip_scale.model.med import MED
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.packing import PackedText
from blip_scale.model.visdial import VisDial
from blip_scale.model.vqa import VQA

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

PUBLISHED_TEXT_TOKENS = 35
"""Maximum text tokens if the checkpoint does not state them, as in the published retrieval."""
Use = Literal["caption", "match", "embed", "vqa", "nlvr2", "visdial"]
_HEADS: dict[Use, tuple[Head, ...]] = {
    "caption": ("pretrain", "captioning"),
    "match": ("pretrain", "retrieval"),
    "embed": ("pretrain", "retrieval"),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "visdial": ("visdial",),
}
"""Use -> heads of the checkpoints that support it."""


@dataclass(frozen=True)
class Blip:
    """A checkpoint loaded by `load_blip`. Methods raise ValueError if it lacks a part they need."""

    network: MED | VQA | NLVR2 | VisDial
    """Network in evaluation mode, with the parts that the checkpoint has."""
    tokenizer: PreTrainedTokenizerFast
    head: Head
    origin: str
    """Path of the checkpoint."""
    fingerprint: str
    """Hash of the weights."""
    output: OutputSettings
    """Default prompt, number of beams and lengths of captions and answers."""
    is_output_stated: bool
    """Whether `output` comes from the checkpoint. Otherwise it is the published default."""
    is_match_trained: bool = True
    """Whether ITM was trained, as far as the checkpoint's recipe states it."""

    @property
    def prompt(self) -> str:
        """Default beginning of captions."""
        return self.output.prompt

    @property
    def med(self) -> MED:
        """The network of a `pretrain`, `captioning` or `retrieval` checkpoint."""
        assert isinstance(self.network, MED)
        return self.network

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.network.config.vision.image_size

    @property
    def text_tokens(self) -> int:
        """Maximum number of tokens of a text, including [CLS] and [SEP]. Longer texts are cut."""
        limit = self.output.text_tokens or PUBLISHED_TEXT_TOKENS
        return min(limit, self.network.config.text.max_positions)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.network.vision.patch_embed.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.network.vision.patch_embed.proj.weight.dtype

    @torch.no_grad()
    def image_embeds(self, pixels: Tensor) -> Tensor:
        """Encode images: uint8 [I, 3, image_size, image_size] to image tokens [I, N, D]."""
        if not isinstance(self.network, MED | VQA):
            raise ValueError(
                f"{self.origin} is a {self.head} checkpoint; blip.network takes its batches"
            )
        arguments.check_pixels(pixels, self.image_size)
        return self.network.encode_image(normalize_images(pixels.to(self.device), self.dtype))

    @torch.no_grad()
    def captions(
        self,
        image_embeds: Tensor,
        settings: BeamSettings | NucleusSettings | None = None,
        prompt: str | None = None,
        draws: Tensor | None = None,
    ) -> list[str]:
        """Generate a caption of each image, or `BeamSettings.captions` of each, without the prompt.

        Args:
            image_embeds: [I, N, D].
            settings: beam search or nucleus sampling. Lengths include [DEC], prompt and [SEP].
                None: the checkpoint's beam search.
            prompt: beginning of every caption. None: the checkpoint's prompt.
            draws: random numbers of nucleus sampling, see `draws_of`.
        """
        self.require("caption")
        self.check_tokens(image_embeds)
        settings = settings or self.output.beam()
        prompt_ids = self.prompt_ids(self.prompt if prompt is None else prompt)
        if isinstance(settings, BeamSettings):
            arguments.check_beams(settings.num_beams)
            sequences = caption_beam(self.med, image_embeds, prompt_ids, settings)
        else:
            arguments.check_draws(draws, len(image_embeds), settings.max_length)
            sequences = caption_nucleus(self.med, image_embeds, prompt_ids, settings, draws)
        return self._decoded(sequences)

    @torch.no_grad()
    def answers(
        self,
        image_embeds: Tensor,
        questions: str | Sequence[str],
        owners: Sequence[int],
        settings: BeamSettings | None = None,
    ) -> list[str]:
        """Generate a free answer to each question.

        Args:
            image_embeds: [I, N, D].
            questions: one text or several, which are cleaned as in training.
            owners: index of each question's image.
            settings: settings of the beam search. None: the checkpoint's.
        """
        self.require("vqa")
        assert isinstance(self.network, VQA)
        self.check_tokens(image_embeds)
        questions = arguments.texts_of(questions, "questions")
        settings = settings or self.output.beam()
        arguments.check_beams(settings.num_beams)
        index = arguments.owner_index(owners, len(questions), len(image_embeds), self.device)
        if not questions:
            return []
        text = self._packed([clean_question(q) for q in questions])
        text = text.with_first_token(self.network.config.text.special.enc)
        states = self.network.encode_questions(text, image_embeds, index)
        prompt = self.prompt_ids("")
        return self._decoded(
            caption_beam(self.network, states[None], prompt, settings, text.segments)
        )

    def _decoded(self, sequences: list[list[int]]) -> list[str]:
        """Decode token ids to texts, without special tokens."""
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids with which a caption begins: [DEC] and the prompt."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: expected one str for all images, found {prompt!r}")
        return prompt_ids(prompt, self.tokenizer)

    @torch.no_grad()
    def match(
        self, image_embeds: Tensor, texts: str | Sequence[str], owners: Sequence[int]
    ) -> Tensor:
        """Compute the probability that image and text match, fp32 [S] on the CPU.

        Args:
            image_embeds: [I, N, D].
            texts: one text or S texts, which are cleaned like captions in training.
            owners: index of each text's image.
        """
        self.require("match")
        self.check_tokens(image_embeds)
        texts = arguments.texts_of(texts)
        index = arguments.owner_index(owners, len(texts), len(image_embeds), self.device)
        if not texts:
            return torch.empty(0)
        text = self._captions(texts).with_first_token(self.med.config.text.special.enc)
        return self.med.match(text, image_embeds, index).float().softmax(-1)[:, 1].cpu()

    @torch.no_grad()
    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Project image tokens [I, N, D] to L2-normalised features, fp32 [I, E] on the CPU."""
        self.require("embed")
        self.check_tokens(image_embeds)
        return self.med.project_image(image_embeds).cpu()

    @torch.no_grad()
    def text_features(self, texts: str | Sequence[str]) -> Tensor:
        """Encode one text or several to L2-normalised features, fp32 [S, E] on the CPU."""
        self.require("embed")
        texts = arguments.texts_of(texts)
        if not texts:
            return torch.empty(0, self.med.config.embed_dim)
        return self.features_of(self._captions(texts))

    @torch.no_grad()
    def features_of(self, text: PackedText) -> Tensor:
        """Encode packed texts that begin with [CLS]; see `text_features`."""
        return self.med.project_text(self.med.encode_text(text)).cpu()

    def _captions(self, texts: Sequence[str]) -> PackedText:
        """Clean texts like captions in training, and pack their tokens."""
        return self._packed([clean_caption(text) for text in texts])

    def _packed(self, texts: Sequence[str]) -> PackedText:
        """Pack the tokens of cleaned texts. The first token is [CLS]."""
        return PackedText.from_lists(self.tokenized(texts)["input_ids"], self.device)

    def tokenized(self, texts: str | Sequence[str]) -> BatchEncoding:
        """Tokenize cleaned texts with [CLS] and [SEP], cut to the checkpoint's maximum length."""
        texts = arguments.texts_of(texts)
        return self.tokenizer(texts, truncation=True, max_length=self.text_tokens)

    def check_tokens(self, image_embeds: Tensor) -> None:
        """Raise ValueError for tensors that `image_embeds` cannot have returned."""
        vision = self.network.vision
        arguments.check_tokens(image_embeds, vision.embed_dim, vision.patch_embed.proj.weight)

    def serves(self, use: Use) -> bool:
        """Whether the checkpoint supports a use."""
        return self.head in _HEADS[use] and (use != "match" or self.is_match_trained)

    def require(self, use: Use) -> None:
        """Raise ValueError if the checkpoint does not support a use."""
        if use == "match" and not self.is_match_trained:
            raise ValueError(
                f"{self.origin} was trained with objective.itm: none, so its matching head has its "
                "initial weights; take a checkpoint that was trained with ITM"
            )
        require_head(self.origin, self.head, use)


def require_head(origin: str, head: Head, use: Use) -> None:
    """Raise ValueError if checkpoints of a head do not support a use."""
    if head not in _HEADS[use]:
        raise ValueError(
            f"{origin} is a {head} checkpoint; {use} takes one of: {', '.join(_HEADS[use])}"
        )


def draws_of(ids: str | Sequence[str], seed: int, length: int) -> Tensor:
    """Draw the random numbers of nucleus sampling, fp32 [len(ids), length].

    Each row depends only on the seed and its id, which may be a path that is not UTF-8. A single
    str counts as one id.
    """
    rows = [np.empty((0, length), np.float32)]
    for name in arguments.texts_of(ids, "ids"):
        digest = xxhash.xxh3_64_intdigest(name.encode(errors="surrogateescape"))
        rows.append(np.random.default_rng((seed, digest)).random((1, length), np.float32))
    return torch.from_numpy(np.concatenate(rows))
