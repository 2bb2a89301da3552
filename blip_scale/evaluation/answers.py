"""Answers to questions about held-out images: written by beam search, or chosen from a list.

Legend: Q questions, C candidates, K of them scored whole, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip_scale.config.recipe import Recipe
from blip_scale.config.settings import expand
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.tokenizer import pack_captions
from blip_scale.engine import collectives
from blip_scale.engine.watching.pictures import Panel
from blip_scale.evaluation.captions_and_pairs import my_batches
from blip_scale.evaluation.captions_and_pairs import panels_of as panels_with
from blip_scale.inference.inputs import packed_text, to_pixels
from blip_scale.model.attention import Segments
from blip_scale.model.generation import BeamSettings, caption_beam
from blip_scale.model.packing import PackedText
from blip_scale.model.vqa import VQA
from blip_scale.objectives.answers import sequence_losses
from blip_scale.storage.untrusted import parse_json

MAX_WORDS = 50
"""Of a question (published)."""


@dataclass(frozen=True)
class Candidates:
    """The answers to choose from."""

    texts: list[str]
    tokens: PackedText
    """First token [DEC]."""


def read_answer_list(file: Path) -> list[str]:
    """The list of answers in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it isn't a list of texts.
    """
    if not file.is_file():
        raise FileNotFoundError(f"evaluation.answer_list: {file}: no such file")
    try:
        answers = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"evaluation.answer_list: {file} is no JSON: {error}") from error
    is_list = isinstance(answers, list) and answers
    if not is_list or not all(isinstance(answer, str) and answer for answer in answers):
        raise ValueError(f"evaluation.answer_list: {file} holds no list of answers")
    return answers


@torch.no_grad()
def answers_of(
    vqa: VQA, pairs: HeldoutPairs, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> list[list[str]]:
    """An answer to each question of each image; the ranks share the work."""
    candidates = None
    if recipe.evaluation.answer_list is not None:
        file = Path(expand(recipe.evaluation.answer_list, "evaluation.answer_list"))
        candidates = tokenized(read_answer_list(file), vqa, tokenizer)
    mine: list[list[str]] = []
    for indices in my_batches(len(pairs), recipe.evaluation.batch_size):
        questions = [pairs.captions[index] for index in indices]
        pixels = to_pixels(pairs.images(indices), vqa)
        said = answer(vqa, pixels, questions, recipe, tokenizer, candidates)
        mine += said
    return list(chain.from_iterable(collectives.all_gather_objects(mine)))


def tokenized(answers: list[str], vqa: VQA, tokenizer: PreTrainedTokenizerFast) -> Candidates:
    """Candidates on the network's device."""
    packed = pack_captions(tokenizer, answers, vqa.config.text.max_positions)
    tokens = packed_text(packed, next(vqa.parameters()).device)
    return Candidates(answers, tokens.with_first_token(vqa.config.text.special.dec))


@torch.no_grad()
def answer(
    vqa: VQA,
    images: Tensor,
    questions: Sequence[Sequence[str]],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    candidates: Candidates | None = None,
) -> list[list[str]]:
    """Answers to some cleaned questions about each image.

    Args:
        vqa: in evaluation mode.
        images: [I, 3, H, W] normalised.
        candidates: None: beam search writes the answers.
    """
    special, device = vqa.config.text.special, images.device
    flat = list(chain.from_iterable(questions))
    owners = [image for image, asked in enumerate(questions) for _ in asked]
    packed = pack_captions(tokenizer, flat, recipe.model.text.max_tokens)
    text = packed_text(packed, device).with_first_token(special.enc)
    owners_Q = torch.tensor(owners, dtype=torch.int64, device=device)
    states = vqa.encode_questions(text, vqa.encode_image(images), owners_Q)
    if candidates is None:
        beam = BeamSettings(
            num_beams=recipe.evaluation.num_beams,
            max_length=recipe.evaluation.max_caption_tokens,
            min_length=recipe.evaluation.min_caption_tokens,
            scoring=recipe.evaluation.scoring,
        )
        written = caption_beam(vqa, states[None], [special.dec], beam, text.segments)
        said = tokenizer.batch_decode(written, skip_special_tokens=True)
    else:
        top_k, smoothing = recipe.evaluation.rerank_top_k, recipe.objective.label_smoothing
        best_Q = rank(vqa, states, text.segments, candidates.tokens, top_k, smoothing)
        said = [candidates.texts[number] for number in best_Q.tolist()]
    each = iter(said)
    return [[next(each) for _ in asked] for asked in questions]


