"""A page to look at: some images with their captions, what was kept of them and what was dropped,
and the scores of all."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from blip_scale.capfilt.filtering import SYNTHETIC, WEB
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Reason
from blip_scale.data.conversion.report import Report, report_name
from blip_scale.data.mds import parse_shard
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore

_SIDE = 224
_KINDS = {Reason.WEB_UNMATCHED: WEB, Reason.SYNTHETIC_UNMATCHED: SYNTHETIC}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
  color: #1c2024; background: #f6f7f8; }
table { border-collapse: collapse; margin: 1em 0; background: #fff; }
td, th { padding: .35em .9em; border: 1px solid #d9dde1; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 90px; width: 420px; }
.bars i { flex: 1; background: #8aa4bf; } .bars i.low { background: #d5a9a4; }
.plots { display: flex; gap: 3em; flex-wrap: wrap; } .plots p { margin: .3em 0; color: #59636e; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1em; }
.card { background: #fff; border: 1px solid #d9dde1; border-radius: 6px; padding: .8em; }
.card img { display: block; margin: 0 auto .6em; max-width: 100%; }
.card small { color: #7a848e; word-break: break-all; }
.text { margin: .35em 0; padding-left: .6em; border-left: 4px solid #3f8f5b; }
.text.dropped { border-color: #c2554a; color: #6d3a35; text-decoration: line-through; }
.tag { font-size: 12px; color: #59636e; display: inline-block; width: 100%; }
"""


@dataclass(frozen=True)
class _Shown:
    id: str
    image: bytes
    captions: list[tuple[str, float, str, bool]]
    """Kind, score, text, kept."""


def sample_sheet(
    store: StreamStore, out: OutputFolder, statistics: dict[str, Any], shown: int, scratch: Path
) -> str:
    """HTML with images inside, the same for the same set.

    Args:
        store: the input.
        out: the merged output.
        shown: images, evenly over the input.
        scratch: folder for shards that are fetched.
    """
    shown = min(shown, store.samples)
    places = store.places(i * store.samples // shown for i in range(shown))
    cards = [_card(_looked_up(store, out, place, scratch)) for place in places]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>CapFilt</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>CapFilt</h1>\n{_overview(statistics)}\n"
        f"<h2>{shown} of {statistics['images']['read']} images</h2>\n"
        f'<div class="cards">\n{"".join(cards)}</div>\n</body></html>\n'
    )


def _looked_up(
    store: StreamStore, out: OutputFolder, place: tuple[int, int], scratch: Path
) -> _Shown:
    """What became of a sample of the input; chunk N of the output is shard N of the input."""
    report = Report.from_json(out.read(report_name(place[0])))
    try:
        sample = store.read(*place)
    except CorruptSample as error:
        return _Shown(
            f"{store.shard_name(place[0])}[{place[1]}]", b"", [("", 0, str(error), False)]
        )
    captions = []
    if sample["id"] in report.ids:
        written = _written(report, out, report.ids.index(sample["id"]), scratch)
        for text, origin in zip(written["captions"], written["annotations"], strict=True):
            captions.append((origin["kind"], origin["score"], text, True))
    for reject in report.rejects:
        if reject.id == sample["id"]:
            score, _, text = reject.detail.partition(" ")
            kind = _KINDS.get(reject.reason)
            if kind:
                captions.append((kind, float(score), text, False))
            else:
                captions.append((str(reject.reason), 0.0, reject.detail, False))
    return _Shown(sample["id"], sample["image"], captions)


def _written(report: Report, out: OutputFolder, index: int, scratch: Path) -> dict[str, Any]:
    """Sample `index` of a chunk's output."""
    for shard in report.shards:
        if index < shard["samples"]:
            path = out.fetch(shard["raw_data"]["basename"], scratch)
            return parse_shard(path.parent, shard).read(index)
        index -= shard["samples"]
    raise IndexError(index)


def _card(one: _Shown) -> str:
    texts = [
        f'<div class="text{"" if kept else " dropped"}">{html.escape(text)}'
        f'<span class="tag">{html.escape(kind)} {score:.2f}, {"kept" if kept else "dropped"}'
        "</span></div>"
        for kind, score, text, kept in sorted(one.captions, key=lambda c: c[0] == SYNTHETIC)
    ]
    return (
        f'<div class="card">{_picture(one.image)}{"".join(texts)}'
        f"<small>{html.escape(one.id)}</small></div>\n"
    )


def _picture(image: bytes) -> str:
    try:
        picture = decode_image(image)
    except CorruptSample:
        return "<p>(can't be decoded)</p>"
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=85)
    data = base64.b64encode(encoded.getvalue()).decode()
    return f'<img alt="" width="{picture.width}" src="data:image/jpeg;base64,{data}">'


def _overview(statistics: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{kind} captions</td><td>{found['read']}</td><td>{found['kept']}</td>"
        f"<td>{found['dropped']}</td><td>{found['kept_share']:.1%}</td></tr>"
        for kind in (WEB, SYNTHETIC)
        for found in [statistics[kind]]
    ]
    images = statistics["images"]
    share = images["written"] / max(1, images["read"])
    rows.append(
        f"<tr><td>images</td><td>{images['read']}</td><td>{images['written']}</td>"
        f"<td>{images['rejected']}</td><td>{share:.1%}</td></tr>"
    )
    threshold = statistics["settings"]["threshold"]
    plots = [
        f'<div><p>{kind}: matching probability from 0 to 1</p><div class="bars">'
        + _bars(statistics[kind]["score_histogram"], threshold)
        + "</div></div>"
        for kind in (WEB, SYNTHETIC)
    ]
    return (
        "<table><tr><th></th><th>read</th><th>kept</th><th>dropped</th><th>kept</th></tr>"
        f"{''.join(rows)}</table><p>Kept from a matching probability of {threshold} on.</p>"
        f'<div class="plots">{"".join(plots)}</div>'
    )


def _bars(counts: list[int], threshold: float) -> str:
    most = max(*counts, 1)
    return "".join(
        f'<i class="{"low" if (n + 1) / len(counts) <= threshold else ""}" title="{count}" '
        f'style="height:{100 * count / most:.0f}%"></i>'
        for n, count in enumerate(counts)
    )
