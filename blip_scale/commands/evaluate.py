"""Evaluate a BLIP checkpoint of any format on a task, in one process or on several ranks.

python tools/evaluate.py retrieval runs/finetune_retrieval_coco data/coco_test
python tools/evaluate.py captioning model.pth coco_karpathy_test.json --images /data/coco
deepspeed tools/evaluate.py retrieval model.pth data/flickr30k_test evaluation.rerank_top_k=128
python tools/evaluate.py classification model.pth imagenet/val --class-names imagenet.json
docs/tasks.md describes the input and the figures of each task.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from tqdm import tqdm

from blip_scale import launcher, logs
from blip_scale.commands.command_line import (
    Parser,
    check_least,
    report_error_of_rank,
)
from blip_scale.config import recipe as recipes
from blip_scale.config import settings
from blip_scale.config.recipe import Recipe, StreamRecipe
from blip_scale.data.captions import clean_caption, clean_question
from blip_scale.data.conversion.pairs import Source
from blip_scale.data.heldout import classes
from blip_scale.data.heldout.listed import listed_pairs
from blip_scale.data.heldout.pairs import HeldoutPairs, heldout_pairs
from blip_scale.data.heldout.videos import VideoSet
from blip_scale.data.sources.readers import READERS
from blip_scale.engine import collectives
from blip_scale.engine.watching import batches
from blip_scale.engine.zero.engine import start
from blip_scale.evaluation import answers, captions_and_pairs, classification, video
from blip_scale.inference.blip import Blip
from blip_scale.inference.loading import Loading, load_blip, recipe_of
from blip_scale.interop.checkpoints import format_of
from blip_scale.interop.output_settings import OutputSettings
from blip_scale.interop.training_checkpoints import step_folder
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.visdial import VisDial
from blip_scale.model.vqa import VQA
from blip_scale.storage import files, locations
from blip_scale.storage.output_files import OVERWRITE_HELP, check_output
from blip_scale.tasks import captioning, nlvr2, visdial, vqa

_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Subject:
    """Checkpoint, data and settings of an evaluation."""

    blip: Blip
    opened: HeldoutPairs | VideoSet
    recipe: Recipe
    """Recipe; only its sections `evaluation` and `model.text` are used."""
    options: argparse.Namespace

    @property
    def pairs(self) -> HeldoutPairs:
        """Pairs to evaluate; not available for the task `video`."""
        assert isinstance(self.opened, HeldoutPairs)
        return self.opened


@dataclass(frozen=True)
class Kind:
    """Functions and default settings for evaluating a task."""

    measure: Callable[[Subject], dict[str, Any]]
    """Function that returns figures by name, equal on all ranks. A share is a float from 0 to 1."""
    published: dict[str, Any]
    """Settings for a checkpoint without a recipe."""
    reader: str = "coco"
    """Reader of annotation files, a name in `READERS`."""
    clean: Callable[[str], str] = clean_caption
    """Function that cleans texts."""


def command(arguments: Sequence[str] | None = None, prog: str = "evaluate.py") -> NoReturn:
    """Run the command, and end the process with its exit code."""
    launcher.end_process(main(arguments, prog))


def main(arguments: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """Run the command, and return its exit code: 0, or 2 for refused input."""
    options, overrides = _parser(prog).parse_known_args(arguments)
    began = time.perf_counter()
    try:
        launcher.adopt()
        recipes.check_overrides(overrides)
        check_least(options, {"image_size": 1, "frames": 1})
        _check_folders(options)
        is_main = os.environ.get("RANK", "0") == "0"
        logging.basicConfig(level="WARNING" if is_main else "ERROR")
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logs.MessageFormatter())
        if is_main:  # the engine logs the progress of the start
            logging.getLogger("blip_scale.engine").setLevel("INFO")
        device = start(_TIMEOUT_S)
        if device.type == "cpu":  # share the cores, so that ranks do not slow each other down
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // collectives.local_world_size()))
        kind = KINDS[options.task]
        loading = Loading(
            options.recipe, options.tokenizer, options.image_size, str(device), options.precision
        )
        blip = load_blip(options.checkpoint, loading)
        recipe = _recipe(options, kind, blip, overrides)
        pairs = _open(options, kind, blip.image_size)
        with tqdm(desc="evaluating", unit=" batches", mininterval=1.0, disable=not is_main) as bar:
            batches.listen(lambda begins: bar.update(begins), counter=bar.reset)
            figures = kind.measure(Subject(blip, pairs, recipe, options))
            batches.listen(None)
        everywhere = collectives.all_gather_objects(pairs.unreadable)
    except (ValueError, OSError) as error:
        return report_error_of_rank(prog, error, None)
    if is_main:
        report = {
            "task": options.task,
            "checkpoint": str(options.checkpoint),
            "head": blip.head,
            "data": options.data,
            "images": len(pairs),
            "unreadable_images": len({name for part in everywhere for name in part}),
            "figures": figures,
            "settings": asdict(recipe.evaluation) | {"image_size": blip.image_size},
            "ranks": collectives.world_size(),
            "seconds": round(time.perf_counter() - began, 1),
        }
        _show(report)
        if options.json:
            files.write_whole(options.json, json.dumps(report, indent=2) + "\n")
    return 0


def _check_folders(options: argparse.Namespace) -> None:
    """Refuse output files that cannot be written or must not be replaced.

    This runs first, because an evaluation may take hours.

    Raises:
        FileNotFoundError: the folder of an output file is missing.
        RefusedInput: see `check_output`.
    """
    checkpoint = step_folder(options.checkpoint) or options.checkpoint
    inputs = (options.data, checkpoint, options.references, options.class_names)
    for name in ("json", "submission"):
        file = getattr(options, name)
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise FileNotFoundError(f"--{name} {file}: expected a file in a folder that exists")
        if file:
            check_output(file, options.overwrite, filter(None, inputs))


def _recipe(options: argparse.Namespace, kind: Kind, blip: Blip, overrides: list[str]) -> Recipe:
    """Return the recipe of the run, or the published settings, with overrides applied.

    Raises:
        ValueError: an override is unknown, or would have no effect.
    """
    if any(override.startswith("evaluation.max_pairs=") for override in overrides):
        raise ValueError(
            "evaluation.max_pairs: this command evaluates the whole set; give a smaller one"
        )
    run_recipe = recipe_of(options.checkpoint, format_of(options.checkpoint), options.recipe)
    tree = deepcopy(kind.published)
    if run_recipe is not None:
        tree = yaml.safe_load(recipes.to_yaml(run_recipe))
    else:
        _merge(tree, _stated(blip.output) if blip.is_output_stated else _prompt(blip))
    return settings.build(Recipe, tree, "evaluate", settings.parse_overrides(overrides))


def _prompt(blip: Blip) -> dict[str, Any]:
    return {"model": {"text": {"prompt": blip.prompt}}}


def _stated(output: OutputSettings) -> dict[str, Any]:
    """Return the output settings of a checkpoint as settings of a recipe."""
    text: dict[str, Any] = {"prompt": output.prompt}
    evaluation: dict[str, Any] = {
        "num_beams": output.num_beams,
        "max_caption_tokens": output.max_length,
        "min_caption_tokens": output.min_length,
        "repetition_penalty": output.repetition_penalty,
        "scoring": output.evaluation_scoring,
    }
    if output.text_tokens is not None:
        text["max_tokens"] = output.text_tokens
    if output.rerank_top_k is not None:
        evaluation["rerank_top_k"] = output.rerank_top_k
    return {
        "model": {"text": text},
        "evaluation": evaluation,
        "objective": {"label_smoothing": output.label_smoothing},
    }


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Merge the settings of `other` into `tree`, replacing existing values."""
    for name, value in other.items():
        if isinstance(value, dict):
            _merge(tree.setdefault(name, {}), value)
        else:
            tree[name] = value


