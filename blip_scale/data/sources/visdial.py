"""Dialogs about images: visdial_1.0_train.json and visdial_1.0_val.json as published.

`data` holds `questions` and `answers`, lists of texts, and `dialogs`, which name them by number:
{image_id, caption, dialog: ten rounds of {question, answer, answer_options, gt_index}}. A record is
an image with the questions of its rounds; the annotation of each holds the image's `caption`, the
`history` (question and answer of each round before), 100 `candidates`, and `answer`, the number of
the true one. With --relevance also `relevance`, how well each candidate answers, where people were
asked (visdial_1.0_val_dense_annotations.json).

The images are those files below --images whose name ends in the number `image_id`
(COCO_train2014_000000378466.jpg, VisualDialog_val2018_000000185565.jpg).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from blip_scale.data.conversion.lists import in_chunks
from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.sources.annotations import load_json, load_list
from blip_scale.storage.locations import basename, list_folder, parent, stem

_LISTS = ("dialogs", "questions", "answers")

Relevance = dict[tuple[int, int], list[float]]
"""Of each candidate, by image and round (counted from 1)."""


def chunks(source: Source, relevance: str = "") -> Iterator[Chunk]:
    """Chunks of one annotation file. Raises ValueError for another format.

    `relevance` is a file with people's judgement of the candidates; "" without.
    """
    content = load_json(source.location)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict) or not all(isinstance(data.get(n), list) for n in _LISTS):
        raise ValueError(f"{source.location} is no VisDial file: data with {', '.join(_LISTS)}")
    judgements = _relevance(relevance) if relevance else {}
    files = _images(source.images or parent(source.location))
    return in_chunks(list(_dialogs(source, data, files, judgements)), source.pairs_per_chunk)


def _images(folder: str) -> dict[int, str]:
    """Files by the number at the end of their name."""
    found = {}
    for entry in list_folder(folder, deep=True):
        number = re.search(r"\d+$", stem(entry.name))
        if number:
            found[int(number[0])] = entry.location
    return found


def _relevance(location: str) -> Relevance:
    try:
        return {
            (item["image_id"], item["round_id"]): [float(x) for x in _relevances(item)]
            for item in load_list(location, "{image_id, round_id, gt_relevance}")
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{location}: no list of relevances ({error})") from error


def _relevances(item: dict[str, Any]) -> list[Any]:
    """The validation set calls them gt_relevance, the training set relevance."""
    found = item.get("gt_relevance", item.get("relevance"))
    if not isinstance(found, list):
        raise TypeError(f"image {item.get('image_id')} has none")
    return found


def _dialogs(
    source: Source, data: dict[str, Any], files: dict[int, str], relevance: Relevance
) -> Iterator[Found]:
    for number, item in enumerate(data["dialogs"]):
        place = f"{basename(source.location)}:{number}"
        try:
            image_id, caption, rounds = item["image_id"], item["caption"], item["dialog"]
            texts = [(data["questions"][r["question"]], _candidates(data, r)) for r in rounds]
            annotations = _annotations(caption, texts, rounds)
            for turn, annotation in enumerate(annotations, start=1):
                known = relevance.get((image_id, turn))
                if known is not None and len(known) != len(annotation["candidates"]):
                    raise ValueError(f"round {turn} has {len(known)} relevances")
                annotation |= {} if known is None else {"relevance": known}
        except (KeyError, TypeError, IndexError, ValueError) as error:
            kind = Reason.MISSING_KEY if isinstance(error, KeyError) else Reason.BAD_ANNOTATION
            yield Reject(place, kind, str(error))
            continue
        if image_id not in files:
            yield Reject(str(image_id), Reason.MISSING_IMAGE, "no file ends in this number")
            continue
        questions = [question for question, _ in texts]
        yield RawPair(
            str(image_id), files[image_id], questions, annotations=annotations, is_question=True,
            from_folder=True,
        )  # fmt: skip


def _candidates(data: dict[str, Any], turn: dict[str, Any]) -> list[str]:
    candidates = [data["answers"][number] for number in turn["answer_options"]]
    if not 0 <= turn["gt_index"] < len(candidates):
        raise ValueError(f"gt_index {turn['gt_index']} of {len(candidates)} candidates")
    return candidates


def _annotations(
    caption: str, texts: Sequence[tuple[str, list[str]]], rounds: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    history: list[list[str]] = []
    for (question, candidates), turn in zip(texts, rounds, strict=True):
        answer = turn["gt_index"]
        found.append(
            {
                "caption": caption,
                "history": list(history),
                "candidates": candidates,
                "answer": answer,
            }
        )
        history.append([question, candidates[answer]])
    return found
