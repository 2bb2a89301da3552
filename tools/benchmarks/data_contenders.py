"""Contenders of `tools/benchmark.py data`. Each runs in its own process, and they take turns."""

from __future__ import annotations

import io
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.loading.loader import TrainLoader
from blip_scale.data.loading.micro_batches import CaptionInput, LoaderPosition
from blip_scale.data.pixels.decoding import decode_jpeg
from blip_scale.data.pixels.transforms import TrainTransform
from blip_scale.data.shards import Record, write_shards
from blip_scale.data.tokenizer import load_tokenizer
from tools.benchmarks.contest import Contest, ask
from tools.benchmarks.published_transform import decode, published_transform

JPEG_QUALITY = 90
BATCH = 16
CAPTIONS = (
    "a man riding a wave on top of a surfboard",
    "two cups of coffee on a wooden table next to a window",
    "view of the old town and its harbour at sunset, long exposure",
)
_WORDS = sorted({word.strip(",") for caption in CAPTIONS for word in caption.split()})
_COPIES = 40  # copies of every photo, so that an epoch of a loader has several batches

_IMAGES_A_TURN = 64
_PREFETCHED = 6  # bound on batches held per worker: webdataset 2, ours 4, and some in transit

Step = Callable[[], int]
"""Function that does some work and returns the number of images done."""


@dataclass(frozen=True)
class Trial:
    """The same JPEGs as files, MDS shards and a tar."""

    folder: Path
    size: tuple[int, int]
    """Width and height of every image."""
    crop: int
    """Side of the transformed image."""
    workers: int

    def write(self, photos: Path | None) -> int:
        """Write the sets from the photos in a folder, and return the mean size of an image in kB.

        Raises:
            ValueError: the folder holds no photos.
        """
        (self.folder / "jpegs").mkdir(parents=True)
        encoded = [_fit(path, self.size) for path in photo_files(photos)]
        for i, image in enumerate(encoded):
            (self.folder / "jpegs" / f"{i:04}.jpg").write_bytes(image)
        pairs = []
        for i, image in enumerate(encoded * _COPIES):
            pairs.append((f"{i:06}", image, CAPTIONS[i % len(CAPTIONS)]))
        write_shards(self.folder / "mds", (Record(*pair, "photos") for pair in pairs))
        with webdataset.TarWriter(str(self.folder / "photos.tar")) as tar:
            for key, image, caption in pairs:
                tar.write({"__key__": key, "jpg": image, "txt": caption})
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *_WORDS]
        (self.folder / "vocab.txt").write_text("\n".join(vocabulary))
        return round(sum(map(len, encoded)) / len(encoded) / 1000)

    def jpegs(self) -> list[bytes]:
        """All encoded images."""
        return [path.read_bytes() for path in sorted((self.folder / "jpegs").iterdir())]


def photo_files(folder: Path | None) -> list[Path]:
    """Photos of a folder. None: the photos that scikit-image ships."""
    if folder is None:
        from skimage import data

        names = ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left", "motorcycle_right")
        shipped = Path(data.__file__).parent
        return [shipped / f"{name}.png" for name in names] + sorted(shipped.glob("*.jpg"))
    files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise ValueError(f"--photos {folder}: no .jpg, .jpeg or .png in it")
    return files


def _fit(path: Path, size: tuple[int, int]) -> bytes:
    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    fitted.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()


def _each(trial: Trial, work: Callable[[bytes], object]) -> Step:
    jpegs = trial.jpegs()

    def step() -> int:
        for encoded in jpegs:
            work(encoded)
        return len(jpegs)

    return step


def _decoding(trial: Trial) -> Step:
    return _each(trial, lambda encoded: decode_jpeg(encoded, trial.size))


def _published(trial: Trial) -> Step:
    transform = published_transform(trial.crop)
    return _each(trial, lambda encoded: transform(decode(encoded)))


def _ours(path: str) -> Callable[[Trial], Step]:
    def contender(trial: Trial) -> Step:
        transform = TrainTransform(trial.crop, path=path)  # type: ignore[arg-type]
        rng = np.random.default_rng(0)
        return _each(trial, lambda encoded: transform(encoded, rng))

    return contender