def _open(options: argparse.Namespace, kind: Kind, image_size: int) -> HeldoutPairs | VideoSet:
    """Open MDS shards, or the images listed in an annotation file."""
    name = locations.basename(options.data)
    is_here = locations.is_local(options.data)
    place = locations.local_path(options.data) if is_here else Path(name)
    if options.task == "video":
        folder = Path(options.images or place.parent)
        return VideoSet(place, folder, image_size, options.allow_outside)
    if is_here and (place / "index.json").is_file():
        stream = StreamRecipe(place.name, options.data)
        return heldout_pairs(stream, image_size, clean=lambda text, _: kind.clean(text))
    if options.task == "classification":
        return classes.class_folders(options.data, image_size)
    is_list = place.is_file() if is_here else not locations.is_folder(options.data)
    if not is_list:
        raise FileNotFoundError(
            f"{options.data}: neither a local folder of MDS shards (with index.json) nor an "
            "annotation file"
        )
    reader = READERS[kind.reader]
    own_options = {name: getattr(options, name) for name in reader.options}
    source = Source(options.data, options.images or "", options.strip_prefix)
    chunks = reader.chunks(source, **own_options)
    items = [item for chunk in chunks for item in chunk.read()]
    root = None if options.allow_outside else source.image_root()
    return listed_pairs(name, items, image_size, kind.clean, root)


