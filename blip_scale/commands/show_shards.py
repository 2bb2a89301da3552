"""Show samples of MDS shards: a table on the terminal, and a contact sheet.

blip-scale show data/coco
blip-scale show s3://bucket/coco --count 100 --seed 1 --sheet coco.html
blip-scale show data/coco --ids 42 57
"""

from __future__ import annotations

import argparse
import html
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from blip_scale import logs
from blip_scale.commands.command_line import Parser, check_least, refuse, run_command
from blip_scale.config import exit_codes
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data import contact_sheet
from blip_scale.data.captions import DEFAULT_ROLE
from blip_scale.data.conversion.report import shortened
from blip_scale.data.reading.cache import ShardCache
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.data.shards import read_caption_counts, roles_of
from blip_scale.storage import files
from blip_scale.storage.locations import is_local
from blip_scale.storage.output_files import OVERWRITE_HELP, check_output, written_whole

_RETRY_S = 30.0
_CACHE_BYTES = 2 << 30
_LONGEST_TEXT = 200
"""Maximum number of characters of a sample's captions on the terminal."""
_LONGEST_ID = 60
_COLUMNS = 5
"""Number of pictures in a row of a PNG sheet."""
SHEETS = (".html", ".png")


@dataclass(frozen=True)
class Shown:
    """A sample, or the reason why it can't be read."""

    id: str
    size: str
    """Width x height in pixels."""
    source: str
    captions: Sequence[str]
    shard: int
    """Index of the shard that holds the sample."""
    image: bytes = b""
    is_readable: bool = True


def main(arguments: Sequence[str] | None = None, prog: str = "show_shards.py") -> int:
    """Run the command, and return its exit code.

    It is 0, 1 for damaged shards, and 2 for refused input or unknown ids.
    """
    options = _parser(prog).parse_args(arguments)
    return run_command(prog, lambda: _run(options, prog))


def _run(options: argparse.Namespace, prog: str) -> int:
    check_least(options, {"count": 1})
    if options.sheet:
        if options.sheet.suffix not in SHEETS:
            raise ValueError(f"--sheet {options.sheet}: expected a name in {' or '.join(SHEETS)}")
        check_output(options.sheet, options.overwrite)
    with tempfile.TemporaryDirectory(prefix="blip_scale_show_") as cache:
        return _show(options, _open(options.input, options.overlay, cache), prog)


def _open(location: str, overlays: list[str], cache: str) -> StreamStore:
    """Open the set at a location. Shards of a remote are downloaded into `cache`."""
    is_folder = is_local(location)
    folder, remote = (location, None) if is_folder else (cache, location)
    shards = ShardCache([Path(cache)], _CACHE_BYTES)
    recipe = StreamRecipe(location, folder, remote, overlays=overlays)
    return StreamStore(recipe, "", shards, _RETRY_S)


def _show(options: argparse.Namespace, store: StreamStore, prog: str) -> int:
    if options.ids:
        samples = _with_ids(store, options.ids)
    else:
        drawn = _drawn(store.samples, options.count, options.seed)
        samples = list(_read(store, store.places(drawn)))
    for line in _table(samples):
        print(logs.printable(line))
    print(logs.printable(f"{options.input}: {_totals(store)}"))
    if options.sheet:
        _write_sheet(options.sheet, f"{options.input}: {_totals(store)}", samples)
        print(f"sheet: {options.sheet}")
    missing = sorted(set(options.ids) - {sample.id for sample in samples})
    if missing:
        return refuse(prog, f"{options.input}: no sample has the id {', '.join(missing)}")
    return _tell_damage(options.input, store, samples, prog)


def _tell_damage(location: str, store: StreamStore, samples: Sequence[Shown], prog: str) -> int:
    """Report damaged samples and shards in one line, and return the exit code."""
    problems = []
    unreadable = sum(not sample.is_readable for sample in samples)
    if unreadable:
        problems.append(f"{unreadable} of {len(samples)} samples can't be read")
    for shard in sorted({sample.shard for sample in samples}):
        file = store.shards[shard].raw_data
        path = store.folder / file.basename
        difference = file.difference(path.read_bytes()) if path.is_file() else ""
        if difference:
            problems.append(f"{file.basename} is damaged ({difference})")
    if not problems:
        return exit_codes.DONE
    refuse(prog, f"{location}: {'; '.join(problems)}; fetch or make these shards again")
    return exit_codes.FAILED


def _drawn(samples: int, count: int, seed: int) -> list[int]:
    """Return the indices of a random sample of the set, in ascending order."""
    return sorted(random.Random(seed).sample(range(samples), min(count, samples)))


