"""Captions from an external captioner, saved in one file per shard until the shard is finished.

A restarted job requests captions only for images that have none yet. It repeats little of the
captioner's work, and its output does not depend on when the job was killed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from blip_scale.capfilt.endpoint import Endpoint, NoCaption, caption_of
from blip_scale.errors import RefusedInput
from blip_scale.storage.untrusted import parse_json

_USELESS_IN_A_ROW = 64


@dataclass(frozen=True)
class Answer:
    """Caption of an image, or the reason why it has none."""

    caption: str
    problem: str = ""


class Answers:
    """Captions for the images of one shard. Use it as a context manager, which closes the file."""

    def __init__(self, endpoint: Endpoint, file: Path, seed: int) -> None:
        """Open the file of a shard and read the captions that an earlier job saved in it."""
        self._endpoint = endpoint
        self._seed = seed
        self._captions: dict[str, str] = {}
        self._useless = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            self._captions = _read(file)
            content = file.read_bytes()
            file.write_bytes(content[: content.rfind(b"\n") + 1])  # drop an incomplete last line
        self._file: IO[str] = file.open("a", encoding="utf-8")

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()

    def of(self, samples: Sequence[dict[str, Any]]) -> list[Answer]:
        """Request captions for `samples`, with several requests at a time.

        Raises:
            RemoteError: see `caption_of`.
            RefusedInput: see `caption_of`; also if `_USELESS_IN_A_ROW` images in a row get no
                caption.
        """
        answers = []
        with ThreadPoolExecutor(self._endpoint.requests) as threads:
            futures = [threads.submit(self._ask, sample) for sample in samples]
            try:
                for sample, future in zip(samples, futures, strict=True):
                    answers.append(future.result())
                    self._keep(sample["id"], answers[-1])
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return answers

    def _ask(self, sample: dict[str, Any]) -> Answer:
        if sample["id"] in self._captions:
            return Answer(self._captions[sample["id"]])
        seed = zlib.crc32(f"{self._seed}/{sample['id']}".encode()) >> 1  # some servers want int32
        try:
            return Answer(caption_of(self._endpoint, sample["image"], seed))
        except NoCaption as error:
            return Answer("", str(error))

    def _keep(self, name: str, answer: Answer) -> None:
        self._useless = self._useless + 1 if answer.problem else 0
        if self._useless == _USELESS_IN_A_ROW:
            raise RefusedInput(
                f"the captioner {self._endpoint.url} gave no caption for {self._useless} images in "
                f"a row, last: {answer.problem}; check --captioner-model and --captioner-prompt"
            )
        if answer.caption and name not in self._captions:
            self._file.write(json.dumps({"id": name, "caption": answer.caption}) + "\n")
            self._file.flush()


def _read(file: Path) -> dict[str, str]:
    captions = {}
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            entry = parse_json(line)
            captions[str(entry["id"])] = str(entry["caption"])
        except (ValueError, TypeError, LookupError):
            continue  # damaged: the caption is requested again
    return captions
