"""Read tables of images and captions from many tools: CSV, TSV and JSON lines.

- Encodings: UTF-8 with or without a byte order mark, UTF-16 with one, or that of --encoding.
- The delimiter of a CSV may be a comma, semicolon, tab or vertical bar. A TSV has no quoting.
- A cell may hold a list of captions.

An ambiguous table is refused. The message shows the line, and the option that resolves the
ambiguity. If a row can't be read, only this row is rejected.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any, NamedTuple

from blip_scale.data.conversion.pairs import (
    START,
    Found,
    Place,
    Reason,
    Reject,
    Source,
    Unused,
)
from blip_scale.data.conversion.report import shortened
from blip_scale.data.pixels.decoding import describe
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.annotations import IMAGE_KEYS, pair_of_item, read_item
from blip_scale.data.sources.json_lists import ListFile, lines_of
from blip_scale.data.sources.metadata import SCORE_KEYS, URL_KEYS, caption_keys
from blip_scale.storage.locations import basename, extension
from blip_scale.storage.untrusted import parse_json

KINDS = ("csv", "tsv", "jsonl")
_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
_BY_LINES = re.compile(r"utf-8(-sig)?|ascii|(iso8859-|cp125|koi8-|gb|big5|euc_|shift_jis).*")
"""Encodings in which byte 10 always ends a line, so every line can be decoded separately."""
_DELIMITERS = ",;\t|"
_LONGEST_FIELD = 1 << 20  # characters; csv's default limit of 128 kB stops at a long text
_LONGEST_ROW = 200  # lines of a quoted field
_OPEN = "a quote is opened and not closed"
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, decoded by surrogateescape
_LONGEST_LIST = 100_000  # characters of a cell that is parsed as a list
_HEAD_BYTES = 1 << 16
_SEPARATOR = re.compile(r"""(?i)"?sep=([^\w"'])"?""")
"""Excel's first line of a CSV, which names the delimiter."""
_QUOTED = re.compile(r'"[^"]*("|$)')
_WITHOUT_COMMA = re.compile(r"""(['"])\s+(['"])""")


class _Line(NamedTuple):
    place: Place
    text: str


