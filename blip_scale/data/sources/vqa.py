"""Read questions about images: BLIP's lists for VQA v2 and Visual Genome.

They are JSON lists of {question, answer, image, dataset, question_id}. `answer` is a list with the
answer of each annotator in vqa_train.json and vqa_val.json, and one string in vg_qa.json.
vqa_test.json has no answers; its items need their `question_id`. A record is an image with all its
questions. The annotation of each question holds `answers`, `dataset` and `question_id`, if present.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.sources.annotations import json_files, pair_of_item
from blip_scale.data.sources.json_lists import JsonList, pairs_in_chunks
from blip_scale.storage.locations import basename


def chunks(source: Source) -> Iterator[Chunk]:
    """Return the chunks of all lists at the source."""
    if not source.caption_key:
        source = replace(source, caption_key="question")
    lists = []
    for location in json_files(source.location):
        json_list = JsonList.open(location, "{question, answer, image}")
        items = (item for _, _, item in json_list.read())
        answered = any(isinstance(item, Mapping) and "answer" in item for item in items)
        lists.append((json_list, partial(_pair, source, location, answered)))
    return pairs_in_chunks(source, lists)


def _pair(source: Source, location: str, answered: bool, number: int, item: Any) -> Found:
    pair = pair_of_item(source, location, number, item)
    if isinstance(pair, Reject):
        return pair
    try:
        annotation = _annotation(item, answered)
    except ValueError as error:
        place = f"{basename(location)}:{number}"
        return Reject(place, Reason.BAD_ANNOTATION, str(error), captions=1)
    assert isinstance(pair, RawPair)
    captions = pair.captions if isinstance(pair.captions, list) else [pair.captions]
    return replace(pair, annotations=[annotation] * len(captions), is_question=True)


def _annotation(item: Mapping[str, Any], answered: bool) -> dict[str, Any]:
    """Build the annotation of a question.

    Raises:
        ValueError: the item is usable for neither training nor a submission.
    """
    annotation = {
        name: item[name] for name in ("dataset", "question_id") if item.get(name) is not None
    }
    if not answered:
        if "question_id" not in annotation:
            raise ValueError("neither answer nor question_id")
        return annotation
    answers = item.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise ValueError("no answer")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("an answer that is not text")
    return {"answers": answers, **annotation}
