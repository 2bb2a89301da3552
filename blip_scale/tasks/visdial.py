"""Fine-tuning for visual dialog: rank the true answer first among the candidates.

BLIP published no code for this task. According to the paper, the dialog encoder learns by ITM
whether an answer is true, given image, caption and history. Here, each question is paired with its
true answer and with `objective.false_answers` other candidates.

Legend: B questions, S dialogs (each a question with one answer), C candidates of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from blip_scale.config.recipe import Recipe
from blip_scale.data.captions import clean_caption, clean_question
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.loading.micro_batches import Batch, CaptionInput
from blip_scale.data.tokenizer import pack_captions
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.errors import RefusedInput
from blip_scale.evaluation import captions_and_pairs
from blip_scale.evaluation.metrics.ranking import ndcg, ranking_figures, ranks_of
from blip_scale.inference.inputs import packed_text, to_model_input, to_pixels
from blip_scale.model.flops import TextWork, fine_tuning_flops
from blip_scale.model.packing import PackedText
from blip_scale.model.visdial import VisDial
from blip_scale.tasks import networks
from blip_scale.tasks.base import TrainingTask, own_seed

MAX_WORDS = 50
"""Maximum number of words of a question."""


class VisDialNetwork(nn.Module):
    """The VisDial network and its loss. A forward is one micro-step, without side effects."""

    def __init__(self, med: VisDial) -> None:
        super().__init__()
        self.med = med

    def forward(
        self,
        images: Tensor,
        captions: PackedText,
        dialogs: PackedText,
        owners_S: Tensor,
        labels_S: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the matching loss: is the last answer of each dialog true?

        Args:
            images: [B, 3, H, W] normalised, in the dtype of the weights.
            captions: B texts. The first token is [CLS].
            dialogs: S texts. The first token is [CLS].
            owners_S: int64, index of each dialog's image.
            labels_S: int64, 1 if the answer is true.
        """
        context = self.med.encode_context(images, captions)
        text = dialogs.with_first_token(self.med.config.text.special.enc)
        logits = self.med.match(text, context, owners_S).float()
        loss = F.cross_entropy(logits, labels_S)
        best = logits.detach()[:, 1].unflatten(0, (len(images), -1)).argmax(1)
        right = labels_S.unflatten(0, (len(images), -1)).gather(1, best[:, None]).float().mean()
        return {"loss/total": loss, "visdial/true_first": right}


