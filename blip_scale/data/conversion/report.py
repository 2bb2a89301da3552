"""What is known of a converted chunk: its shards, ids, counts and rejects, as one JSON file.

A chunk is converted when its report is there; the report is written after the shards.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from blip_scale.data.conversion.pairs import Reason, Reject

REPORTS = "chunks/"
LONGEST_CONTENT = 200
"""Characters of an id or a detail in a reject: bad input may hold whole files there."""


@dataclass
class Counts:
    """read = written + rejected, of pairs and of captions."""

    read: int = 0
    written: int = 0
    rejected: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.read + other.read, self.written + other.written, self.rejected + other.rejected
        )


@dataclass
class Report:
    """Of one chunk."""

    number: int
    name: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the MDS index."""
    shard_captions: list[list[int] | None] = field(default_factory=list)
    """Captions of every sample, by shard, as the index has them."""
    ids: list[str] = field(default_factory=list)
    """Of the samples, in the order of the shards."""
    rejects: list[Reject] = field(default_factory=list)
    pairs: Counts = field(default_factory=Counts)
    captions: Counts = field(default_factory=Counts)
    reencoded: int = 0
    """Images that were turned or scaled."""
    tallies: dict[str, int] = field(default_factory=dict)
    """See `Screened`."""

    @property
    def reasons(self) -> Counter[str]:
        return Counter(str(reject.reason) for reject in self.rejects)

    @property
    def shard_names(self) -> list[str]:
        return [shard["raw_data"]["basename"] for shard in self.shards]

    def to_json(self) -> str:
        rejects = [reject_fields(reject) for reject in self.rejects]
        return json.dumps(asdict(self) | {"rejects": rejects}, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        fields = json.loads(text)
        rejects = [
            Reject(**(reject | {"reason": Reason(reject["reason"])}))
            for reject in fields.pop("rejects")
        ]
        pairs, captions = Counts(**fields.pop("pairs")), Counts(**fields.pop("captions"))
        return cls(**fields, pairs=pairs, captions=captions, rejects=rejects)


def report_name(number: int) -> str:
    return f"{REPORTS}{number:06}.json"


def reject_fields(reject: Reject) -> dict[str, Any]:
    """As a line of rejects.jsonl; what is empty is left out, what is long is cut."""
    fields = {key: value for key, value in asdict(reject).items() if value not in ("", None)}
    if not reject.captions:
        fields.pop("captions")
    for key in ("id", "detail"):
        if key in fields:
            fields[key] = shortened(fields[key])
    return fields


def example_of(reject: Reject) -> str:
    """A reject in a line, for people."""
    return shortened(f"{reject.id}: {reject.detail}" if reject.detail else reject.id)


def shortened(text: str, longest: int = LONGEST_CONTENT) -> str:
    """A text that was cut shows it."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
