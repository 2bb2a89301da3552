"""Read seeded mutations of small valid inputs: each must be read, or refused in one line.

Run `python tests/security/fuzzing.py SECONDS [SEED]` for a longer search. It prints what breaks.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save

from blip_scale.config import settings
from blip_scale.config.recipe import Recipe
from blip_scale.data.conversion.pairs import RawPair, Source
from blip_scale.data.conversion.screening import Rules, screen
from blip_scale.data.heldout.videos import VideoSet
from blip_scale.data.mds import Writer, read_index
from blip_scale.data.reading.shard_table import SHARDS_CACHE, open_shards
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.data.shards import COLUMNS, read_caption_counts
from blip_scale.data.sources.readers import READERS
from blip_scale.storage import checkpoint_format
from blip_scale.storage.checkpoint_format import Manifest

HOSTILE = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\x1b[2J", b'"', b"'", b"\\", b",",
    b"\t", b"[", b"]", b"{", b"}", b":", b"-", b"/", b"../", b"..", b"~", b"&a ", b"*a", b"<<: ",
    b"null", b"true", b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"9" * 30, b"9" * 5000,
    b"\xed\xa0\x80", b'"\\ud83d"', b"\xe2\x80\xa8", b"[" * 2000, b'{"a":' * 2000, b"s3://b/x",
    b"http://127.0.0.1:9/x", b"/dev/zero", b"pkl", b"!!python/object:os.system", b"%!PS",
    b"x" * 70000,
)  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Copy an input with one to four changed bytes, tokens or ranges."""
    content = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(content))
        length = draw.choice((0, 1, 2, 8, 64, 512))
        kind = draw.randrange(7)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[place : place + length] = draw.choice(HOSTILE)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            other = draw.randint(0, len(content))
            content[place:place] = content[other : other + length]
        elif kind == 4:
            del content[place:]
        else:
            swap_token(content, draw)
    return bytes(content)


def swap_token(content: bytearray, draw: random.Random) -> None:
    """Replace a word or number by a hostile one, leaving the syntax around it intact."""
    tokens = list(re.finditer(rb'"[^"\n]*"|-?\d+(\.\d+)?|\w+', bytes(content)))
    if tokens:
        token = draw.choice(tokens)
        value = draw.choice(HOSTILE)
        if draw.random() < 0.5 and token[0].startswith(b'"'):
            value = json.dumps(value.decode("latin-1")).encode()
        content[token.start() : token.end()] = value


def picture() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (40, 36), "red").save(encoded, "JPEG")
    return encoded.getvalue()


@dataclass(frozen=True)
class Target:
    """A kind of input to mutate."""

    name: str
    """Name of the mutated file."""
    content: bytes
    read: Callable[[Path], object]
    """Function that reads a file in a folder, which also holds 1.jpg."""
    refuses: tuple[type[Exception], ...] = (ValueError, OSError)
    """Exceptions that count as refusals: commands show them in one line, with exit code 2."""


def converted(reader: str) -> Callable[[Path], object]:
    """Read all pairs that a reader finds, and screen them like a conversion."""

    def read(file: Path) -> object:
        source = Source(str(file.parent if reader == "webdataset" else file))
        rules = Rules("fuzz", images_below=source.image_root())
        for chunk in READERS[reader].chunks(source):
            for pair in chunk.read():
                if isinstance(pair, RawPair):
                    record, rejects, _ = screen(pair, rules)
                    assert record is not None or rejects
        return None

    return read


def index_json() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder) / "set", {"id": "str", "n": "int"}, 200, "zstd:1") as writer:
            for number in range(20):
                writer.write({"id": f"id {number}", "n": number})
        return (Path(folder) / "set" / "index.json").read_bytes()


def read_set(file: Path) -> object:
    shards = read_index(file.parent)
    with contextlib.suppress(ValueError):
        read_caption_counts(file.parent)
    return shards


def cached_index() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return table_beside_index(Path(folder)).read_bytes()


