"""Make an overlay: join captions by key to the images of a set of shards.

The captions are first stored in an SQLite table in a scratch folder, so memory use does not grow
with their number. Then the images are read once, shard by shard, and their captions looked up.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.captions import DEFAULT_ROLE, RoleText
from blip_scale.data.conversion.caption_files import (
    KEYS,
    CaptionFiles,
    KeyedCaptions,
    comparable,
    read_captions,
)
from blip_scale.data.conversion.locks import held
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Reason, Reject
from blip_scale.data.conversion.report import reject_fields
from blip_scale.data.conversion.screening import is_unicode, kept_whole
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.overlays import MANIFEST_NAME, VERSION, OverlayWriter
from blip_scale.data.reading.cache import ShardCache
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.storage.locations import is_local

REJECTS_NAME = "rejects.jsonl"
_CACHE_BYTES = 4 << 30
_TICK_EVERY = 1000
_WRONG_COLUMN = (Reason.MISSING_KEY, Reason.MISSING_CAPTION, Reason.CAPTION_NO_TEXT)
"""Reasons for rejects that the user may avoid with other options."""

Duplicates = Literal["refuse", "first", "all"]
Texts = list[tuple[str, str]]
"""Captions as (role, text)."""


@dataclass(frozen=True)
class OverlayJob:
    """Inputs, output and options of an overlay."""

    images: str
    """Folder or remote of the shards with the images."""
    files: CaptionFiles
    out: str
    duplicates: Duplicates = "refuse"
    """Rule for a key that is repeated with other captions: stop with an error, keep the captions
    of the first row, or keep those of all rows."""
    scratch: str | None = None
    """Folder for the table of captions and for remote files (default: the system's)."""


class _Captions:
    """Captions by key, in an SQLite table on disk."""

    def __init__(self, file: Path, duplicates: Duplicates, rejects: IO[str]) -> None:
        self._table = sqlite3.connect(file, isolation_level=None)
        self._table.execute("PRAGMA journal_mode=OFF")
        self._table.execute("PRAGMA synchronous=OFF")
        self._table.execute(
            "CREATE TABLE captions (key TEXT PRIMARY KEY, place TEXT, texts TEXT, used INTEGER) "
            "WITHOUT ROWID"
        )
        self._table.execute("BEGIN")
        self._duplicates = duplicates
        self._rejects = rejects
        self.counts: Counter[str] = Counter()
        """Numbers of captions: read = joined + unjoined + rejected + duplicates."""
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, Reject] = {}
        """First reject for each reason."""

    def close(self) -> None:
        self._table.close()

    def add(self, item: KeyedCaptions | Reject) -> None:
        """Add the captions of a row.

        Raises:
            ValueError: the key already has other captions, and duplicates are refused.
        """
        if isinstance(item, Reject):
            self._reject(item, max(1, item.captions))
            return
        texts = self._usable(item)
        if not texts:
            return
        content = json.dumps(texts)
        place = item.place.encode("utf-8", "replace").decode()  # names in tars may not be UTF-8
        row = (item.key, place, content)
        try:
            self._table.execute("INSERT INTO captions VALUES (?, ?, ?, 0)", row)
        except sqlite3.IntegrityError:
            self._add_again(item, texts)

    def take(self, key: str) -> Texts:
        """Return the captions of an image and mark them as used."""
        if not key:
            return []
        row = self._table.execute("SELECT texts, used FROM captions WHERE key = ?", (key,))
        texts, used = row.fetchone() or ("[]", 1)
        if not used:
            self._table.execute("UPDATE captions SET used = 1 WHERE key = ?", (key,))
        return [(role, text) for role, text in json.loads(texts)]

    def finish(self) -> None:
        """Count joined and unjoined captions, and write the unjoined ones to the rejects."""
        rows = self._table.execute("SELECT key, place, texts, used FROM captions")
        for key, place, content, used in rows:
            count = len(json.loads(content))
            self.counts["joined" if used else "unjoined"] += count
            if not used:
                self._list(Reject(place, Reason.NO_SUCH_IMAGE, key, captions=count))

    def _usable(self, item: KeyedCaptions) -> Texts:
        texts: Texts = []
        if not item.key or not is_unicode(item.key):
            reason = Reason.DAMAGED_INPUT if item.key else Reason.MISSING_KEY
            self._reject(Reject(item.place, reason), len(item.captions))
            return []
        for caption in item.captions:
            role, text = caption if isinstance(caption, RoleText) else (DEFAULT_ROLE, caption)
            kept = kept_whole(text)
            if isinstance(kept, str):
                texts.append((role, kept))
            else:
                self._reject(Reject(item.place, *kept), 1)
        self.counts["read"] += len(texts)
        return texts

    def _add_again(self, item: KeyedCaptions, texts: Texts) -> None:
        cursor = self._table.execute("SELECT place, texts FROM captions WHERE key = ?", (item.key,))
        place, content = cursor.fetchone()
        if content == json.dumps(texts):
            self.counts["duplicates"] += len(texts)
        elif self._duplicates == "refuse":
            raise ValueError(
                f"{item.place} and {place} have other captions for the same key {item.key}: choose "
                "with --duplicates first or --duplicates all"
            )
        elif self._duplicates == "first":
            self.counts["duplicates"] += len(texts)
            detail = f"the captions of {place} count"
            self._list(Reject(item.place, Reason.DUPLICATE_KEY, detail, captions=len(texts)))
        else:
            joined = json.dumps([*json.loads(content), *texts])
            self._table.execute("UPDATE captions SET texts = ? WHERE key = ?", (joined, item.key))

    def _reject(self, reject: Reject, captions: int) -> None:
        self.counts["read"] += captions
        self.counts["rejected"] += captions
        self._list(reject)

    def _list(self, reject: Reject) -> None:
        self.reasons[str(reject.reason)] += 1
        self.examples.setdefault(str(reject.reason), reject)
        self._rejects.write(json.dumps(reject_fields(reject)) + "\n")