def _retrieval(subject: Subject) -> dict[str, Any]:
    """Measure recalls by cosine, and after re-ranking by ITM if the ITM head was trained."""
    blip, recipe = subject.blip, subject.recipe
    blip.require("embed")
    figures = captions_and_pairs.retrieval_on(
        blip.med, subject.pairs, recipe, blip.tokenizer, with_matching=blip.serves("match")
    )
    counts = ("candidates", "texts")
    return {name: int(value) if name in counts else value for name, value in figures.items()}


def _classification(subject: Subject) -> dict[str, Any]:
    """Measure zero-shot classification with text templates for all classes."""
    blip, recipe, options = subject.blip, subject.recipe, subject.options
    blip.require("embed")
    labels = classes.labels_of(subject.pairs)
    names = classes.read_class_names(options.class_names, labels)
    templates = classes.read_templates(options.templates)
    features = classification.class_features(
        blip.med, list(names.values()), templates, recipe, blip.tokenizer
    )
    size = recipe.evaluation.batch_size
    scores = classification.class_scores(blip.med, subject.pairs, features, size)
    numbers = classes.label_numbers(labels, names)
    figures = classification.classification_figures(scores, numbers)
    return figures | {"classes": len(names), "templates": len(templates)}


def _captioning(subject: Subject) -> dict[str, Any]:
    """Measure caption metrics if there are references, and write captions to --submission."""
    blip, pairs, options = subject.blip, subject.pairs, subject.options
    blip.require("caption")
    ids = captioning.image_ids(pairs, options.data, options.strip_prefix)
    if options.submission:
        _check_distinct(ids, pairs.ids)
    every = range(len(pairs))
    captions = captions_and_pairs.captions_of(
        blip.med, pairs, every, subject.recipe, blip.tokenizer
    )
    if options.submission and collectives.rank() == 0:
        entries = [{"image_id": i, "caption": text} for i, text in zip(ids, captions, strict=True)]
        files.write_whole(options.submission, json.dumps(entries))
    references = pairs.captions
    if options.references:
        references = captioning.references_of(options.references, ids)
    if not any(references):
        return {"captions": len(captions), "note": "no references: nothing to compare with"}
    return captioning.figures(captions, references, pairs.annotations)


def _check_distinct(ids: Sequence[int | str], names: Sequence[str]) -> None:
    """Refuse images with the same id in a submission.

    Raises:
        ValueError: two images have the same id.
    """
    names_by_id: dict[str, str] = {}
    for number, name in zip(map(str, ids), names, strict=True):
        if number in names_by_id:
            raise ValueError(
                f"--submission: {names_by_id[number]} and {name} would both have the image_id "
                f"{number}; give each image its own id in an annotation file"
            )
        names_by_id[number] = name


def _vqa(subject: Subject) -> dict[str, Any]:
    """Measure the official VQA accuracy, and write answers to --submission."""
    blip, options = subject.blip, subject.options
    blip.require("vqa")
    assert isinstance(blip.network, VQA)
    if options.submission:
        answers.question_ids(subject.pairs)
    predictions = answers.answers_of(blip.network, subject.pairs, subject.recipe, blip.tokenizer)
    if options.submission and collectives.rank() == 0:
        rows = answers.submission(subject.pairs, predictions)
        files.write_whole(options.submission, json.dumps(rows))
    figures = vqa.accuracy(predictions, subject.pairs)
    return _counted(figures, "questions") or {"note": "no answers: nothing to compare with"}


def _nlvr2(subject: Subject) -> dict[str, Any]:
    """Measure accuracy, and the share of the more frequent label."""
    blip = subject.blip
    blip.require("nlvr2")
    assert isinstance(blip.network, NLVR2)
    judgements = nlvr2.judgements_of(blip.network, subject.pairs, subject.recipe, blip.tokenizer)
    return _counted(nlvr2.accuracy(judgements, subject.pairs), "sentences")


def _visdial(subject: Subject) -> dict[str, Any]:
    """Measure the ranks of the true answers."""
    blip = subject.blip
    blip.require("visdial")
    assert isinstance(blip.network, VisDial)
    scores = visdial.scores_of(blip.network, subject.pairs, subject.recipe, blip.tokenizer)
    figures = _counted(visdial.dialog_figures(scores, subject.pairs), "questions")
    return figures | {"mean_rank": f"{figures['mean_rank']:.2f}"}