@dataclass(frozen=True)
class Table:
    """A table of images and captions."""

    source: Source
    file: ListFile
    kind: str
    """One of KINDS."""
    encoding: str
    folder: str = ""
    """Folder of the table in the input, used as a prefix of the ids."""
    delimiter: str = ""
    header: tuple[str, ...] = ()
    """Names of the columns; empty for JSON lines."""
    skipped: int = 0
    """Number of lines before the first row: the header, and Excel's `sep=;` before it."""

    @classmethod
    def open(
        cls, source: Source, location: str, encoding: str = "", columns: str = "", folder: str = ""
    ) -> Table:
        """Detect encoding, delimiter and columns from the beginning of a table.

        Args:
            source: the input.
            location: the table.
            encoding: encoding of a file without a byte order mark; "" for UTF-8.
            columns: comma-separated names of the columns of a table without a header.
            folder: folder of the table in the input.

        Raises:
            ValueError: the kind of file is unknown, or the table is ambiguous.
        """
        kind = extension(location.removesuffix(".gz"))
        if kind not in KINDS:
            raise ValueError(f"{location} is neither a folder nor a .csv, .tsv or .jsonl table")
        file = ListFile.at(location)
        with file.open() as opened:
            head = opened.read(_HEAD_BYTES)
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), encoding)
        table = cls(source, file, kind, encoding, folder)
        if _ends_lines_by_cr(kind, head.decode(table._codec, "ignore")):
            raise ValueError(
                f"{location}: its lines end as on a classic Mac, in \\r alone: convert them, for "
                f"example with `tr '\\r' '\\n' < {basename(location)} > converted.{kind}`"
            )
        if kind == "jsonl":
            return table
        lines = (text for _, text in table._lines(START))
        first, skipped, delimiter = next(lines, ""), 0, "\t"
        if kind == "csv":
            stated = _SEPARATOR.fullmatch(first.rstrip("\r\n"))
            if stated:
                first, skipped = next(lines, ""), 1
            delimiter = stated[1] if stated else _delimiter(source, "" if columns else first)
        if not (first or columns):
            raise ValueError(f"{location} is empty")
        names = columns.split(",") if columns else _split(first, delimiter)
        header = _usual_names([name.strip() for name in names])
        _check_header(source, location, header)
        return replace(
            table, delimiter=delimiter, header=tuple(header), skipped=skipped + (not columns)
        )

    @property
    def is_streamed(self) -> bool:
        """Whether reading can start at any row."""
        return bool(_BY_LINES.fullmatch(self._codec)) and not self.file.is_packed

    @property
    def _codec(self) -> str:
        """Name of the encoding in Python.

        Raises:
            ValueError: the encoding does not exist.
        """
        try:
            return codecs.lookup(self.encoding or "utf-8-sig").name
        except LookupError as error:
            raise ValueError(f"--encoding {self.encoding}: {error}") from error

    def read(self, start: Place) -> Iterator[tuple[Place, Found]]:
        """Yield the rows, beginning at a place. A row that can't be read becomes a reject."""
        lines = self._lines(start)
        if self.kind == "jsonl":
            items = self._json_lines(lines)
        else:
            for _ in range(self.skipped if start == START else 0):
                next(lines)
            items = self._rows(lines)
        for place, item in items:
            yield place, in_folder(item, self.folder)

    def _lines(self, start: Place) -> Iterator[_Line]:
        """Yield the lines, beginning at a place.

        Only a line feed ends a line, because captions may hold other separators such as U+2028.
        """
        location, codec = self.file.location, self._codec
        errors = "surrogatepass" if self.encoding.startswith("utf-") else "surrogateescape"
        place = start if start.offset else Place(0, 0, 1)
        with self.file.open(place.offset) as file:
            try:
                lines: IO[Any] = file
                if not self.is_streamed:  # read once from its start, so places are not used
                    lines = io.TextIOWrapper(file, codec, errors, newline="\n")
                for line in lines_of(lines, location):
                    text = line if isinstance(line, str) else line.decode(codec, errors)
                    if not place.offset and "\0" in text:
                        raise ValueError(
                            f"{location}:1 holds zero bytes: give --encoding, for example utf-16"
                        )
                    yield _Line(place, text)
                    place = Place(0, place.offset + len(line), place.number + 1)
                    if codec == "utf-8-sig":  # a byte order mark occurs only at the start
                        codec = "utf-8"
            except LookupError as error:
                raise ValueError(f"--encoding {self.encoding}: {error}") from error
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{location} is not {self.encoding}: {error}; see --encoding"
                ) from error

    def _json_lines(self, lines: Iterable[_Line]) -> Iterator[tuple[Place, Found]]:
        location = self.file.location
        make = partial(pair_of_item, self.source, location)
        for place, text in lines:
            if not text.strip():
                continue
            try:
                item = parse_json(text)
            except ValueError as error:
                name = f"{basename(location)}:{place.number}"
                yield place, Reject(name, Reason.DAMAGED_INPUT, describe(error), captions=1)
                continue
            yield place, read_item(location, place.number, item, make)

    def _rows(self, lines: Iterator[_Line]) -> Iterator[tuple[Place, Found]]:
        location, header = self.file.location, self.header
        make = partial(_pair, self.source, location)
        records = _tab_records(lines)
        if self.kind == "csv":
            records = _csv_records(lines, self.delimiter)
        for place, fields in records:
            problem = fields if isinstance(fields, str) else ""
            if len(fields) > len(header) and not problem:
                problem = (
                    f"{len(fields)} fields, more than the {len(header)} columns; quote the text?"
                )
            elif not problem and any(map(_ESCAPED.search, fields)):
                problem = "not UTF-8: give --encoding, for example latin-1"
            if problem:
                name = f"{basename(location)}:{place.number}"
                yield place, Reject(name, Reason.DAMAGED_INPUT, problem, captions=1)
            else:
                row = dict(zip(header, fields, strict=False))
                yield place, read_item(location, place.number, row, make)


def _ends_lines_by_cr(kind: str, head: str) -> bool:
    """Whether the first line in fact holds several lines that end in a carriage return."""
    parts = head.partition("\n")[0].rstrip("\r").split("\r")
    if kind == "csv":
        return "\r" in _QUOTED.sub("", "\r".join(parts))
    # A cell of a TSV and the white space in JSON may hold a carriage return.
    ends = ("{", "}") if kind == "jsonl" else ("\t", "\t")
    inside = [part for part in parts if all(end in part for end in ends)]
    return len(inside) > 1


