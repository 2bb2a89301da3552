"""Read JSON lists item by item: one array, or one object per line.

Reading can start at any item of an uncompressed UTF-8 file. Other files are read from their start.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError
from typing import IO, Any, AnyStr, NamedTuple

from blip_scale.data.conversion.lists import ChangedList, in_chunks, listed
from blip_scale.data.conversion.pairs import (
    LARGEST_FILE_BYTES,
    START,
    Chunk,
    Found,
    Place,
    Source,
)
from blip_scale.data.sources.annotations import load_list, parse_at, read_item
from blip_scale.errors import RefusedInput
from blip_scale.storage.locations import file_version, open_file

_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
_UNPACKED_BYTES, _UNPACKED_RATIO = 1 << 30, 100
"""Limits for a .gz list: it is refused if it unpacks to more than this size and this multiple of
its compressed size. Lists of URLs and captions grow 3 to 10 times; a hostile file can grow 1,000
times."""
MakePair = Callable[[int, Any], Found]
"""make(number, item): return the pair of an item. It must be picklable."""
_SPACE = re.compile(r"[ \t\n\r]*")
_decode_from = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class ListFile:
    """File of a list. It must not change while its conversion is running."""

    location: str
    version: str
    """See `file_version`."""

    @classmethod
    def at(cls, location: str) -> ListFile:
        """Record the location and the current version of a file."""
        return cls(location, file_version(location))

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed. If so, it can be read only from its start."""
        return self.location.endswith(".gz")

    def open(self, offset: int = 0) -> IO[bytes]:
        """Open the file and seek to a byte.

        Raises:
            ChangedList: the file was modified after `at`.
            RefusedInput: a compressed file becomes too large. Raised while it is read.
        """
        if file_version(self.location) != self.version:
            raise ChangedList(
                f"{self.location} has changed since its conversion began: convert it again with "
                "--overwrite"
            )
        file = open_file(self.location)
        if isinstance(file, gzip.GzipFile):
            return io.BufferedReader(_Unpacked(file, self.location), _BLOCK_BYTES)
        if offset:
            file.seek(offset)
        return file