def _loader(trial: Trial, workers: int) -> Iterator[int]:
    from transformers import BertTokenizerFast

    folder = trial.folder / f"vocabulary-{workers}"
    BertTokenizerFast.from_pretrained(trial.folder).save_pretrained(folder)
    tokenizer = load_tokenizer(TextRecipe(checkpoint=None, tokenizer=str(folder)))
    streams = [StreamRecipe(name="photos", local=str(trial.folder / "mds"))]
    loader = TrainLoader(
        DataRecipe(streams=streams, workers=workers),
        trial.crop,
        CaptionInput(tokenizer, max_tokens=30),
        seed=0,
        position=LoaderPosition(0, 1, BATCH, BATCH),
    )
    for batch in loader:
        yield len(batch.ids)


def _webdataset(trial: Trial, workers: int) -> Iterator[int]:
    """Shuffle, decode and transform in webdataset's usual way. Every worker reads the whole tar."""
    dataset = (
        webdataset.WebDataset(
            str(trial.folder / "photos.tar"), shardshuffle=False, workersplitter=None
        )
        .shuffle(100)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(published_transform(trial.crop), lambda text: text)
        .batched(BATCH)
        .repeat()
    )
    for _, captions in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(captions)


def _batches(source: Callable[[Trial, int], Iterator[int]], workers: bool) -> Callable:
    def contender(trial: Trial) -> Step:
        batches = source(trial, trial.workers if workers else 0)
        return lambda: next(batches)

    return contender


CONTENDERS: dict[str, Callable[[Trial], Step]] = {
    "published": _published,
    "fast": _ours("fast"),
    "exact": _ours("exact"),
    "published_decode": lambda trial: _each(trial, decode),
    "decode": _decoding,
    "webdataset": _batches(_webdataset, workers=False),
    "loader": _batches(_loader, workers=False),
    "webdataset_workers": _batches(_webdataset, workers=True),
    "loader_workers": _batches(_loader, workers=True),
}


_PROCESSES = (
    ("published", "published_decode"),
    ("fast", "exact", "decode"),
    ("webdataset", "webdataset_workers"),
    ("loader", "loader_workers"),
)


class DataContest(Contest):
    """Contenders in new processes, like those of loader workers."""

    def __init__(self) -> None:
        super().__init__()
        self._pipes: dict[str, Connection] = {}
        for names in _PROCESSES:
            self._pipes |= dict.fromkeys(names, self.start(_serve))

    def rates(self, trial: Trial, rounds: int) -> dict[str, list[float]]:
        """Images per second of every contender in each round.

        Raises:
            RuntimeError: a contender died.
        """
        rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for number in range(-1, rounds):  # the first round warms up
            for name in CONTENDERS:
                rate = ask(self._pipes[name], name, (name, trial))
                if number >= 0:
                    rates[name].append(rate)
        return rates


def _serve(pipe: Connection) -> None:
    multiprocessing.set_start_method(
        "fork", force=True
    )  # start method of DataLoader's workers, Linux default
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)
    steps: dict[tuple[str, Trial], Step] = {}
    while True:
        try:
            name, trial = pipe.recv()
        except EOFError:
            return
        if (name, trial) not in steps:
            steps = {key: step for key, step in steps.items() if key[1] == trial}  # ends workers
            steps[name, trial] = CONTENDERS[name](trial)
        pipe.send(_rate(steps[name, trial], trial.workers if name.endswith("_workers") else 0))


def _rate(step: Step, workers: int) -> float:
    """Images per second.

    Without workers, seconds are CPU time, which other processes hardly affect. With workers, they
    are wall time, measured after the prefetched batches are used up.
    """
    clock = time.perf_counter if workers else time.process_time
    for _ in range(workers * _PREFETCHED):
        step()
    start, images = clock(), 0
    while images < _IMAGES_A_TURN * max(1, 2 * workers):
        images += step()
    return images / (clock() - start)
