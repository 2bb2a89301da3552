"""Icons of the package diagrams: their path is the only text, as noisy as the web's captions."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

STYLE = "diagrams"
ATTRIBUTION = (
    "Icons of the package diagrams (https://diagrams.mingrammer.com), licence MIT; the logos and "
    "icons in it belong to their vendors."
)


def icons() -> list[tuple[Path, str]]:
    """(PNG file, caption) of every icon; resources/aws/compute/ec2.png says 'aws compute ec2'."""
    folder = Path(str(distribution("diagrams").locate_file("resources")))
    return [(path, caption_of(path.relative_to(folder))) for path in sorted(folder.rglob("*.png"))]


def caption_of(path: Path) -> str:
    """The words of a path: folders and stem, with - and _ taken as spaces."""
    return " ".join(path.with_suffix("").parts).replace("-", " ").replace("_", " ")