class _Unpacked(io.RawIOBase):
    """Decompressed stream of a .gz file. Raises RefusedInput if it becomes too large."""

    def __init__(self, file: gzip.GzipFile, location: str) -> None:
        super().__init__()
        self._file, self._location = file, location
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            content = self._file.read1(len(buffer))  # `read` would lose data before a damage
        except gzip.BadGzipFile as error:
            raise gzip.BadGzipFile(f"{self._location}: {error}") from error
        buffer[: len(content)] = content
        self._bytes += len(content)
        packed_bytes: int = self._file.fileobj.tell()  # type: ignore[union-attr]
        if self._bytes > max(_UNPACKED_BYTES, _UNPACKED_RATIO * packed_bytes):
            raise RefusedInput(
                f"{self._location}: {packed_bytes / 1e6:.0f} MB of it unpack to more than "
                f"{self._bytes / 1e6:.0f} MB, as an attack on the disk would: unpack it yourself "
                "if that is right"
            )
        return len(content)

    def tell(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._file.close()
        super().close()


def lines_of(file: IO[AnyStr], location: str) -> Iterator[AnyStr]:
    """Yield the lines of a file with their line endings.

    Raises:
        RefusedInput: a line is too long for an item (`LARGEST_FILE_BYTES`).
    """
    number = 0
    while line := file.readline(LARGEST_FILE_BYTES):
        number += 1
        if len(line) == LARGEST_FILE_BYTES:
            raise RefusedInput(
                f"{location}:{number} has more than {LARGEST_FILE_BYTES / 1e6:.0f} MB in a line: "
                "remove it"
            )
        yield line


@dataclass(frozen=True)
class JsonList:
    """A file with a JSON list."""

    file: ListFile
    form: str
    """`array` or `lines`; "" if the file must be parsed as a whole."""
    encoding: str
    """Name of the encoding in Python."""
    content: str
    """Description of the items, for errors."""

    @classmethod
    def open(cls, location: str, content: str = "{image, caption}") -> JsonList:
        """Detect form and encoding from the beginning of a file."""
        file = ListFile.at(location)
        return cls(file, *_form(file), content)

    @property
    def is_streamed(self) -> bool:
        """Whether reading can start at any item."""
        return bool(self.form) and self.encoding == "utf-8" and not self.file.is_packed

    def read(self, offset: int = 0, number: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Yield first byte, index and content of the items, beginning at one of them.

        Args:
            offset: first byte of the item to begin at.
            number: index of this item, counted from 0.

        Raises:
            ValueError: the file does not hold a list. The message names the place.
        """
        location = self.file.location
        if not self.form:
            for index, item in enumerate(load_list(location, self.content)):
                yield 0, index, item
            return
        with self.file.open(offset) as opened:
            items = _read_lines(opened, location, offset, number)
            if self.form == "array":
                items = _read_array(opened, location, offset, self.encoding)
            for place, item in items:
                yield place, number, item
                number += 1


def pairs_in_chunks(source: Source, lists: Sequence[tuple[JsonList, MakePair]]) -> Iterator[Chunk]:
    """Return the chunks of several lists, each with a function that makes pairs of its items.

    Raises:
        ValueError: a file does not hold a list.
    """
    is_streamed = all(json_list.is_streamed for json_list, _ in lists)
    pairs = listed(partial(_read_lists, lists), is_streamed, source.scratch)
    return in_chunks(pairs, source.pairs_per_chunk)


def _read_lists(
    lists: Sequence[tuple[JsonList, MakePair]], start: Place
) -> Iterator[tuple[Place, Found]]:
    for number in range(start.file, len(lists)):
        json_list, make = lists[number]
        location = json_list.file.location
        first = start if number == start.file else START
        for offset, index, item in json_list.read(first.offset, first.number):
            yield Place(number, offset, index), read_item(location, index, item, make)


def is_array(location: str) -> bool:
    """Whether a file begins like a JSON array."""
    return _start(ListFile.at(location))[0] == "["


def _start(file: ListFile) -> tuple[str, str]:
    """Return first character ("" if none is near the start) and encoding of a JSON file."""
    with file.open() as opened:
        head = opened.read(_HEAD_BYTES)
    encoding = json.detect_encoding(head).removesuffix("-sig")
    return head.decode(encoding, "ignore").removeprefix("\ufeff").lstrip()[:1], encoding


def _form(file: ListFile) -> tuple[str, str]:
    """Return form and encoding of a list (see `JsonList`)."""
    start, encoding = _start(file)
    if start == "[":
        return "array", encoding
    if encoding != "utf-8" or start != "{":
        return "", encoding
    with file.open() as opened:
        lines = filter(None, map(bytes.strip, lines_of(opened, file.location)))
        # If the first line is a whole object and more lines follow, each line is an item.
        is_lines = _is_object(next(lines)) and next(lines, b"")
    return "lines" if is_lines else "", encoding


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_at(line, ""), dict)
    except ValueError:
        return False


def _read_lines(
    file: IO[bytes], location: str, offset: int, number: int
) -> Iterator[tuple[int, Any]]:
    """Yield first byte and content of every item, given offset and number of the first."""
    for line in lines_of(file, location):
        if line.strip():
            number += 1
            yield offset, parse_at(line.removesuffix(b"\n"), f"{location}:{number}")
        offset += len(line)


def _read_array(
    file: IO[bytes], location: str, offset: int, encoding: str
) -> Iterator[tuple[int, Any]]:
    """Yield first byte and content of the items from `offset` on; 0 is the start of the array."""
    with _named_errors(location, file, encoding):
        text = _Text(file, offset, encoding)
        yield from _array_items(text, is_inside=bool(offset))
        if text.next():
            raise text.error("Extra data")


def _array_items(text: _Text, is_inside: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield first byte and content of the items of an array, and move behind the array.

    The current place is the array's start or, with `is_inside`, the start of one of its items.
    """
    if not is_inside:
        text.take("[", "Expecting value")
    is_item = is_inside or text.next() != "]"
    while is_item:
        text.next()
        yield text.offset, text.value()
        is_item = text.next() != "]"
        if is_item:
            text.take(",", "Expecting ',' delimiter")
    text.take("]", "")


class Member(NamedTuple):
    """A value in a JSON object, or an item of an array in it."""

    name: str
    number: int
    """Index of the item; -1 for the member itself, which comes before its items."""
    value: Any
    """Parsed value; an empty list if the member is an array."""


@dataclass(frozen=True)
class JsonObject:
    """A file with a JSON object whose members may be long arrays."""

    file: ListFile
    encoding: str
    """Name of the encoding in Python."""
    inside: str = ""
    """Name of a nested object, such as `data`. Its members are read separately, under names such as
    `data.questions`."""

    @classmethod
    def open(cls, location: str, inside: str = "") -> JsonObject | None:
        """Open a file, or return None if it does not begin like a JSON object."""
        file = ListFile.at(location)
        start, encoding = _start(file)
        return cls(file, encoding, inside) if start == "{" else None

    def read(self) -> Iterator[Member]:
        """Yield all members, with only one item in memory at a time.

        Raises:
            ValueError: the file is not JSON, or a name occurs twice.
        """
        location = self.file.location
        with self.file.open() as file, _named_errors(location, file, self.encoding):
            text = _Text(file, 0, self.encoding)
            yield from self._members(text, "")
            if text.next():
                raise text.error("Extra data")

    def items(self, name: str) -> Iterator[Any]:
        """Yield the items of the array `name`."""
        return (m.value for m in self.read() if m.name == name and m.number >= 0)

    def _members(self, text: _Text, prefix: str) -> Iterator[Member]:
        text.take("{", "Expecting value")
        names: set[str] = set()
        is_member = text.next() != "}"
        while is_member:
            if text.next() != '"':
                raise text.error("Expecting property name enclosed in double quotes")
            key = text.value()
            if key in names:
                raise text.error(f"The name {key!r} comes twice")
            names.add(key)
            text.take(":", "Expecting ':' delimiter")
            start, name = text.next(), prefix + key
            if start == "{" and name == self.inside:
                yield from self._members(text, f"{name}.")
            elif start == "[":
                yield Member(name, -1, [])
                for number, (_, item) in enumerate(_array_items(text)):
                    yield Member(name, number, item)
            else:
                yield Member(name, -1, text.value())
            is_member = text.next() != "}"
            if is_member:
                text.take(",", "Expecting ',' delimiter")
        text.take("}", "")


@contextlib.contextmanager
def _named_errors(location: str, file: IO[bytes], encoding: str) -> Iterator[None]:
    """Context manager that adds the file's name to errors about its content."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{location} is not JSON: it is nested too deep") from error
    except JSONDecodeError as error:
        raise ValueError(f"{location} is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        byte = file.tell() - len(error.object) + error.start
        name = encoding.upper()
        raise ValueError(f"{location} is not JSON: byte {byte} is not {name}") from error


class _Text:
    """Text of a file, with only the part around the current place in memory."""

    def __init__(self, file: IO[bytes], offset: int, encoding: str) -> None:
        """`file` is opened at the byte `offset`, which must be 0 unless the encoding is UTF-8."""
        self.offset = offset
        """First byte of the current place."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._text, self._at = "", 0
        self._is_whole = False
        self._passed = self._lines = self._column = 0
        """Position of `_text` in the file: characters, line feeds, and characters of its first line
        before it."""
        if not offset:
            self._fill()
            self._advance(int(self._text.startswith("\ufeff")))

    def next(self) -> str:
        """Skip white space, and return the next character, or "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "white space may be empty"
            self._advance(space.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def take(self, character: str, problem: str) -> None:
        """Skip white space and an expected character. Raise an error at any other character."""
        if self.next() != character:
            raise self.error(problem)
        self._advance(self._at + 1)

    def value(self) -> Any:
        """Parse the value at the current place, and move behind it."""
        while True:
            try:
                value, end = _decode_from(self._text, self._at)
            except JSONDecodeError as error:
                # The value may continue beyond the text in memory.
                is_long = len(self._text) - self._at > LARGEST_FILE_BYTES
                if is_long or not self._fill():
                    raise self.error(error.msg, error.pos) from error
                continue
            # The end of the text in memory may cut a number, such as 1e+5 after the 1.
            if end + 2 < len(self._text) or not self._fill():
                self._advance(end)
                return value

    def error(self, problem: str, position: int | None = None) -> JSONDecodeError:
        """Make an error for a position in `_text`; None for the current place."""
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
        """Read more text, and return False at the end of the file."""
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
