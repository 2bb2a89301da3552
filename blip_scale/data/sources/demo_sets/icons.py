"""Icons of the package diagrams. Captions are made from file paths, so they are noisy, like web
captions."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

STYLE = "diagrams"
ATTRIBUTION = (
    "Icons of the package diagrams (https://diagrams.mingrammer.com), licence MIT; the logos and "
    "icons in it belong to their vendors."
)


def icons() -> list[tuple[Path, str]]:
    """Return the PNG file and the caption of every icon.

    For example, the caption of resources/aws/compute/ec2.png is 'aws compute ec2'.
    """
    folder = Path(str(distribution("diagrams").locate_file("resources")))
    return [(path, caption_of(path.relative_to(folder))) for path in sorted(folder.rglob("*.png"))]


def caption_of(path: Path) -> str:
    """Join folders and stem of a path with spaces, and replace - and _ by spaces."""
    return " ".join(path.with_suffix("").parts).replace("-", " ").replace("_", " ")