def rank(
    vqa: VQA,
    states: Tensor,
    questions: Segments,
    candidates: PackedText,
    top_k: int,
    label_smoothing: float,
) -> Tensor:
    """The best candidate of each question, [Q] int64.

    The `top_k` candidates with the likeliest first word piece are scored by the sum over their
    tokens of the label-smoothed log-likelihood, which is not divided by their length (as
    published).

    Args:
        states: of the questions' tokens, which `questions` parts.
        candidates: C answers, first token [DEC].
    """
    count, device = questions.count, states.device
    every_Q = torch.arange(count, device=device)
    start = PackedText.from_lists([[vqa.config.text.special.dec]] * count, device)
    first_QV = vqa.decode(start, states, questions, every_Q).float().log_softmax(-1)
    first_pieces_C = candidates.token_ids[candidates.first_rows + 1]
    top_k = min(top_k, len(first_pieces_C))
    best_QK = first_QV[:, first_pieces_C].topk(top_k, dim=1).indices
    inputs, targets_P = candidates.select(best_QK.flatten()).split_targets()
    logits_PV = vqa.decode(inputs, states, questions, every_Q.repeat_interleave(top_k))
    losses = sequence_losses(
        logits_PV,
        targets_P,
        inputs.segments.sequence_of(len(targets_P)),
        count * top_k,
        label_smoothing,
    )
    chosen_Q1 = losses.unflatten(0, (count, top_k)).argmin(1, keepdim=True)
    return best_QK.gather(1, chosen_Q1).squeeze(1)


def panels_of(
    name: str, pairs: HeldoutPairs, images: Sequence[int], said: Sequence[Sequence[str]]
) -> tuple[list[Panel], list[dict[str, str]]]:
    """Pictures with their first question and what was answered, and the same as entries of
    summary.json."""
    questions = [pairs.captions[index][0] for index in images]
    answers = [f"{question} {said[i][0]}" for i, question in zip(images, questions, strict=True)]
    truths = [_usual(pairs.annotations[index][0]) for index in images]
    return panels_with(name, pairs, images, answers, truths)


def _usual(annotation: dict[str, Any]) -> str:
    """The answer that most people gave, "" where there is none."""
    answers = annotation.get("answers") or [""]
    return max(answers, key=answers.count)


def submission(pairs: HeldoutPairs, said: Sequence[Sequence[str]]) -> list[dict[str, int | str]]:
    """What the VQA server takes: question_id and answer of every question.

    Raises:
        ValueError: as `question_ids`.
    """
    ids = question_ids(pairs)
    return [
        {"question_id": number, "answer": text}
        for number, text in zip(ids, chain.from_iterable(said), strict=True)
    ]


def question_ids(pairs: HeldoutPairs) -> list[int | str]:
    """The id of every question of every image.

    Raises:
        ValueError: a question without an id, or two with the same.
    """
    ids: dict[str, int | str] = {}
    for name, asked in zip(pairs.ids, pairs.annotations, strict=True):
        for annotation in asked:
            if "question_id" not in annotation:
                raise ValueError(f"{pairs.name}: a question about {name} has no question_id")
            number = annotation["question_id"]
            if str(number) in ids:
                raise ValueError(f"{pairs.name}: two questions have the question_id {number}")
            ids[str(number)] = number
    return list(ids.values())