def make_overlay(
    job: OverlayJob, tick: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Join the captions to the images, and write the overlay.

    Args:
        job: inputs, output and options.
        tick: called with the number of rows or images since the last call.

    Returns:
        The content of overlay.json.

    Raises:
        FileExistsError: `out` already holds a set.
        FileNotFoundError: images or captions are missing.
        ValueError: the images lack the key, duplicates are refused, or nothing can be joined.
    """
    out = OutputFolder(job.out, job.scratch)
    if out.has(INDEX_NAME):
        raise FileExistsError(f"{job.out} holds a set already: remove it or choose another OUT")
    with held(out, 0, 1), out.workshop("overlay") as folder:
        store = open_images(job.images, folder / "images")
        _check_key(store, job.files.key)
        writer = OverlayWriter(folder / "mds", store.shards.index_sha256)
        with (
            (folder / "mds" / REJECTS_NAME).open("w", encoding="utf-8") as rejects,
            closing(_Captions(folder / "captions.sqlite", job.duplicates, rejects)) as captions,
        ):
            for item in _counted(read_captions(job.files), tick):
                captions.add(item)
            samples = _join(store, job.files.key, captions, writer, tick)
            captions.finish()
        if not captions.counts["joined"]:
            raise ValueError(_nothing_joined(job, captions))
        writer.finish()
        manifest = {
            "version": VERSION,
            "images": images_entry(store, job.images),
            "captions": {
                name: captions.counts[name]
                for name in ("read", "joined", "unjoined", "rejected", "duplicates")
            },
            "samples": dict(samples),
            "roles": dict(sorted(writer.roles.items())),
            "rejects": dict(sorted(captions.reasons.items())),
            "made_by": {**asdict(job.files), "duplicates": job.duplicates},
        }
        (folder / "mds" / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        out.put(folder / "mds", [*writer.names, REJECTS_NAME, MANIFEST_NAME, INDEX_NAME])
    return manifest


def open_images(location: str, cache_folder: Path) -> StreamStore:
    """Open the shards at a location. Remote shards are downloaded to `cache_folder`."""
    if is_local(location):
        return StreamStore(StreamRecipe("images", location))
    cache = ShardCache([cache_folder], _CACHE_BYTES)
    return StreamStore(StreamRecipe("images", str(cache_folder), location), cache=cache)


def images_entry(store: StreamStore, location: str) -> dict[str, Any]:
    """Return the entry that describes the images in an overlay's manifest."""
    return {
        "location": location,
        "index_sha256": store.shards.index_sha256,
        "shards": len(store.shards),
        "samples": store.samples,
    }


def _counted(
    items: Iterator[KeyedCaptions | Reject], tick: Callable[[int], None]
) -> Iterator[KeyedCaptions | Reject]:
    for number, item in enumerate(items, start=1):
        yield item
        if number % _TICK_EVERY == 0:
            tick(_TICK_EVERY)


def _check_key(store: StreamStore, key: str) -> None:
    """Raise if no shard has the key's column. SHA-256 needs no column, as it can be computed."""
    shards = store.shards
    layouts = (shards.columns(number).names for number in range(len(shards)))
    if key != "sha256" and not any(key in names for names in layouts):
        others = [name for name in KEYS if name in shards.columns(0).names]
        raise ValueError(
            f"{store.folder}: the shards have no column {key}, as their source had none: join by "
            f"{' or '.join(others)}"
        )


def _join(
    store: StreamStore,
    key: str,
    captions: _Captions,
    writer: OverlayWriter,
    tick: Callable[[int], None],
) -> Counter[str]:
    """Write the captions of every image, and return the numbers of images by outcome."""
    counts: Counter[str] = Counter({"all": store.samples})
    for number, samples in enumerate(store.shard_samples.tolist()):
        for index in range(samples):
            try:
                sample = store.read(number, index)
            except CorruptSample:  # training skips it too
                counts["unreadable"] += 1
                writer.write("", [], [])
                continue
            texts = captions.take(_key_of(sample, key))
            counts["with_captions" if texts else "without_captions"] += 1
            writer.write(sample["id"], [text for _, text in texts], [role for role, _ in texts])
        writer.end_shard()
        tick(samples)
    return counts


def _key_of(sample: dict[str, Any], key: str) -> str:
    if key == "sha256" and not sample.get("sha256"):
        return hashlib.sha256(sample["image"]).hexdigest()
    return comparable(key, str(sample.get(key) or ""))


def _nothing_joined(job: OverlayJob, captions: _Captions) -> str:
    counts = captions.counts
    if counts["unjoined"]:
        why = f"none of their keys is the {job.files.key} of an image: choose another --join"
    elif counts["rejected"]:
        reason = captions.reasons.most_common(1)[0][0]
        example = captions.examples[reason]
        detail = f": {example.detail}" if example.detail else ""
        why = f"all are rejected, most for {reason} ({example.id}{detail})"
        if example.reason in _WRONG_COLUMN:
            why += "; name the columns with --caption-key and --key-column"
    else:
        why = "there are none"
    return f"{', '.join(job.files.locations)}: {counts['read']} captions, {why}"
