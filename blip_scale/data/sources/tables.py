"""Read tables of images and captions: CSV, TSV and JSON lines, as people and programs write them.

Supported are UTF-8 with or without a byte order mark, UTF-16 with one, and the encoding in
--encoding. A CSV may have commas, semicolons or tabs between its fields. A cell may hold a list of
captions. A TSV has no quoting. An ambiguous table is refused; the message shows the line and the
option that decides. A row that can't be read is rejected alone.
"""

from __future__ import annotations

import ast
import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from blip_scale.data.conversion.pairs import Found, Reason, Reject, Source, Unused
from blip_scale.data.conversion.report import shortened
from blip_scale.data.pixels.decoding import describe
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.annotations import IMAGE_KEYS, pair_of_item, read_item
from blip_scale.data.sources.metadata import SCORE_KEYS, URL_KEYS, caption_keys
from blip_scale.storage.locations import basename, extension, open_file
from blip_scale.storage.untrusted import parse_json

KINDS = ("csv", "tsv", "jsonl")
_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
_DELIMITERS = ",;\t|"
_LONGEST_FIELD = 1 << 20  # characters; csv's own limit of 128 kB stops at the first long text
_LONGEST_ROW = 200  # lines of a quoted field
_OPEN = "a quote is opened and not closed"
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, decoded by surrogateescape
_LONGEST_LIST = 100_000  # characters of a cell that is parsed as a list
_WITHOUT_COMMA = re.compile(r"""(['"])\s+(['"])""")


def read_table(
    source: Source, location: str, encoding: str = "", columns: str = ""
) -> Iterator[Found]:
    """Read every row of a table. A row that can't be read becomes a reject.

    Args:
        source: the input.
        location: the table.
        encoding: encoding of a file without a byte order mark; "" for UTF-8.
        columns: comma-separated names of the columns of a table without a header.

    Raises:
        ValueError: the kind of file is unknown, or the table is ambiguous.
    """
    kind = extension(location.removesuffix(".gz"))
    if kind not in KINDS:
        raise ValueError(f"{location} is neither a folder nor a .csv, .tsv or .jsonl table")
    with open_file(location) as file:
        lines = _lines(file, location, encoding)
        if kind == "jsonl":
            yield from _json_lines(source, location, lines)
        else:
            yield from _rows(source, location, lines, kind, columns)


def _lines(file: Any, location: str, encoding: str) -> Iterator[str]:
    """Yield the lines of a file. Only line feeds end a line, as captions may hold U+2028."""
    head = file.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), encoding)
    errors = "surrogatepass" if encoding.startswith("utf-") else "surrogateescape"
    try:
        text = io.TextIOWrapper(file, encoding or "utf-8-sig", errors, newline="\n")
        for number, line in enumerate(text):
            if not number and "\0" in line:
                raise ValueError(
                    f"{location}:1 holds zero bytes: give --encoding, for example utf-16"
                )
            yield line
    except LookupError as error:
        raise ValueError(f"--encoding {encoding}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{location} is not {encoding}: {error}; see --encoding") from error


def _json_lines(source: Source, location: str, lines: Iterable[str]) -> Iterator[Found]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except ValueError as error:
            place = f"{basename(location)}:{number}"
            yield Reject(place, Reason.DAMAGED_INPUT, describe(error), captions=1)
            continue
        yield read_item(location, number, item, lambda n, i: pair_of_item(source, location, n, i))


def _rows(
    source: Source, location: str, lines: Iterator[str], kind: str, columns: str
) -> Iterator[Found]:
    first = "" if columns else next(lines, "")
    if not (first or columns):
        raise ValueError(f"{location} is empty")
    delimiter = "\t"
    if kind == "csv":
        delimiter = _delimiter(source, first)
    header = [name.strip() for name in columns.split(",")] if columns else _split(first, delimiter)
    header = _usual_names(header)
    _check_header(source, location, header)
    records = _tab_records(lines) if kind == "tsv" else _csv_records(lines, delimiter)
    for line_number, fields in records:
        number = line_number + (not columns)
        place = f"{basename(location)}:{number}"
        if isinstance(fields, str):
            yield Reject(place, Reason.DAMAGED_INPUT, fields, captions=1)
        elif len(fields) > len(header):
            detail = f"{len(fields)} fields, more than the {len(header)} columns; quote the text?"
            yield Reject(place, Reason.DAMAGED_INPUT, detail, captions=1)
        elif any(map(_ESCAPED.search, fields)):
            detail = "not UTF-8: give --encoding, for example latin-1"
            yield Reject(place, Reason.DAMAGED_INPUT, detail, captions=1)
        else:
            row = dict(zip(header, fields, strict=False))
            yield read_item(location, number, row, lambda n, item: _pair(source, location, n, item))


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
    """First usual delimiter with which the header has an image and a caption."""
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
                f"{place}: several of {len(header)} columns are called {twice[0]!r}: rename one, "
                f"or name another with {option}"
            )


def _tab_records(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line.rstrip("\r\n").split("\t")


def _csv_records(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the line number and the fields of each row, or the problem instead of the fields.

    A quote that is not closed spoils only its own line, not the following ones.
    """
    row_start = re.compile(
        rf'"?[^"\n{re.escape(delimiter)}]{{1,300}}\.(?:{"|".join(IMAGE_ENDINGS)})"?\s*'
        rf"{re.escape(delimiter)}",
        re.IGNORECASE,
    )
    waiting: deque[str] = deque()
    number = 0
    while True:
        text = waiting.popleft() if waiting else next(lines, None)
        if text is None:
            return
        number += 1
        fields = _parse(text, delimiter)
        extra: list[str] = []
        while fields == _OPEN and len(extra) < _LONGEST_ROW:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                break
            extra.append(line)
            if row_start.match(line):  # the next row, swallowed by the open quote
                break
            fields = _parse(text + "".join(extra), delimiter)
        if isinstance(fields, str):
            waiting.extendleft(reversed(extra))
            yield number, fields
        elif fields:
            yield number, fields
        if not isinstance(fields, str):
            number += len(extra)


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
