"""BLIP for visual question answering: a question encoder and an answer decoder.

The encoder is MED's image-grounded text encoder. The decoder's cross-attention reads the states of
all question tokens, but not the image. Encoder and decoder share no weights (Li et al. 2022,
figure 5a).

Shapes: B images and questions, N image tokens, D width, T packed tokens, A answers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from blip_scale.model.attention import Segments
from blip_scale.model.med import LMHead, MEDConfig
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass
from blip_scale.model.text import TextStack
from blip_scale.model.vision import build_vision


class VQA(nn.Module):
    """Network of VQA: a ViT, a question encoder and an answer decoder."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.config = config
        kernel, checkpointing = config.kernel, config.gradient_checkpointing
        self.vision = build_vision(config.vision, kernel, checkpointing)
        self.text_encoder = TextStack(
            config.text, self.vision.embed_dim, kernel, checkpointing, "encoder"
        )
        self.text_decoder = TextStack(
            config.text, config.text.width, kernel, checkpointing, "decoder"
        )
        self.lm_head = LMHead(config.text, self.text_decoder.embeddings.word.weight)

    @property
    def text(self) -> TextStack:
        """The stack that holds the decoder."""
        return self.text_decoder

    def encode_image(self, images: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to image_embeds [B, N, D]."""
        return self.vision(images)

    def encode_questions(
        self, questions: PackedText, image_embeds: Tensor, image_index: Tensor
    ) -> Tensor:
        """Return the states [T, D] of all tokens of the questions.

        Args:
            questions: sequences whose first token is [ENC].
            image_embeds: [B, N, image width].
            image_index: int64, index of each question's image.
        """
        images, tokens, _ = image_embeds.shape
        packed = self.config.takes_packed(image_embeds)
        index = ImageIndex(images, tokens, encoder=image_index)
        plan = plan_pass(questions, None, index, packed)
        plan = replace(plan, read_rows=None, read_cross=plan.cross)  # read the states of all tokens
        return self.text_encoder(plan, image_embeds)

    def decode(
        self, answers: PackedText, states_TD: Tensor, questions: Segments, question_index: Tensor
    ) -> Tensor:
        """Compute next-token logits [T of the answers, V] at every token of the answers.

        Args:
            answers: A sequences whose first token is [DEC].
            states_TD: from `encode_questions`.
            questions: boundaries of the states of each question.
            question_index: [A] int64, index of each answer's question.
        """
        packed = self.config.takes_packed(states_TD)
        seen = ImageIndex(questions.count, len(states_TD), decoder=question_index, keys=questions)
        plan = plan_pass(None, answers, seen, packed)
        return self.lm_head(self.text_decoder(plan, states_TD[None]))