def _with_ids(store: StreamStore, ids: Sequence[str]) -> list[Shown]:
    """Return the samples with the given ids.

    Shards have no index of ids, so samples are read one by one until all ids are found.
    """
    remaining = set(ids)
    samples = []
    for sample in _read(store, _places(store)):
        if sample.id in remaining:
            samples.append(sample)
            remaining.remove(sample.id)
            if not remaining:
                break
    return samples


def _places(store: StreamStore) -> Iterator[tuple[int, int]]:
    """Yield the shard and the place in it of every sample. A set may have millions."""
    for shard, samples in enumerate(store.shard_samples.tolist()):
        yield from ((shard, place) for place in range(samples))


def _read(store: StreamStore, places: Iterable[tuple[int, int]]) -> Iterator[Shown]:
    """Yield the samples at the given places of the set."""
    for shard, place in places:
        try:
            sample = store.read(shard, place)
        except CorruptSample as error:
            name = f"{store.shard_name(shard)}[{place}]"
            captions = [f"can't be read: {error}"]
            yield Shown(name, "?", "?", captions, shard, is_readable=False)
            continue
        yield Shown(
            sample["id"], f"{sample['width']}x{sample['height']}", sample["source"],
            _captions(sample), shard, sample["image"],
        )  # fmt: skip


def _captions(sample: dict[str, Any]) -> list[str]:
    """Return the captions of a sample, each preceded by its role if the sample has roles."""
    captions = sample["captions"] if isinstance(sample["captions"], list) else []
    try:
        roles = roles_of({**sample, "captions": captions}) if "roles" in sample else []
    except ValueError:  # the roles are damaged; the captions are still shown
        roles = []
    if not roles:
        return [str(caption) for caption in captions]
    return [f"{role}: {caption}" for role, caption in zip(roles, captions, strict=True)]


def _table(samples: Sequence[Shown]) -> Iterator[str]:
    """Yield a header, then one line per sample. Captions are separated by bars, and truncated."""
    rows = [("id", "size", "source", "captions")]
    for sample in samples:
        captions = shortened(" | ".join(sample.captions), _LONGEST_TEXT)
        rows.append((shortened(sample.id, _LONGEST_ID), sample.size, sample.source, captions))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[3]])


def _totals(store: StreamStore) -> str:
    """Describe the size of the set, with the number of captions if the index has it."""
    size = sum(store.shard_bytes(shard) for shard in range(len(store.shards)))
    totals = f"{store.samples:,} samples in {len(store.shards):,} shards, {size / 1e6:,.1f} MB"
    try:
        counts = read_caption_counts(store.folder)
    except ValueError:
        return totals
    captions = 0
    for part, samples in zip(counts, store.shard_samples, strict=True):
        captions += samples if part is None else sum(part)
    roles = store.roles
    named = "" if roles == [DEFAULT_ROLE] else f" of the roles {', '.join(roles)}"
    return f"{totals}, {captions:,} captions{named}"


def _write_sheet(file: Path, title: str, samples: Sequence[Shown]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".png":
        picture = _draw(samples)
        with written_whole(file) as place:
            picture.save(place, "PNG")
        return
    cards = []
    for sample in samples:
        texts = [f'<div class="text">{html.escape(caption)}</div>' for caption in sample.captions]
        name = f"{sample.id}, {sample.size}, {sample.source}"
        cards.append(contact_sheet.card(sample.image, "".join(texts), name))
    files.write_whole(file, contact_sheet.page(title, contact_sheet.cards(cards)))


def _draw(samples: Sequence[Shown]) -> Image.Image:
    """Draw all samples on one picture, with captions in black and ids in grey."""
    # Imported late: the table and the HTML sheet do not need torch.
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    from blip_scale.engine.watching.pictures import Panel, draw_grid

    panels = []
    for sample in samples:
        tile = Image.new("RGB", (contact_sheet.SIDE, contact_sheet.SIDE), "white")
        try:
            picture = contact_sheet.thumbnail(sample.image)
            tile.paste(picture, ((tile.width - picture.width) // 2, 0))
        except CorruptSample:
            pass  # leave the tile empty
        texts = logs.printable(" | ".join(sample.captions)), logs.printable(sample.id)
        panels.append(Panel(pil_to_tensor(tile), *texts))
    return to_pil_image(draw_grid(panels, _COLUMNS))


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", metavar="MDS", help="folder of shards, or a remote: s3://b/p")
    add("--overlay", action="append", default=[], help="overlay to show with it; may be repeated")
    add("--count", type=int, default=12, help="samples to show (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the random sample (%(default)s)")
    add(
        "--ids", nargs="+", default=[], metavar="ID",
        help="show these samples instead; shards are read until all are there",
    )  # fmt: skip
    add(
        "--sheet", type=Path, metavar="FILE",
        help="write a contact sheet with images and captions: FILE.html or FILE.png",
    )  # fmt: skip
    add("--overwrite", action="store_true", help=OVERWRITE_HELP)
    return parser