def table_beside_index(folder: Path) -> Path:
    """An index and its cached table, as StreamStore finds them."""
    columns = COLUMNS | {"n": "int"}
    with Writer(folder / "set", columns, 200, "zstd:1") as writer:
        for number in range(20):
            empty = {name: b"" if kind == "bytes" else 0 for name, kind in COLUMNS.items()}
            texts = {"id": f"id {number}", "source": "", "url": "", "captions": ["a"]}
            writer.write(empty | texts | {"n": number, "similarity": 0.5})
    (folder / "set" / "index.json").replace(folder / "index.json")
    open_shards(folder).save(folder / SHARDS_CACHE)
    return folder / SHARDS_CACHE


def read_cached_index(file: Path) -> object:
    """What is read is what the index says, whatever lies in the cache."""
    if not (file.parent / "index.json").exists():
        content = file.read_bytes()
        table_beside_index(file.parent)
        file.write_bytes(content)
    table = open_shards(file.parent)
    expected = [shard.raw_data.basename for shard in read_index(file.parent)]
    if [table.name(number) for number in range(len(table))] != expected:
        raise AssertionError("a cached index that differs from index.json was taken")
    return list(table)


def manifest() -> bytes:
    entry: dict[str, Any] = {"bytes": 3, "xxh3": "0" * 16}
    content = Manifest(
        3, 1, 3, 3, {"a": 4}, {"rank_00000.safetensors": entry, "shared.safetensors": entry}, {}, {}
    )
    return content.to_json().encode()


def read_manifest(file: Path) -> object:
    loaded = checkpoint_format.read_manifest(file.parent)
    return checkpoint_format.verify(file.parent, loaded)


def safetensors_file() -> bytes:
    return save({"weight/a": torch.ones(4)}, {"a": "0"})


def read_tensors(file: Path) -> object:
    reader = checkpoint_format.Reader([file])
    return reader.whole("weight", "a", 4)


def shard_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder) / "set")
        return (Path(folder) / "set" / "shard.00000.mds").read_bytes()


def make_set(folder: Path) -> None:
    with Writer(folder, {"id": "str", "captions": "json"}, 10_000) as writer:
        for number in range(5):
            writer.write({"id": f"id {number}", "captions": ["a", number]})


