"""Fine-tuning for visual question answering.

Legend: B questions with an image each, A unique answers to them, P predicted tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from blip_scale.data.captions import clean_question
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.loading.micro_batches import Batch, CaptionInput
from blip_scale.data.tokenizer import pack_captions
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.engine.transfers import to_device
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.errors import RefusedInput
from blip_scale.evaluation import captions_and_pairs
from blip_scale.evaluation.answers import MAX_WORDS, answers_of, panels_of
from blip_scale.evaluation.metrics.answers import vqa_accuracy
from blip_scale.inference.inputs import packed_text, to_model_input
from blip_scale.model.flops import TextWork, fine_tuning_flops, head_flops
from blip_scale.model.packing import PackedText
from blip_scale.model.vqa import VQA
from blip_scale.objectives.answers import answer_loss, sequence_losses
from blip_scale.tasks import networks
from blip_scale.tasks.base import TrainingTask

VISUAL_GENOME_WEIGHT = 0.2
"""Weight of a Visual Genome question, which only one person answered (published)."""


class VQANetwork(nn.Module):
    """The VQA network and its loss. A forward is one micro-step, without side effects."""

    def __init__(self, med: VQA, label_smoothing: float) -> None:
        super().__init__()
        self.med = med
        self.label_smoothing = label_smoothing

    def forward(
        self,
        images: Tensor,
        questions: PackedText,
        answers: PackedText,
        owners_A: Tensor,
        weights_A: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the weighted loss of all answers.

        Args:
            images: [B, 3, H, W] normalised, in the dtype of the weights.
            questions: B texts. The first token is [CLS].
            answers: A texts. The first token is [CLS].
            owners_A: int64, index of each answer's question.
            weights_A: fp32, weight of each answer.
        """
        med = self.med
        special = med.config.text.special
        every = torch.arange(len(images), device=images.device)
        states = med.encode_questions(
            questions.with_first_token(special.enc), med.encode_image(images), every
        )
        inputs, targets_P = answers.with_first_token(special.dec).split_targets()
        logits_PV = med.decode(inputs, states, questions.segments, owners_A)
        losses_A = sequence_losses(
            logits_PV,
            targets_P,
            inputs.segments.sequence_of(len(targets_P)),
            len(owners_A),
            self.label_smoothing,
        )
        loss = answer_loss(losses_A, weights_A, len(images))
        return {"loss/total": loss, "loss/lm": loss.detach()}


def answer_weights(annotation: dict[str, Any]) -> dict[str, float]:
    """Weigh each answer by the share of people who gave it, times 0.2 for Visual Genome."""
    answers = annotation["answers"]
    whole = VISUAL_GENOME_WEIGHT if annotation.get("dataset") == "vg" else 1.0
    return {answer: whole * n / len(answers) for answer, n in Counter(answers).items()}


class VisualQuestionAnswering(TrainingTask):
    """The VQA task; implements `engine.task.Task`."""

    head = "vqa"
    _sizes = (1, 1, 1)
    """Number of tokens of the last micro-batch's questions and answers, and number of answers."""

    def text_input(self) -> CaptionInput:
        """Return the settings that turn questions into tokens."""
        limit = self.recipe.model.text.max_tokens
        return CaptionInput(
            self.tokenizer, limit, self.recipe.model.text.max_words or MAX_WORDS, clean_question
        )

    def build_network(self) -> VQANetwork:
        """Build the encoder and decoder, with unset weights."""
        return VQANetwork(self.limited(VQA(self.config)), self.recipe.objective.label_smoothing)

    def inputs(self, batch: Batch, progress: Progress) -> tuple[Any, ...]:
        """Return images, questions, answers, and each answer's question and weight.

        Raises:
            RefusedInput: a question has no answers.
        """
        for number, name in enumerate(batch.ids):
            if not batch.annotations or "answers" not in batch.annotations[number]:
                raise RefusedInput(
                    f"{name} of the stream {batch.streams[number]!r} has no answers to "
                    f"{batch.captions[number]!r}: train on a set made of a list with answers"
                )
        weights = [answer_weights(annotation) for annotation in batch.annotations]
        texts = [answer for shares_of in weights for answer in shares_of]
        packed = pack_captions(self.tokenizer, texts, self.config.text.max_positions)
        answers = packed_text(packed, self.device)
        owners = [number for number, shares_of in enumerate(weights) for _ in shares_of]
        shares = [share for shares_of in weights for share in shares_of.values()]
        images, questions = to_model_input(batch, self.device, self.dtype)
        answered = len(packed.token_ids) - len(texts)
        self._sizes = len(batch.token_ids), answered, len(texts)
        return (
            images,
            questions,
            answers,
            to_device(owners, self.device, torch.int64),
            to_device(shares, self.device, torch.float32),
        )

    def flops_per_step(self) -> float:
        """Estimate the FLOPs of one optimizer step on this rank from the last micro-batch."""
        pairs, width = self.batch_size, self.config.text.width
        asked, answered, answers = self._sizes
        image_tokens, image_width = networks.image_shape(self.config)
        works = [
            TextWork(pairs, asked, pairs, pairs * image_tokens, image_width),
            TextWork(answers, answered, pairs, asked, width),
        ]
        flops = fine_tuning_flops(self.config, pairs, works) + head_flops(self.config, answered)
        return self.accumulation * flops

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Compute the accuracy on all held-out sets with answers. The score is the first set's."""
        vqa = self.whole(engine, lambda: self.limited(VQA(self.config)))
        evaluation = Evaluation()
        for name, pairs in self.heldout_sets():
            answers = answers_of(vqa, pairs, self.recipe, self.tokenizer)
            scalars = accuracy(answers, pairs)
            shown = captions_and_pairs.shown_images(len(pairs), self.recipe)
            panels, entries = panels_of(name, pairs, shown, answers)
            score = scalars.get("accuracy")
            evaluation = evaluation.with_set(name, scalars, score, panels, entries)
        return evaluation


def accuracy(answers: list[list[str]], pairs: HeldoutPairs) -> dict[str, float]:
    """Compute official VQA accuracy and the number of questions that have answers; else return {}.

    Args:
        answers: one answer to each question of each image.
        pairs: the held-out set.
    """
    scores = []
    for answers_of_image, notes in zip(answers, pairs.annotations, strict=True):
        for answer, annotation in zip(answers_of_image, notes, strict=True):
            if "answers" in annotation:
                scores.append(vqa_accuracy(answer, annotation["answers"]))
    if not scores:
        return {}
    return {"accuracy": sum(scores) / len(scores), "questions": float(len(scores))}
