"""Read VisDial's dialogs about images: visdial_1.0_train.json and visdial_1.0_val.json.

`data` holds `questions` and `answers`, lists of texts, and `dialogs`, which refer to them by
number: {image_id, caption, dialog: ten rounds of {question, answer, answer_options, gt_index}}.

A record is an image with the questions of its rounds. The annotation of each question holds the
image's `caption`, the `history` (question and answer of each earlier round), 100 `candidates`, and
`answer`, the index of the true candidate. With --relevance it also holds `relevance`, the quality
of each candidate as judged by people (visdial_1.0_val_dense_annotations.json).

The file of an image lies below --images, and its name ends in the number `image_id`
(COCO_train2014_000000378466.jpg, VisualDialog_val2018_000000185565.jpg).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from blip_scale.data.conversion.lists import spooled_chunks
from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.sources.annotations import load_list
from blip_scale.data.sources.json_lists import JsonObject
from blip_scale.storage.locations import basename, list_folder, parent, stem

_DIALOGS, _QUESTIONS, _ANSWERS = "data.dialogs", "data.questions", "data.answers"
_LISTS = "data with dialogs, questions, answers"

Relevance = dict[tuple[int, int], list[float]]
"""(image id, round counted from 1) -> relevance of each candidate."""


def chunks(source: Source, relevance: str = "") -> Iterator[Chunk]:
    """Return the chunks of one annotation file.

    Args:
        source: the input.
        relevance: file with human relevance judgements of the candidates; "" for none.

    Raises:
        ValueError: a file has another format.
    """
    content = JsonObject.open(source.location, inside="data")
    texts: dict[str, list[Any]] = {}
    for name, number, value in content.read() if content else ():
        if number >= 0 and name != _DIALOGS:
            texts[name].append(value)
        elif number < 0 and isinstance(value, list):
            texts[name] = []
    if content is None or not {_DIALOGS, _QUESTIONS, _ANSWERS} <= set(texts):
        raise ValueError(f"{source.location} is not a VisDial file: it lacks {_LISTS}")
    judgements = _relevance(relevance) if relevance else {}
    files = _images(source.images or parent(source.location))
    data = {"questions": texts[_QUESTIONS], "answers": texts[_ANSWERS]}
    dialogs = content.items(_DIALOGS)
    return spooled_chunks(_dialogs(source, dialogs, data, files, judgements), source)


def _images(folder: str) -> dict[int, str]:
    """Map the number at the end of each file's name to the file's location."""
    files = {}
    for entry in list_folder(folder, deep=True):
        number = re.search(r"\d+$", stem(entry.name))
        if number:
            files[int(number[0])] = entry.location
    return files


def _relevance(location: str) -> Relevance:
    try:
        relevance: Relevance = {}
        for item in load_list(location, "{image_id, round_id, gt_relevance}"):
            key = (item["image_id"], item["round_id"])
            relevance[key] = [float(value) for value in _relevances(item)]
        return relevance
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{location}: not a list of relevances ({error})") from error


def _relevances(item: dict[str, Any]) -> list[Any]:
    """Return an item's relevances: gt_relevance in the validation set, relevance in training."""
    relevances = item.get("gt_relevance", item.get("relevance"))
    if not isinstance(relevances, list):
        raise TypeError(f"image {item.get('image_id')} has none")
    return relevances


def _dialogs(
    source: Source,
    dialogs: Iterable[Any],
    data: dict[str, list[Any]],
    files: dict[int, str],
    relevance: Relevance,
) -> Iterator[Found]:
    for number, item in enumerate(dialogs):
        place = f"{basename(source.location)}:{number}"
        try:
            image_id, caption, rounds = item["image_id"], item["caption"], item["dialog"]
            texts = [(data["questions"][r["question"]], _candidates(data, r)) for r in rounds]
            annotations = _annotations(caption, texts, rounds)
            for turn, annotation in enumerate(annotations, start=1):
                judged = relevance.get((image_id, turn))
                if judged is not None and len(judged) != len(annotation["candidates"]):
                    raise ValueError(f"round {turn} has {len(judged)} relevances")
                annotation |= {} if judged is None else {"relevance": judged}
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
    annotations: list[dict[str, Any]] = []
    history: list[list[str]] = []
    for (question, candidates), turn in zip(texts, rounds, strict=True):
        answer = turn["gt_index"]
        annotations.append(
            {
                "caption": caption,
                "history": list(history),
                "candidates": candidates,
                "answer": answer,
            }
        )
        history.append([question, candidates[answer]])
    return annotations
