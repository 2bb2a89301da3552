"""Answers to questions about held-out images: written by beam search, or chosen from a list.

Legend: Q questions, C candidates, K candidates scored whole, V vocabulary.
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
"""Maximum number of words of a question (published)."""


@dataclass(frozen=True)
class Candidates:
    """Answers to choose from."""

    texts: list[str]
    tokens: PackedText
    """Tokens of the answers, with first token [DEC]."""


def read_answer_list(file: Path) -> list[str]:
    """The list of answers in a JSON file.

    Raises:
        FileNotFoundError: the file doesn't exist.
        ValueError: it holds no list of texts.
    """
    if not file.is_file():
        raise FileNotFoundError(f"evaluation.answer_list: {file}: no such file")
    try:
        answers = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"evaluation.answer_list: {file} is not JSON: {error}") from error
    is_list = isinstance(answers, list) and answers
    if not is_list or not all(isinstance(answer, str) and answer for answer in answers):
        raise ValueError(f"evaluation.answer_list: {file} holds no list of answers")
    return answers


@torch.no_grad()
def answers_of(
    vqa: VQA, pairs: HeldoutPairs, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> list[list[str]]:
    """An answer to each question of each image. The ranks share the work."""
    candidates = None
    if recipe.evaluation.answer_list is not None:
        file = Path(expand(recipe.evaluation.answer_list, "evaluation.answer_list"))
        candidates = tokenized(read_answer_list(file), vqa, tokenizer)
    answers: list[list[str]] = []
    for indices in my_batches(len(pairs), recipe.evaluation.batch_size):
        questions = [pairs.captions[index] for index in indices]
        pixels = to_pixels(pairs.images(indices), vqa)
        answers += answer(vqa, pixels, questions, recipe, tokenizer, candidates)
    return list(chain.from_iterable(collectives.all_gather_objects(answers)))


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
    """Answers to some questions about each image.

    Args:
        vqa: network in evaluation mode.
        images: [I, 3, H, W] normalised.
        questions: cleaned questions about each image.
        recipe: the recipe, for the settings of the beam search or the ranking.
        tokenizer: the network's tokenizer.
        candidates: answers to choose from. None: beam search writes the answers.
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
        answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    else:
        top_k, smoothing = recipe.evaluation.rerank_top_k, recipe.objective.label_smoothing
        best_Q = rank(vqa, states, text.segments, candidates.tokens, top_k, smoothing)
        answers = [candidates.texts[number] for number in best_Q.tolist()]
    each = iter(answers)
    return [[next(each) for _ in asked] for asked in questions]


def rank(
    vqa: VQA,
    states: Tensor,
    questions: Segments,
    candidates: PackedText,
    top_k: int,
    label_smoothing: float,
) -> Tensor:
    """Number of the best candidate for each question, [Q] int64.

    Only the `top_k` candidates with the likeliest first word piece are scored whole. As published,
    a score is the sum of the tokens' label-smoothed log-likelihoods, not divided by the length.

    Args:
        vqa: network in evaluation mode.
        states: states of the questions' tokens.
        questions: where the states of each question lie.
        candidates: C answers, first token [DEC].
        top_k: number of candidates scored whole.
        label_smoothing: label smoothing of the likelihoods.
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
    name: str, pairs: HeldoutPairs, images: Sequence[int], answers: Sequence[Sequence[str]]
) -> tuple[list[Panel], list[dict[str, str]]]:
    """Pictures with their first question and its answer, also as entries of summary.json."""
    texts = [f"{pairs.captions[index][0]} {answers[index][0]}" for index in images]
    truths = [_usual(pairs.annotations[index][0]) for index in images]
    return panels_with(name, pairs, images, texts, truths)


def _usual(annotation: dict[str, Any]) -> str:
    """The answer that most people gave; "" if there is none."""
    answers = annotation.get("answers") or [""]
    return max(answers, key=answers.count)


def submission(pairs: HeldoutPairs, answers: Sequence[Sequence[str]]) -> list[dict[str, int | str]]:
    """Entries for the VQA server: question_id and answer of every question.

    Raises:
        ValueError: see `question_ids`.
    """
    ids, texts = question_ids(pairs), chain.from_iterable(answers)
    return [{"question_id": id_, "answer": text} for id_, text in zip(ids, texts, strict=True)]


def question_ids(pairs: HeldoutPairs) -> list[int | str]:
    """The id of every question of every image.

    Raises:
        ValueError: a question has no id, or two questions have the same id.
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