def _video(subject: Subject) -> dict[str, Any]:
    """Measure recalls and median ranks of text-to-video and video-to-text retrieval."""
    blip, videos = subject.blip, subject.opened
    assert isinstance(videos, VideoSet)
    blip.require("match")
    frames = subject.options.frames
    figures = video.video_retrieval(blip.med, videos, frames, subject.recipe, blip.tokenizer)
    counts = ("candidates", "texts", "text_to_video_median_rank")
    return {name: int(value) if name in counts else value for name, value in figures.items()}


def _counted(figures: dict[str, float], count: str) -> dict[str, Any]:
    return figures | ({count: int(figures[count])} if count in figures else {})


KINDS: dict[str, Kind] = {
    "retrieval": Kind(
        _retrieval, {"model": {"text": {"max_tokens": 35}}, "evaluation": {"rerank_top_k": 256}}
    ),
    "classification": Kind(_classification, {"model": {"text": {"max_tokens": 35}}}, clean=str),
    "captioning": Kind(_captioning, {}, clean=str),
    "vqa": Kind(
        _vqa,
        {
            "model": {"text": {"max_tokens": 35}},
            "evaluation": {"max_caption_tokens": 10, "min_caption_tokens": 1},
        },
        "vqa",
        clean_question,
    ),
    "nlvr2": Kind(
        _nlvr2,
        {"model": {"text": {"max_tokens": 60}}},
        "nlvr2",
        partial(clean_caption, max_words=nlvr2.MAX_WORDS),
    ),
    "visdial": Kind(_visdial, {"model": {"text": {"max_tokens": 256}}}, "visdial", clean_question),
    "video": Kind(_video, {"model": {"text": {"max_tokens": 35}}}),
}


def _show(report: dict[str, Any]) -> None:
    """Print the figures as a table, with shares in percent."""
    print(
        f"{report['task']} of {report['checkpoint']} ({report['head']}) on {report['data']}: "
        f"{report['images']} images, {report['unreadable_images']} unreadable, "
        f"{report['ranks']} rank(s), {report['seconds']} s"
    )
    width = max(len(name) for name in report["figures"])
    for name, value in report["figures"].items():
        print(f"{name:<{width}}  {f'{100 * value:.2f}' if isinstance(value, float) else value}")


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=tuple(KINDS), help="task to evaluate")
    add("checkpoint", type=Path, help="a run's folder, step_N, .pth, or a Hugging Face folder")
    add(
        "data",
        help="folder of MDS shards, or a published annotation file (.json, or .jsonl for videos), "
        "local or s3://; classification: MDS shards whose captions are labels, or a folder that "
        "holds a folder of images for each class",
    )
    add(
        "--images",
        metavar="FOLDER",
        help="folder to which paths in an annotation file are relative, local or s3://",
    )
    add("--allow-outside", action="store_true",
        help="open any path in an annotation file, not only paths below --images")  # fmt: skip
    add("--strip-prefix", default="", help="prefix to remove from these paths first")
    add(
        "--split",
        default="",
        help="split of an annotation file that has several: train, val or test",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file")
    add("--overwrite", action="store_true", help=OVERWRITE_HELP)
    add("--submission", type=Path, metavar="FILE",
        help="write a file for the test server; captioning: [{image_id, caption}] (NoCaps, COCO), "
        "vqa: [{question_id, answer}]")  # fmt: skip
    add("--class-names", type=Path, metavar="FILE",
        help="classification: JSON object of label and name, or names in the order of the sorted "
        "labels (JSON list, or lines); default: the labels")  # fmt: skip
    add("--templates", type=Path, metavar="FILE",
        help="classification: templates with {} for the name (JSON list, or lines); default: "
        "CLIP's seven for ImageNet")  # fmt: skip
    add("--frames", type=int, default=8, help="video: number of frames per video (%(default)s)")
    add("--relevance", metavar="FILE", default="",
        help="visdial: visdial_1.0_val_dense_annotations.json, for NDCG")  # fmt: skip
    add("--references", metavar="FILE",
        help="captioning: COCO annotations with the reference captions (a _gt.json)")  # fmt: skip
    add("--recipe", help="recipe with the network's sizes and settings; default: that of the run")
    add("--tokenizer", help="default: that of the recipe, or the one beside the checkpoint")
    add("--image-size", type=int, help="pixels; default: that of the checkpoint")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")
    add("--local_rank", help=argparse.SUPPRESS)  # set by DeepSpeed's launcher
    parser.epilog = (
        "Further arguments are settings: evaluation.num_beams=5, evaluation.batch_size=8."
    )
    return parser