def read_shard(file: Path) -> object:
    (file.parent / "index.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder) / "set")
        (Path(folder) / "set" / "index.json").rename(file.parent / "index.json")
    (shard,) = read_index(file.parent)
    for number in range(5):
        with contextlib.suppress(ValueError):
            shard.read(number)
    return shard


def tar_file(mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:
        for number in range(3):
            for ending, data in (("jpg", picture()), ("txt", b"a cat"), ("json", b'{"url": "x"}')):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def read_recipe(file: Path) -> object:
    return settings.build(Recipe, settings.read_yaml(file), str(file))


def recipe() -> bytes:
    streams = (
        "data:\n  streams:\n  - {name: a, local: /x, repeat: 2}\n  - &b {name: b, local: /y}\n"
    )
    return f"seed: 3\noutput_dir: runs/x\n{streams}train: {{epochs: 2, precision: bf16}}\n".encode()


def lines(*items: object) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


TABLE = b'image,caption\n1.jpg,"a, cat"\nsub/1.jpg,a dog\n1.jpg,a cow\n'
QUESTION = {"image": "1.jpg", "question": "what?", "answer": ["a", "b"], "dataset": "vqa"}
DIALOG = {
    "data": {
        "questions": ["what?"],
        "answers": ["a", "b"],
        "dialogs": [
            {
                "image_id": 1,
                "caption": "c",
                "dialog": [{"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0}],
            }
        ],
    }
}
KARPATHY = {
    "images": [{"filename": "1.jpg", "filepath": ".", "split": "val", "sentences": [{"raw": "a"}]}]
}
COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "annotations": [{"image_id": 1, "caption": "a cat"}],
}
PAIR = {"images": ["1.jpg", "1.jpg"], "sentence": "two", "label": "True"}

TARGETS: dict[str, Target] = {
    "index": Target("index.json", index_json(), read_set),
    "cached index": Target(SHARDS_CACHE, cached_index(), read_cached_index),
    "shard": Target("shard.00000.mds", shard_file(), read_shard),
    "manifest": Target("manifest.json", manifest(), read_manifest),
    "safetensors": Target(
        "rank_00000.safetensors", safetensors_file(), read_tensors, (ValueError, SafetensorError)
    ),
    "recipe": Target("recipe.yaml", recipe(), read_recipe, (ValueError, FileNotFoundError)),
    "csv": Target("captions.csv", TABLE, converted("folder")),
    "tsv": Target("captions.tsv", TABLE.replace(b",", b"\t"), converted("folder")),
    "csv.gz": Target(
        "captions.csv.gz",
        gzip.compress(TABLE),
        converted("folder"),
        (OSError, ValueError, EOFError),
    ),
    "jsonl": Target(
        "metadata.jsonl", lines(*[{"file_name": "1.jpg", "text": "a"}] * 3), converted("folder")
    ),
    "json": Target(
        "list.json", lines([{"image": "1.jpg", "caption": ["a", "b"]}]), converted("blip_json")
    ),
    "karpathy": Target("dataset_coco.json", lines(KARPATHY), converted("coco")),
    "coco": Target("captions.json", lines(COCO), converted("coco")),
    "vqa": Target("vqa.json", lines([QUESTION]), converted("vqa")),
    "nlvr2": Target("nlvr2.json", lines([PAIR]), converted("nlvr2")),
    "visdial": Target("visdial.json", lines(DIALOG), converted("visdial")),
    "videos": Target(
        "list.jsonl",
        lines({"clip_name": "videos", "caption": "a"}),
        lambda file: VideoSet(file, file.parent.parent, 32).frames(0, 2),
        (ValueError, OSError, CorruptSample),
    ),
    "tar": Target("0.tar", tar_file("w"), converted("webdataset")),
    "tar.gz": Target("0.tar.gz", tar_file("w:gz"), converted("webdataset")),
}


def attempt(target: Target, content: bytes, folder: Path) -> str | None:
    """Read one input, and return the traceback of an error that is not a refusal, else None."""
    folder.mkdir(exist_ok=True)
    if not (folder / "1.jpg").exists():
        (folder / "1.jpg").write_bytes(picture())
    file = folder / target.name
    file.write_bytes(content)
    start = time.perf_counter()
    try:
        target.read(file)
    except target.refuses as error:
        if not str(error).strip():
            return f"a refusal without words: {error!r}\n{traceback.format_exc()}"
    except Exception:
        return traceback.format_exc()
    seconds = time.perf_counter() - start
    return f"took {seconds:.0f} s" if seconds > 20 else None


def fuzz(seconds: float, seed: int, names: list[str]) -> tuple[Counter[str], dict[str, Any]]:
    """Mutate inputs for some seconds.

    Returns:
        the number of inputs read of each kind, and the first example of each failure.
    """
    draw = random.Random(seed)
    done: Counter[str] = Counter()
    broken: dict[str, Any] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        while time.monotonic() < end:
            name = draw.choice(names)
            target = TARGETS[name]
            content = mutated(target.content, draw)
            problem = attempt(target, content, Path(place) / name)
            done[name] += 1
            if problem:
                last = [line for line in problem.splitlines() if "blip_scale/" in line][-1:]
                broken.setdefault(
                    f"{name}: {problem.splitlines()[-1][:60]} {last}", (content, problem)
                )
    return done, broken


def main() -> int:
    """Print the failures, and return 1 if there are any."""
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    names = sys.argv[3:] or list(TARGETS)
    done, broken = fuzz(float(sys.argv[1]), seed, names)
    print(f"seed {seed}: {sum(done.values())} inputs: {dict(done)}")
    for title, (content, problem) in broken.items():
        print(f"--- {title}\n{content[:300]!r}\n{problem}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
