"""Report of a converted chunk: shards, ids, counts and rejects, in one JSON file.

The report is written after the shards of its chunk, so a chunk with a report is complete.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from blip_scale.data.conversion.pairs import Reason, Reject

REPORTS = "chunks/"
LONGEST_CONTENT = 200
"""Maximum number of characters of an id or a detail in a reject. Bad input may put a whole file
there."""


@dataclass
class Counts:
    """Counts of pairs or of captions: read = written + held_out + rejected."""

    read: int = 0
    written: int = 0
    rejected: int = 0
    held_out: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.read + other.read,
            self.written + other.written,
            self.rejected + other.rejected,
            self.held_out + other.held_out,
        )

    def fields(self, with_held_out: bool) -> dict[str, int]:
        """Return the counts by name, for a summary."""
        counts = asdict(self)
        if not with_held_out:
            del counts["held_out"]
        return counts


@dataclass
class Report:
    """Result of converting one chunk."""

    number: int
    name: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the MDS index."""
    shard_captions: list[list[int] | None] = field(default_factory=list)
    """Number of captions of every sample, by shard, in the format of the index."""
    roles: dict[str, int] = field(default_factory=dict)
    """Number of written captions by role; empty if the source has no roles."""
    ids: list[str] = field(default_factory=list)
    """Ids of the samples, in the order of the shards."""
    keys: dict[str, list[int]] = field(default_factory=dict)
    """Keys of the samples' images (`holdout.image_keys`), aligned with `ids`; empty if no pairs are
    held out."""
    held_out: list[str] = field(default_factory=list)
    """Ids that were moved to the held-out set."""
    rejects: list[Reject] = field(default_factory=list)
    pairs: Counts = field(default_factory=Counts)
    captions: Counts = field(default_factory=Counts)
    reencoded: int = 0
    """Number of images that were rotated or scaled."""
    tallies: dict[str, int] = field(default_factory=dict)
    """Counts that are summed over the set (see `Screened`)."""

    def drop(self, ids: set[str]) -> None:
        """Remove samples from the report. The caller rewrites their shards."""
        kept = [position for position, name in enumerate(self.ids) if name not in ids]
        self.ids = [self.ids[position] for position in kept]
        for key, values in self.keys.items():
            self.keys[key] = [values[position] for position in kept]

    @property
    def reasons(self) -> Counter[str]:
        """Number of rejects for each reason."""
        return Counter(str(reject.reason) for reject in self.rejects)

    @property
    def shard_names(self) -> list[str]:
        """File names of the shards."""
        return [shard["raw_data"]["basename"] for shard in self.shards]

    def to_json(self) -> str:
        """Return the content of the report's file."""
        rejects = [reject_fields(reject) for reject in self.rejects]
        return json.dumps(asdict(self) | {"rejects": rejects}, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Parse the content of a report's file."""
        fields = json.loads(text)
        rejects = [
            Reject(**(reject | {"reason": Reason(reject["reason"])}))
            for reject in fields.pop("rejects")
        ]
        pairs, captions = Counts(**fields.pop("pairs")), Counts(**fields.pop("captions"))
        return cls(**fields, pairs=pairs, captions=captions, rejects=rejects)


def report_name(number: int) -> str:
    """Return the file name of a chunk's report."""
    return f"{REPORTS}{number:06}.json"


def reject_fields(reject: Reject) -> dict[str, Any]:
    """Return the fields of a line in rejects.jsonl. Omit empty fields and shorten long ones."""
    fields = {key: value for key, value in asdict(reject).items() if value not in ("", None)}
    if not reject.captions:
        fields.pop("captions")
    for key in ("id", "detail"):
        if key in fields:
            fields[key] = shortened(fields[key])
    return fields


def example_of(reject: Reject) -> str:
    """Describe a reject in one line, for the user."""
    return shortened(f"{reject.id}: {reject.detail}" if reject.detail else reject.id)


def shortened(text: str, longest: int = LONGEST_CONTENT) -> str:
    """Return the text, cut and ended with an ellipsis if it is too long."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
