"""Read JSON lists item by item: one array, or one object per line.

A UTF-8 file that is not compressed can be read from any item on. Other files are parsed whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from typing import IO, Any

from blip_scale.data.conversion.lists import ChangedList
from blip_scale.data.conversion.pairs import LARGEST_FILE_BYTES
from blip_scale.data.sources.annotations import load_list, parse_at
from blip_scale.storage.locations import file_version, open_file

_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
_SPACE = re.compile(r"[ \t\n\r]*")
_decode_from = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class ListFile:
    """The file of a list, which must stay as it is while its conversion is running."""

    location: str
    version: str
    """See `file_version`."""

    @classmethod
    def at(cls, location: str) -> ListFile:
        """The file as it is now."""
        return cls(location, file_version(location))

    def open(self, offset: int = 0) -> IO[bytes]:
        """Open the file at a byte.

        Raises:
            ChangedList: the file was written since `at`.
        """
        if file_version(self.location) != self.version:
            raise ChangedList(
                f"{self.location} has changed since its conversion began: convert it again with "
                "--overwrite"
            )
        file = open_file(self.location)
        if offset:
            file.seek(offset)
        return file


@dataclass(frozen=True)
class JsonList:
    """A file with a JSON list."""

    file: ListFile
    form: str
    """`array` or `lines`; "" where the file has to be parsed whole."""

    @classmethod
    def open(cls, location: str) -> JsonList:
        """Look at the beginning of a file."""
        file = ListFile.at(location)
        return cls(file, _form(file))

    def read(self, offset: int = 0, number: int = 0) -> Iterator[tuple[int, int, Any]]:
        """First byte, number and content of every item, from one of them on.

        Args:
            offset: first byte of the item.
            number: number of the item, counted from 0.

        Raises:
            ValueError: the file does not hold a list. The message names the place.
        """
        location = self.file.location
        if not self.form:
            for index, item in enumerate(load_list(location, "{image, caption}")):
                yield 0, index, item
            return
        read = _read_array if self.form == "array" else _read_lines
        with self.file.open(offset) as opened:
            for place, item in read(opened, location, offset, number):
                yield place, number, item
                number += 1


def _form(file: ListFile) -> str:
    if file.location.endswith(".gz"):
        return ""
    with file.open() as opened:
        head = opened.read(_HEAD_BYTES)
        if json.detect_encoding(head) not in ("utf-8", "utf-8-sig"):
            return ""
        if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return "array"
        if not head.lstrip().startswith(b"{"):
            return ""
        opened.seek(0)
        lines = filter(None, map(bytes.strip, opened))
        # A line that is an object, with others after it, is no part of one JSON text.
        return "lines" if _is_object(next(lines)) and next(lines, b"") else ""


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_at(line, ""), dict)
    except ValueError:
        return False


def _read_lines(
    file: IO[bytes], location: str, offset: int, number: int
) -> Iterator[tuple[int, Any]]:
    """First byte and content of every item; `offset` and `number` are those of the first."""
    for line in file:
        if line.strip():
            number += 1
            yield offset, parse_at(line.removesuffix(b"\n"), f"{location}:{number}")
        offset += len(line)


def _read_array(
    file: IO[bytes], location: str, offset: int, number: int
) -> Iterator[tuple[int, Any]]:
    """First byte and content of every item from the one at `offset` on; 0 is the array's start."""
    try:
        text = _Text(file, offset)
        if not offset:
            text.take("[", "Expecting value")
        is_item = bool(offset) or text.next() != "]"
        while is_item:
            text.next()
            yield text.offset, text.value()
            is_item = text.next() != "]"
            if is_item:
                text.take(",", "Expecting ',' delimiter")
        text.take("]", "")
        if text.next():
            raise text.error("Extra data")
    except RecursionError as error:
        raise ValueError(f"{location} is not JSON: it is nested too deep") from error
    except JSONDecodeError as error:
        raise ValueError(f"{location} is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        byte = file.tell() - len(error.object) + error.start
        raise ValueError(f"{location} is not JSON: byte {byte} is not UTF-8") from error


class _Text:
    """The text of a file, of which only what is around the current place is held."""

    def __init__(self, file: IO[bytes], offset: int) -> None:
        """`file`: opened at the byte `offset`."""
        self.offset = offset
        """First byte of the current place."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self._text, self._at = "", 0
        self._is_whole = False
        self._passed = self._lines = self._column = 0
        """Characters and line ends before `_text`, and characters of its line before it."""
        if not offset:
            self._fill()
            self._advance(int(self._text.startswith("\ufeff")))

    def next(self) -> str:
        """Pass over white space; returns the next character, "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "white space may be empty"
            self._advance(space.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def take(self, character: str, problem: str) -> None:
        """Pass over a character; another one is a problem."""
        if self.next() != character:
            raise self.error(problem)
        self._advance(self._at + 1)

    def value(self) -> Any:
        """Parse the value at the current place, and pass over it."""
        while True:
            try:
                value, end = _decode_from(self._text, self._at)
            except JSONDecodeError as error:
                # The value may go on beyond what was read.
                is_long = len(self._text) - self._at > LARGEST_FILE_BYTES
                if is_long or not self._fill():
                    raise self.error(error.msg, error.pos) from error
                continue
            # A number may be cut: the 1 of 1e+5.
            if end + 2 < len(self._text) or not self._fill():
                self._advance(end)
                return value

    def error(self, problem: str, position: int | None = None) -> JSONDecodeError:
        """An error at a position of the text that is held; None: at the current place."""
        position = self._at if position is None else position
        error = JSONDecodeError(problem, self._text, position)
        if error.lineno == 1:
            error.colno += self._column
        line, character = error.lineno + self._lines, position + self._passed
        error.args = (f"{problem}: line {line} column {error.colno} (char {character})",)
        return error

    def _advance(self, end: int) -> None:
        passed = self._text[self._at : end]
        is_ascii = passed.isascii()
        self.offset += len(passed) if is_ascii else len(passed.encode("utf-8", "surrogatepass"))
        self._at = end

    def _fill(self) -> bool:
        """Read on; returns False at the end of the file."""
        if self._is_whole:
            return False
        block = self._file.read(max(_BLOCK_BYTES, len(self._text) - self._at))
        if not block:
            self._decoder.decode(b"", final=True)
            self._is_whole = True
            return False
        ends = self._text.count("\n", 0, self._at)
        self._column = self._at + (
            -self._text.rfind("\n", 0, self._at) - 1 if ends else self._column
        )
        self._lines += ends
        self._passed += self._at
        self._text = self._text[self._at :] + self._decoder.decode(block)
        self._at = 0
        return True