def _pair(source: Source, location: str, number: int, row: dict[str, Any]) -> Found:
    for name in _image_keys(source):
        if name in row:
            row[name] = row[name].strip()
    for name in caption_keys(source.caption_key):
        if name in row:
            row[name] = _list_in(row[name])
    return pair_of_item(source, location, number, row)


def _list_in(cell: str) -> str | list[str]:
    """Parse a cell that holds a list of texts in JSON's or Python's syntax."""
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > _LONGEST_LIST:
        return cell
    for parse in (parse_json, ast.literal_eval):
        try:
            items = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
            if _WITHOUT_COMMA.search(text) and parse is not parse_json:
                raise ValueError("a list without commas, as NumPy prints it")
            return items
    return cell


def _image_keys(source: Source) -> tuple[str, ...]:
    return (source.image_key,) if source.image_key else (*IMAGE_KEYS, *URL_KEYS)


def _delimiter(source: Source, first: str) -> str:
    """Return the first delimiter for which the header has an image and a caption column."""
    for delimiter in _DELIMITERS:
        names = set(_usual_names(_split(first, delimiter)))
        has_image = names & set(_image_keys(source))
        if has_image and names & set(caption_keys(source.caption_key)):
            return delimiter
    return ","


def _split(line: str, delimiter: str) -> list[str]:
    fields = _parse(line, delimiter)
    names = line.split(delimiter) if isinstance(fields, str) else fields
    return [name.strip() for name in names]


def _usual_names(header: list[str]) -> list[str]:
    """Replace variants such as `Image` and `CAPTION` by the usual names."""
    usual = {*IMAGE_KEYS, *URL_KEYS, *caption_keys(""), *SCORE_KEYS}
    names = []
    for name in header:
        is_variant = name not in usual and name.lower() in usual
        names.append(name.lower() if is_variant else name)
    return names


def _check_header(source: Source, location: str, header: list[str]) -> None:
    shown = shortened(", ".join(header))
    place = f"{location}:1: the first line is {shown!r}"
    for what, keys, option in (
        ("image", _image_keys(source), "--image-key"),
        ("caption", caption_keys(source.caption_key), "--caption-key"),
    ):
        if not set(keys) & set(header):
            raise ValueError(
                f"{place}: no column for the {what} ({shortened(', '.join(keys), 80)}): give "
                f"{option} NAME, or --columns image,caption for a table without such a line"
            )
        twice = [name for name, count in Counter(header).items() if count > 1 and name in keys]
        if twice:
            raise ValueError(
                f"{place}: several of {len(header)} columns have the name {twice[0]!r}: rename "
                f"one, or name another with {option}"
            )


def _tab_records(lines: Iterable[_Line]) -> Iterator[tuple[Place, list[str] | str]]:
    for place, text in lines:
        if text.strip():
            yield place, text.rstrip("\r\n").split("\t")


def _csv_records(lines: Iterator[_Line], delimiter: str) -> Iterator[tuple[Place, list[str] | str]]:
    """Yield the place and the fields of each row, or the problem instead of the fields.

    If a quote is not closed, only its line is rejected. The following lines are read.
    """
    row_start = re.compile(
        rf'"?[^"\n{re.escape(delimiter)}]{{1,300}}\.(?:{"|".join(IMAGE_ENDINGS)})"?\s*'
        rf"{re.escape(delimiter)}",
        re.IGNORECASE,
    )
    waiting: deque[_Line] = deque()
    while True:
        first = waiting.popleft() if waiting else next(lines, None)
        if first is None:
            return
        fields = _parse(first.text, delimiter)
        extra: list[_Line] = []
        while fields == _OPEN and len(extra) < _LONGEST_ROW:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                break
            extra.append(line)
            if row_start.match(line.text):  # the next row begins inside the open quote
                break
            fields = _parse(first.text + "".join(more.text for more in extra), delimiter)
        if isinstance(fields, str):
            waiting.extendleft(reversed(extra))
        if fields:
            yield first.place, fields


def _parse(text: str, delimiter: str) -> list[str] | str:
    """Parse the fields of a row, or return the problem with it."""
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = list(csv.reader([text], delimiter=delimiter, strict=True, skipinitialspace=True))
    except csv.Error as error:
        return _OPEN if "unexpected end of data" in str(error) else str(error)
    return rows[0] if rows else []


def in_folder(item: Found, folder: str) -> Found:
    """Add the folder of a table to the id of an item."""
    if not folder or isinstance(item, Unused):
        return item
    return replace(item, id=f"{folder}/{item.id}")
