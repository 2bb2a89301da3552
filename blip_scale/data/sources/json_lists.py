"""Read JSON lists item by item: one array, or one object per line.

A UTF-8 file that is not compressed can be read from any item on, others from their start.
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
"""A .gz list that becomes larger and more than so many times its size is refused. Lists of URLs and
captions become 3 to 10 times as large; a hostile file can become 1,000 times as large."""
MakePair = Callable[[int, Any], Found]
"""make(number, item): the pair of an item; picklable."""
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

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed, so that it can be read only from its start."""
        return self.location.endswith(".gz")

    def open(self, offset: int = 0) -> IO[bytes]:
        """Open the file at a byte.

        Raises:
            ChangedList: the file was written since `at`.
            RefusedInput: when it is read, a compressed file becomes too large.
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
    """The content of a .gz file, up to the size at which the file is refused."""

    def __init__(self, file: gzip.GzipFile, location: str) -> None:
        super().__init__()
        self._file, self._location = file, location
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            content = self._file.read1(len(buffer))  # `read` loses what is before a damage
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
    """The lines of a file with their ends.

    Raises:
        RefusedInput: a line is longer than any item.
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
    """`array` or `lines`; "" where the file has to be parsed whole."""
    encoding: str
    """Python's name of the encoding."""
    content: str
    """Description of the items, for errors."""

    @classmethod
    def open(cls, location: str, content: str = "{image, caption}") -> JsonList:
        """Look at the beginning of a file."""
        file = ListFile.at(location)
        return cls(file, *_form(file), content)

    @property
    def is_streamed(self) -> bool:
        """Whether the file can be read from any item on."""
        return bool(self.form) and self.encoding == "utf-8" and not self.file.is_packed

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
    """Chunks of the items of lists, each with what makes its items pairs.

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
    """Whether a file begins as a JSON array does."""
    return _start(ListFile.at(location))[0] == "["


def _start(file: ListFile) -> tuple[str, str]:
    """First character of a JSON file, "" if there is none near its start, and the encoding."""
    with file.open() as opened:
        head = opened.read(_HEAD_BYTES)
    encoding = json.detect_encoding(head).removesuffix("-sig")
    return head.decode(encoding, "ignore").removeprefix("\ufeff").lstrip()[:1], encoding


def _form(file: ListFile) -> tuple[str, str]:
    """Form and encoding of a list."""
    start, encoding = _start(file)
    if start == "[":
        return "array", encoding
    if encoding != "utf-8" or start != "{":
        return "", encoding
    with file.open() as opened:
        lines = filter(None, map(bytes.strip, lines_of(opened, file.location)))
        # A line that is an object, with others after it, is no part of one JSON text.
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
    """First byte and content of every item; `offset` and `number` are those of the first."""
    for line in lines_of(file, location):
        if line.strip():
            number += 1
            yield offset, parse_at(line.removesuffix(b"\n"), f"{location}:{number}")
        offset += len(line)


def _read_array(
    file: IO[bytes], location: str, offset: int, encoding: str
) -> Iterator[tuple[int, Any]]:
    """First byte and content of every item from the one at `offset` on; 0 is the array's start."""
    with _named_errors(location, file, encoding):
        text = _Text(file, offset, encoding)
        yield from _array_items(text, is_inside=bool(offset))
        if text.next():
            raise text.error("Extra data")


def _array_items(text: _Text, is_inside: bool = False) -> Iterator[tuple[int, Any]]:
    """First byte and content of the items of the array at the current place, which are passed over.

    `is_inside`: the place is that of an item, not that of the array.
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
    """Number of the item; -1: the member itself, before its items."""
    value: Any
    """An empty list for an array itself."""


@dataclass(frozen=True)
class JsonObject:
    """A file with a JSON object whose members may be long arrays."""

    file: ListFile
    encoding: str
    """Python's name of the encoding."""
    inside: str = ""
    """Name of a member whose own members are read in its place, as `data.questions`."""

    @classmethod
    def open(cls, location: str, inside: str = "") -> JsonObject | None:
        """Look at the beginning of a file; None if it does not begin as an object does."""
        file = ListFile.at(location)
        start, encoding = _start(file)
        return cls(file, encoding, inside) if start == "{" else None

    def read(self) -> Iterator[Member]:
        """Read all members, of which one item is held at a time.

        Raises:
            ValueError: the file is not JSON, or a name comes twice.
        """
        location = self.file.location
        with self.file.open() as file, _named_errors(location, file, self.encoding):
            text = _Text(file, 0, self.encoding)
            yield from self._members(text, "")
            if text.next():
                raise text.error("Extra data")

    def items(self, name: str) -> Iterator[Any]:
        """The items of an array."""
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
    """Context manager that names the file in errors of its content."""
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
    """The text of a file, of which only what is around the current place is held."""

    def __init__(self, file: IO[bytes], offset: int, encoding: str) -> None:
        """`file`: opened at the byte `offset`, which is 0 in another encoding than UTF-8."""
        self.offset = offset
        """First byte of the current place."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
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
