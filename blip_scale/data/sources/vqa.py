"""Questions about images: the lists that BLIP publishes for VQA v2 and Visual Genome.

JSON lists of {question, answer, image, dataset, question_id}: `answer` is a list with a string of
each annotator in vqa_train.json and vqa_val.json, one string in vg_qa.json, and missing in
vqa_test.json, whose items need their `question_id`. A record is an image with all its questions;
the annotation of each holds `answers`, `dataset` and `question_id`, as far as they are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from blip_scale.data.conversion.lists import group_by_image, in_chunks
from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.sources.annotations import json_files, load_list, pair_of_item, read_items
from blip_scale.storage.locations import basename


def chunks(source: Source) -> Iterator[Chunk]:
    """All lists that `source` names together, cut into chunks."""
    if not source.caption_key:
        source = replace(source, caption_key="question")
    return in_chunks(group_by_image(_read_lists(source)), source.pairs_per_chunk)


def _read_lists(source: Source) -> Iterator[Found]:
    for location in json_files(source.location):
        items = load_list(location, "{question, answer, image}")
        answered = any(isinstance(item, Mapping) and "answer" in item for item in items)
        yield from read_items(location, items, partial(_pair, source, location, answered))


def _pair(source: Source, location: str, answered: bool, number: int, item: Any) -> Found:
    found = pair_of_item(source, location, number, item)
    if isinstance(found, Reject):
        return found
    try:
        annotation = _annotation(item, answered)
    except ValueError as error:
        place = f"{basename(location)}:{number}"
        return Reject(place, Reason.BAD_ANNOTATION, str(error), captions=1)
    assert isinstance(found, RawPair)
    captions = found.captions if isinstance(found.captions, list) else [found.captions]
    return replace(found, annotations=[annotation] * len(captions), is_question=True)


def _annotation(item: Mapping[str, Any], answered: bool) -> dict[str, Any]:
    """Raises ValueError for an item that can be neither learned nor answered."""
    found = {name: item[name] for name in ("dataset", "question_id") if item.get(name) is not None}
    if not answered:
        if "question_id" not in found:
            raise ValueError("neither answer nor question_id")
        return found
    answers = item.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise ValueError("no answer")
    if not all(isinstance(one, str) and one.strip() for one in answers):
        raise ValueError("an answer that is no text")
    return {"answers": answers, **found}
