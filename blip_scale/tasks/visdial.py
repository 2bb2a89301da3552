"""Fine-tuning for visual dialog: the true answer among the candidates.

No code was published; the paper says that the dialog encoder learns by image-text matching whether
an answer is true, given image, caption and history. Here each question is seen with its true answer
and as many others of its candidates as `objective.false_answers` says.

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
"""Of a question."""


class VisDialNetwork(nn.Module):
    """One forward is one micro-step, without any side effect."""

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
        """Matching loss: is the last answer of the dialog true?

        Args:
            images: [B, 3, H, W] normalised, in the type of the weights.
            captions: B texts, first token [CLS].
            dialogs: S texts, first token [CLS].
            owners_S: int64, the image of each dialog.
            labels_S: int64, 1 where the answer is true.
        """
        context = self.med.encode_context(images, captions)
        text = dialogs.with_first_token(self.med.config.text.special.enc)
        logits = self.med.match(text, context, owners_S).float()
        loss = F.cross_entropy(logits, labels_S)
        best = logits.detach()[:, 1].unflatten(0, (len(images), -1)).argmax(1)
        right = labels_S.unflatten(0, (len(images), -1)).gather(1, best[:, None]).float().mean()
        return {"loss/total": loss, "visdial/true_first": right}


class VisualDialog(TrainingTask):
    """The VisDial task: what `engine.task.Task` asks for."""

    head = "visdial"
    _sizes = (1, 1)
    """Tokens of the last micro-batch's captions and dialogs."""

    def text_input(self) -> CaptionInput:
        """Questions; the network reads the dialogs that `losses` makes of them."""
        limit = self.recipe.model.text.max_tokens
        return CaptionInput(self.tokenizer, limit, MAX_WORDS, clean=clean_question)

    def build_network(self) -> VisDialNetwork:
        """Encoder of image, caption and dialog, weights not filled."""
        return VisDialNetwork(VisDial(self.config))

    def inputs(self, batch: Batch, progress: Progress) -> tuple[Any, ...]:
        """Images, captions, dialogs with candidate answers, their images and labels.

        Raises:
            RefusedInput: a sample that isn't a round of a dialog.
        """
        if not batch.annotations or "candidates" not in batch.annotations[0]:
            raise RefusedInput(
                f"stream {batch.streams[0]!r}: {batch.ids[0]} is no dialog with candidates: make "
                "the set with `python tools/prepare_data.py visdial`"
            )
        generator = torch.Generator().manual_seed(own_seed())
        chosen = [
            some_candidates(annotation, self.recipe.objective.false_answers, generator)
            for annotation in batch.annotations
        ]
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
        """Of the micro-batches of one optimizer step on this rank, counted from the last one; the
        captions' pass is taken as one with cross-attention to nothing."""
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
        """Ranks of the true answers on every held-out set; MRR of the first is the score."""
        network = self.whole(engine, lambda: VisDial(self.config))
        found = Evaluation()
        for name, pairs in self.heldout_sets():
            scores = scores_of(network, pairs, self.recipe, self.tokenizer)
            figures = dialog_figures(scores, pairs)
            found = found.with_set(name, figures, figures["mrr"])
        return found


Round = tuple[str, dict[str, Any]]
"""A question and its annotation."""


class Dialogs:
    """How rounds become tokens: history, question and an answer, the history cut from its start
    where all of it is too long."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, max_tokens: int, device: torch.device
    ) -> None:
        self._tokenizer, self._max_tokens, self._device = tokenizer, max_tokens, device

    def captions(self, captions: Sequence[str]) -> PackedText:
        """First token [CLS]."""
        texts = [clean_caption(caption) for caption in captions]
        return packed_text(pack_captions(self._tokenizer, texts, self._max_tokens), self._device)

    def of(self, rounds: Sequence[Round], chosen: Sequence[Sequence[int]]) -> PackedText:
        """The chosen candidates of each round, one text each, first token [CLS]."""
        rows = []
        for (question, annotation), numbers in zip(rounds, chosen, strict=True):
            spoken = [text for turn in annotation["history"] for text in turn]
            before = self._ids(" ".join(clean_question(text) for text in spoken))
            asked = self._ids(question)
            for number in numbers:
                answer = self._ids(clean_question(annotation["candidates"][number]))
                said = (before + asked + answer)[-(self._max_tokens - 2) :]
                rows.append([self._tokenizer.cls_token_id, *said, self._tokenizer.sep_token_id])
        return PackedText.from_lists(rows, self._device)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def some_candidates(
    annotation: dict[str, Any], false_answers: int, generator: torch.Generator
) -> list[int]:
    """The true candidate and so many others, drawn without replacement as long as there are
    enough."""
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
    """The matching logit (true less false) of each candidate of each round of each image; the
    ranks share the images."""
    special, device = network.config.text.special, next(network.parameters()).device
    text = Dialogs(tokenizer, recipe.model.text.max_tokens, device)
    mine: list[list[list[float]]] = []
    for indices in captions_and_pairs.my_batches(len(pairs), 1):
        (index,) = indices
        rounds = list(zip(pairs.captions[index], pairs.annotations[index], strict=True))
        if any("candidates" not in annotation for _, annotation in rounds):
            raise ValueError(f"{pairs.name}: {pairs.ids[index]} is no dialog with candidates")
        captions = text.captions([rounds[0][1]["caption"]])
        pixels = to_pixels(pairs.images(indices), network)
        context = network.encode_context(pixels, captions)
        found: list[list[float]] = []
        for one in rounds:
            count = len(one[1]["candidates"])
            scores: list[float] = []
            for begin in range(0, count, recipe.evaluation.batch_size):
                some = list(range(begin, min(count, begin + recipe.evaluation.batch_size)))
                dialogs = text.of([one], [some]).with_first_token(special.enc)
                owner = torch.zeros(len(some), dtype=torch.int64, device=device)
                logits = network.match(dialogs, context, owner).float()
                scores += (logits[:, 1] - logits[:, 0]).tolist()
            found.append(scores)
        mine.append(found)
    return list(chain.from_iterable(collectives.all_gather_objects(mine)))


def dialog_figures(
    scores: Sequence[Sequence[Sequence[float]]], pairs: HeldoutPairs
) -> dict[str, float]:
    """MRR, recalls and mean rank of all rounds; NDCG of those that people judged (`relevance`)."""
    ranks, gains = [], []
    for known, rounds in zip(pairs.annotations, scores, strict=True):
        for annotation, row in zip(known, rounds, strict=True):
            ranks.append(ranks_of(torch.tensor([row]), torch.tensor([annotation["answer"]])))
            if any(annotation.get("relevance", [])):
                gains.append(ndcg(row, annotation["relevance"]))
    found = ranking_figures(torch.cat(ranks))
    if gains:
        found |= {"ndcg": sum(gains) / len(gains)}
    return found | {"questions": float(len(ranks))}