class VisualDialog(TrainingTask):
    """The VisDial task; implements `engine.task.Task`."""

    head = "visdial"
    _sizes = (1, 1)
    """Number of tokens of the last micro-batch's captions and dialogs."""

    def text_input(self) -> CaptionInput:
        """Return the settings that turn questions into tokens. `inputs` builds the dialogs."""
        limit = self.recipe.model.text.max_tokens
        return CaptionInput(
            self.tokenizer, limit, self.recipe.model.text.max_words or MAX_WORDS, clean_question
        )

    def build_network(self) -> VisDialNetwork:
        """Build the encoder of image, caption and dialog, with unset weights."""
        return VisDialNetwork(self.limited(VisDial(self.config)))

    def inputs(self, batch: Batch, progress: Progress) -> tuple[Any, ...]:
        """Return images, captions, dialogs with candidate answers, and dialogs' images and labels.

        Raises:
            RefusedInput: a sample is not a round of a dialog.
            RefusedInput: a sample is no round of a dialog.
        """
        if not batch.annotations or "candidates" not in batch.annotations[0]:
            raise RefusedInput(
                f"stream {batch.streams[0]!r}: {batch.ids[0]} is not a dialog with candidates: "
                "make the set with `python tools/prepare_data.py visdial`"
            )
        generator = torch.Generator().manual_seed(own_seed())
        false_answers = self.recipe.objective.false_answers
        chosen = [some_candidates(x, false_answers, generator) for x in batch.annotations]
        rounds = list(zip(batch.captions, batch.annotations, strict=True))
        text = Dialogs(self.tokenizer, self.recipe.model.text.max_tokens, self.device)
        dialogs = text.of(rounds, chosen)
        captions = text.captions([annotation["caption"] for annotation in batch.annotations])
        each = len(chosen[0])
        images, _ = to_model_input(batch, self.device, self.dtype)
        owners = torch.arange(len(images), device=self.device).repeat_interleave(each)
        labels = torch.zeros(len(images), each, dtype=torch.int64, device=self.device)
        labels[:, 0] = 1
        self._sizes = len(captions.token_ids), len(dialogs.token_ids)
        return images, captions, dialogs, owners, labels.flatten()

    def flops_per_step(self) -> float:
        """Estimate the FLOPs of one optimizer step on this rank from the last micro-batch.

        The captions' pass has no cross-attention.
        """
        pairs, dialogs = self.batch_size, 1 + self.recipe.objective.false_answers
        words, tokens = self._sizes
        image_tokens, width = networks.image_shape(self.config)
        seen = pairs * image_tokens + words
        works = [
            TextWork(pairs, words, pairs, 0, width, cross_attentions=0),
            TextWork(pairs * dialogs, tokens, pairs, seen, width),
        ]
        return self.accumulation * fine_tuning_flops(self.config, pairs, works)

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Rank the true answers on all held-out sets. The score is the MRR on the first set."""
        network = self.whole(engine, lambda: self.limited(VisDial(self.config)))
        evaluation = Evaluation()
        for name, pairs in self.heldout_sets():
            scores = scores_of(network, pairs, self.recipe, self.tokenizer)
            figures = dialog_figures(scores, pairs)
            evaluation = evaluation.with_set(name, figures, figures["mrr"])
        return evaluation


Round = tuple[str, dict[str, Any]]
"""A question and its annotation."""


class Dialogs:
    """Tokenizer of rounds: history, question and answer.

    If a round is too long, the start of its history is cut off.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, max_tokens: int, device: torch.device
    ) -> None:
        self._tokenizer, self._max_tokens, self._device = tokenizer, max_tokens, device

    def captions(self, captions: Sequence[str]) -> PackedText:
        """Tokenize captions. The first token is [CLS]."""
        texts = [clean_caption(caption) for caption in captions]
        return packed_text(pack_captions(self._tokenizer, texts, self._max_tokens), self._device)

    def of(self, rounds: Sequence[Round], chosen: Sequence[Sequence[int]]) -> PackedText:
        """Build one text for each chosen candidate of each round. The first token is [CLS]."""
        rows = []
        for (question, annotation), numbers in zip(rounds, chosen, strict=True):
            spoken = [text for turn in annotation["history"] for text in turn]
            before = self._ids(" ".join(clean_question(text) for text in spoken))
            asked = self._ids(question)
            for number in numbers:
                answer = self._ids(clean_question(annotation["candidates"][number]))
                words = (before + asked + answer)[-(self._max_tokens - 2) :]
                rows.append([self._tokenizer.cls_token_id, *words, self._tokenizer.sep_token_id])
        return PackedText.from_lists(rows, self._device)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def some_candidates(
    annotation: dict[str, Any], false_answers: int, generator: torch.Generator
) -> list[int]:
    """Return the index of the true candidate, followed by `false_answers` drawn others.

    Candidates repeat only if the round has too few of them.

    Raises:
        ValueError: the round has no other candidate.
    """
    others = [n for n in range(len(annotation["candidates"])) if n != annotation["answer"]]
    if not others:
        raise ValueError("a round of a dialog has no candidate but the true one")
    order = torch.randperm(len(others), generator=generator).tolist()
    repeated = (order * -(-false_answers // len(order)))[:false_answers]
    return [annotation["answer"], *(others[place] for place in repeated)]


@torch.no_grad()
def scores_of(
    network: VisDial, pairs: HeldoutPairs, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> list[list[list[float]]]:
    """Score the candidates of each round of each image: logit of true minus logit of false.

    The images are divided among the ranks.
    """
    special, device = network.config.text.special, next(network.parameters()).device
    text = Dialogs(tokenizer, recipe.model.text.max_tokens, device)
    scores: list[list[list[float]]] = []
    for indices in captions_and_pairs.my_batches(len(pairs), 1):
        (index,) = indices
        rounds = list(zip(pairs.captions[index], pairs.annotations[index], strict=True))
        if any("candidates" not in annotation for _, annotation in rounds):
            raise ValueError(f"{pairs.name}: {pairs.ids[index]} is not a dialog with candidates")
        captions = text.captions([rounds[0][1]["caption"]])
        pixels = to_pixels(pairs.images(indices), network)
        context = network.encode_context(pixels, captions)
        scores_of_rounds: list[list[float]] = []
        for dialog_round in rounds:
            count = len(dialog_round[1]["candidates"])
            scores_of_round: list[float] = []
            for begin in range(0, count, recipe.evaluation.batch_size):
                some = list(range(begin, min(count, begin + recipe.evaluation.batch_size)))
                dialogs = text.of([dialog_round], [some]).with_first_token(special.enc)
                owner = torch.zeros(len(some), dtype=torch.int64, device=device)
                logits = network.match(dialogs, context, owner).float()
                scores_of_round += (logits[:, 1] - logits[:, 0]).tolist()
            scores_of_rounds.append(scores_of_round)
        scores.append(scores_of_rounds)
    return list(chain.from_iterable(collectives.all_gather_objects(scores)))


def dialog_figures(
    scores: Sequence[Sequence[Sequence[float]]], pairs: HeldoutPairs
) -> dict[str, float]:
    """Compute MRR, recalls and mean rank of all rounds, and NDCG of those with `relevance`."""
    ranks, gains = [], []
    for notes, rounds in zip(pairs.annotations, scores, strict=True):
        for annotation, row in zip(notes, rounds, strict=True):
            ranks.append(ranks_of(torch.tensor([row]), torch.tensor([annotation["answer"]])))
            if any(annotation.get("relevance", [])):
                gains.append(ndcg(row, annotation["relevance"]))
    figures = ranking_figures(torch.cat(ranks))
    if gains:
        figures |= {"ndcg": sum(gains) / len(gains)}
    return figures | {"questions": float(len(ranks))}
