"""HTML page with sample images, their kept and dropped captions, and a histogram of all scores."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip_scale.capfilt.filtering import SYNTHETIC, WEB
from blip_scale.data import contact_sheet
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Reason
from blip_scale.data.conversion.report import Report, report_name
from blip_scale.data.mds import parse_shard
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore

_KINDS = {Reason.WEB_UNMATCHED: WEB, Reason.SYNTHETIC_UNMATCHED: SYNTHETIC}
_STYLE = """
.bars { display: flex; align-items: flex-end; gap: 2px; height: 90px; width: 420px; }
.bars i { flex: 1; background: #8aa4bf; } .bars i.low { background: #d5a9a4; }
.plots { display: flex; gap: 3em; flex-wrap: wrap; } .plots p { margin: .3em 0; color: #59636e; }
.text.dropped { border-color: #c2554a; color: #6d3a35; text-decoration: line-through; }
.tag { font-size: 12px; color: #59636e; display: inline-block; width: 100%; }
"""


@dataclass(frozen=True)
class _Shown:
    id: str
    image: bytes
    captions: list[tuple[str, float | None, str, bool]]
    """Tuples (kind, score, text, is kept); the score is None without a filter."""


def sample_sheet(
    store: StreamStore, out: OutputFolder, statistics: dict[str, Any], shown: int, scratch: Path
) -> str:
    """Build the HTML page with embedded images. The same input gives the same bytes.

    Args:
        store: the input.
        out: the merged output.
        statistics: result of `job.run`.
        shown: number of images, evenly spaced over the input.
        scratch: folder for downloaded shards.
    """
    shown = min(shown, store.samples)
    places = store.places(i * store.samples // shown for i in range(shown))
    cards = [_card(_looked_up(store, out, place, scratch)) for place in places]
    body = (
        f"{_overview(statistics)}\n<h2>{shown} of {statistics['images']['read']} images</h2>\n"
        f"{contact_sheet.cards(cards)}"
    )
    return contact_sheet.page("CapFilt", body, _STYLE)


def _looked_up(
    store: StreamStore, out: OutputFolder, place: tuple[int, int], scratch: Path
) -> _Shown:
    """Look up a sample and its captions; chunk N of the output is shard N of the input."""
    report = Report.from_json(out.read(report_name(place[0])))
    try:
        sample = store.read(*place)
    except CorruptSample as error:
        return _Shown(
            f"{store.shard_name(place[0])}[{place[1]}]", b"", [("", 0, str(error), False)]
        )
    captions: list[tuple[str, float | None, str, bool]] = []
    if sample["id"] in report.ids:
        written = _written(report, out, report.ids.index(sample["id"]), scratch)
        for text, origin in zip(written["captions"], written["annotations"], strict=True):
            captions.append((origin["kind"], origin.get("score"), text, True))
    for reject in report.rejects:
        if reject.id == sample["id"]:
            score, _, text = reject.detail.partition(" ")
            kind = _KINDS.get(reject.reason)
            if kind:
                captions.append((kind, float(score) if score else None, text, False))
            else:
                captions.append((str(reject.reason), 0.0, reject.detail, False))
    return _Shown(sample["id"], sample["image"], captions)


def _written(report: Report, out: OutputFolder, index: int, scratch: Path) -> dict[str, Any]:
    """Read sample `index` of a chunk's output."""
    for shard in report.shards:
        if index < shard["samples"]:
            path = out.fetch(shard["raw_data"]["basename"], scratch)
            return parse_shard(path.parent, shard).read(index)
        index -= shard["samples"]
    raise IndexError(index)


def _card(shown: _Shown) -> str:
    texts = []
    for kind, score, text, kept in sorted(shown.captions, key=lambda c: c[0] == SYNTHETIC):
        shown_score = "" if score is None else f" {score:.2f}"
        texts.append(
            f'<div class="text{"" if kept else " dropped"}">{html.escape(text)}'
            f'<span class="tag">{html.escape(kind)}{shown_score}, {"kept" if kept else "dropped"}'
            "</span></div>"
        )
    return contact_sheet.card(shown.image, "".join(texts), shown.id)


def _overview(statistics: dict[str, Any]) -> str:
    """Table of kept and dropped captions, and histograms of their scores, as HTML."""
    rows, plots = [], []
    threshold = statistics["settings"]["threshold"]
    for kind in (WEB, SYNTHETIC):
        figures = statistics[kind]
        rows.append(
            f"<tr><td>{kind} captions</td><td>{figures['read']}</td><td>{figures['kept']}</td>"
            f"<td>{figures['dropped']}</td><td>{figures['kept_share']:.1%}</td></tr>"
        )
        bars = _bars(figures["score_histogram"], threshold)
        plots.append(
            f'<div><p>{kind}: matching probability from 0 to 1</p><div class="bars">{bars}'
            "</div></div>"
        )
    images = statistics["images"]
    share = images["written"] / max(1, images["read"])
    rows.append(
        f"<tr><td>images</td><td>{images['read']}</td><td>{images['written']}</td>"
        f"<td>{images['rejected']}</td><td>{share:.1%}</td></tr>"
    )
    return (
        "<table><tr><th></th><th>read</th><th>kept</th><th>dropped</th><th>share kept</th></tr>"
        f"{''.join(rows)}</table><p>Kept at a matching probability of {threshold} or more.</p>"
        f'<div class="plots">{"".join(plots)}</div>'
    )


def _bars(counts: list[int], threshold: float) -> str:
    most = max(*counts, 1)
    bars = []
    for number, count in enumerate(counts, start=1):
        style = "low" if number / len(counts) <= threshold else ""
        height = 100 * count / most
        bars.append(f'<i class="{style}" title="{count}" style="height:{height:.0f}%"></i>')
    return "".join(bars)
