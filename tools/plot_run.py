"""Plot a run: losses, held-out recall, and held-out images with their captions.

python tools/plot_run.py runs/demo docs/images/demo.png
It reads metrics.jsonl, summary.json and recipe.yaml of the run, and the shards of its held-out
sets. The file extension selects the format of the picture (.png, .svg, .pdf).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from blip_scale.commands.command_line import Parser, refuse, report_error
from blip_scale.config import exit_codes, recipe
from blip_scale.config.recipe import Recipe
from blip_scale.data.heldout.pairs import heldout_pairs
from blip_scale.errors import RefusedInput
from blip_scale.storage import run_folder
from blip_scale.storage.output_files import OVERWRITE_HELP, check_output, written_whole
from blip_scale.storage.untrusted import parse_json

LOSSES = {"loss/itc": "ITC", "loss/lm": "LM", "loss/itm": "ITM"}
RECALLS = {
    "itc_image_to_text_r10": "image to text R@10",
    "itc_text_to_image_r10": "text to image R@10",
    "itc_image_to_text_r1": "image to text R@1",
    "itc_text_to_image_r1": "text to image R@1",
}
DRAWN_PIXELS = 144
"""Side of a held-out image in the picture."""
PICTURES = (".png", ".svg", ".pdf")
"""Supported file extensions of the picture."""
COLUMNS = 6
"""Number of captioned images per row."""

Points = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl, by step."""


