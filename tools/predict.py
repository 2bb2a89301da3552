"""Ask a trained BLIP about images.

python tools/predict.py caption photos/ --model runs/captioner
python tools/predict.py match 'photos/*.jpg' --model runs/filter --text "a dog" --text "two cats"
python tools/predict.py embed photos/ --model runs/filter --out features.npz
python tools/predict.py search photos/ --model runs/filter --text "a dog in the snow" --top 5
IMAGES are files, folders (everything below) and globs. A line of JSON for each answer; an image that
can't be decoded gives a line with `error`, and the exit code 1 at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from blip_scale.inference import Loading, answers, find_images, load_blip
from blip_scale.model import BeamSettings, NucleusSettings

FAILED_IMAGES, REFUSED = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where images failed, 2 where nothing could be done."""
    options = _parser().parse_args(arguments)
    try:
        return _predict(options)
    except (OSError, ValueError) as error:
        print(f"predict: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED


def _predict(options: argparse.Namespace) -> int:
    paths = find_images(options.images)
    loading = Loading(
        options.recipe, options.tokenizer, options.image_size, options.device, options.precision
    )
    reader = answers.Reader(load_blip(options.model, loading), options.batch_size, options.threads)
    failed = []
    with _output(options.out) as write, tqdm(total=len(paths), unit="image") as bar:
        last = None
        for answer in _ANSWERS[options.use](reader, paths, options):
            if "error" in answer:
                failed.append(answer["image"])
            bar.update(answer["image"] != last)
            last = answer["image"]
            write(answer)
    if failed:
        named = ", ".join(failed[:5]) + (" ..." if len(failed) > 5 else "")
        print(f"{len(failed)} of {len(paths)} images failed: {named}", file=sys.stderr)
    return FAILED_IMAGES if failed else 0