@dataclass(frozen=True)
class Captioned:
    """A held-out image with the caption that the run wrote for it."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    caption: str
    truth: str
    is_exact: bool
    """Whether the run counts the caption as exactly correct."""


def main(arguments: Sequence[str] | None = None, prog: str = "plot_run.py") -> int:
    """Write the picture and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("run", type=Path, help="output folder of the run")
    parser.add_argument("picture", type=Path, help="file to write")
    parser.add_argument("--set", default="", help="held-out set (default: the recipe's first)")
    parser.add_argument("--images", type=int, default=12, help="captioned images (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    options = parser.parse_args(arguments)
    try:
        import matplotlib as _  # noqa: F401
    except ModuleNotFoundError as error:
        return refuse(prog, f"{error}; in a clone, run `pip install matplotlib`")
    try:
        check_output(options.picture, options.overwrite)
        if options.picture.suffix not in PICTURES:
            raise RefusedInput(f"{options.picture}: expected a name in {', '.join(PICTURES)}")
        points = read_points(options.run / run_folder.METRICS)
        settings = recipe.load(str(options.run / run_folder.RECIPE))
        name = set_of(settings, options.set)
        summary = options.run / run_folder.SUMMARY
        entries = parse_json(summary.read_bytes())["captions"] if summary.is_file() else []
        captioned = captioned_images(settings, name, entries, options.images)
        if not captioned:
            print(f"{prog}: no captions of {name} in {summary}: curves only", file=sys.stderr)
        draw(points, name, captioned, options.picture)
    except (OSError, ValueError, KeyError) as error:
        return report_error(prog, error)
    print(f"{options.picture}: {len(points)} points, {len(captioned)} captions")
    return exit_codes.DONE


def read_points(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, sorted by step.

    Raises:
        RefusedInput: a line is not a JSON object, or the file is empty.
    """
    points = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            points.append({"step": 0, **json.loads(line)})
        except (ValueError, TypeError) as error:
            raise RefusedInput(f"{file}:{number}: not a JSON object: {line[:60]!r}") from error
    if not points:
        raise RefusedInput(f"{file}: the run has logged nothing yet")
    return sorted(points, key=lambda point: point["step"])


def curve(points: Points, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, only those logged and finite."""
    logged = [point for point in points if point.get(name) is not None]
    return [point["step"] for point in logged], [float(point[name]) for point in logged]


def set_of(settings: Recipe, name: str) -> str:
    """Choose the held-out set to show.

    Raises:
        RefusedInput: the recipe has no held-out set of this name, or none at all.
    """
    names = [stream.name for stream in settings.data.heldout]
    if not names:
        raise RefusedInput("the run has no held-out set to show (data.heldout of its recipe)")
    if name and name not in names:
        raise RefusedInput(f"--set {name}: the run has the held-out sets {', '.join(names)}")
    return name or names[0]


def captioned_images(
    settings: Recipe, name: str, entries: Iterable[Mapping[str, Any]], most: int
) -> list[Captioned]:
    """First captions of a set in summary.json, with their images from the shards.

    Raises:
        FileNotFoundError: the held-out shards are missing.
        RefusedInput: the shards lack an image that the summary names.
    """
    chosen = [entry for entry in entries if entry["set"] == name][:most]
    if not chosen:
        return []
    (stream,) = [stream for stream in settings.data.heldout if stream.name == name]
    pairs = heldout_pairs(stream, DRAWN_PIXELS, settings.data)
    place_of = {image: place for place, image in enumerate(pairs.ids)}
    missing = [entry["id"] for entry in chosen if entry["id"] not in place_of]
    if missing:
        raise RefusedInput(
            f"{stream.local} does not hold the image {missing[0]}, which the summary names: the "
            "data have changed since the run"
        )
    images = pairs.images(place_of[entry["id"]] for entry in chosen)
    rows = images.permute(0, 2, 3, 1).numpy()
    captioned = []
    for pixels, entry in zip(rows, chosen, strict=True):
        caption, truth = entry["caption"], entry["truth"]
        # Summaries of older runs lack the marks of exact captions.
        captioned.append(Captioned(pixels, caption, truth, entry.get("exact", caption == truth)))
    return captioned


def draw(points: Points, name: str, captioned: Sequence[Captioned], file: Path) -> None:
    """Draw two charts with rows of captioned images below, and write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(captioned) // COLUMNS)
    heights = [3.2, 1.75 * rows] if rows else [3.2]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    losses, recalls = upper.subplots(1, 2)
    for metric, label in LOSSES.items():
        losses.plot(*curve(points, metric), label=label)
    losses.set(title="training losses", xlabel="step", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("")
    for metric, label in RECALLS.items():
        steps, shares = curve(points, f"{name}/{metric}")
        style = "-" if "r10" in metric else "--"
        recalls.plot(steps, [100 * share for share in shares], style, marker=".", label=label)
    recalls.set(title=f"held-out recall, {name}", xlabel="step", ylabel="percent", ylim=(0, None))
    steps, candidates = curve(points, f"{name}/candidates")
    chance = [10 * 100 / count for count in candidates]
    recalls.plot(steps, chance, ":", color="grey", label="chance R@10")
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    for panel in lower:
        panel.suptitle(
            "held-out images: generated caption (green: exactly correct), true caption in grey",
            fontsize="medium",
        )
        draw_images(panel.subplots(rows, COLUMNS, squeeze=False).flat, captioned)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as place:
        figure.savefig(place, dpi=110, format=file.suffix.lstrip("."))
    pyplot.close(figure)


def draw_images(cells: Iterable[Any], captioned: Sequence[Captioned]) -> None:
    """Draw an image in each of matplotlib's axes. Exactly correct captions are green."""
    for index, axes in enumerate(cells):
        axes.set_axis_off()
        if index < len(captioned):
            item = captioned[index]
            color = "green" if item.is_exact else "black"
            axes.imshow(item.pixels)
            lines = ((item.caption, color, -0.04), (item.truth, "grey", -0.2))
            for text, ink, top in lines:
                axes.text(
                    0.5, top, shortened(text), transform=axes.transAxes, color=ink,
                    fontsize=8, ha="center", va="top",
                )  # fmt: skip


def shortened(text: str, most: int = 23) -> str:
    """Shorten a text to fit below an image, and escape $, matplotlib's sign of a formula."""
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace("$", r"\$")


if __name__ == "__main__":
    sys.exit(main())
