"""Read webdataset tars.

Consecutive files with the same name up to the first dot form a sample. The part after the last dot
determines the kind of a file: s.input.jpg is an image. The caption is in the .txt (or .caption). If
there is none, it is under a usual key of the .json, which also holds url and similarity.
Ids begin with the name of the tar, because keys are unique only within a tar.
"""

from __future__ import annotations

import gzip
import lzma
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from blip_scale.data.conversion.pairs import (
    LARGEST_FILE_BYTES,
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
    Unused,
)
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.metadata import (
    TEXT_ENDINGS,
    as_text,
    captions_of,
    note_of,
    pair_of,
    parse_json,
)
from blip_scale.storage.locations import (
    Entry,
    FileTooLarge,
    NotRegularFile,
    basename,
    check_size,
    file_size,
    file_version,
    is_folder,
    is_web,
    list_folder,
    open_file,
)
from blip_scale.storage.objects import RemoteError

TAR_ENDINGS = (
    ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst",
)  # fmt: skip
"""Endings of tars. zstd tars are listed so that they are rejected with a message, because Python
3.11 can't unpack them."""
_ZSTD = b"\x28\xb5\x2f\xfd"
"""First bytes of a file compressed with zstd."""
_COMPANIONS = (".parquet", ".json", ".idx")
"""Endings of files that img2dataset and indexers write beside tars."""
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
_IMAGE, _TEXT, _JSON = "image", "text", "json"
_LARGEST_HEADER_BYTES = 1 << 20
"""Maximum size of a long name or of extended attributes, which tarfile reads into memory."""
_HEADER_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_LARGEST_SAMPLE = 100  # files with the same name up to the first dot


def chunks(source: Source, id_per_tar: bool = True) -> list[Chunk]:
    """Return one chunk per tar below the folder, or one for a single tar.

    Args:
        source: the input.
        id_per_tar: begin ids with the name of the tar. If False, begin them with the folder of the
            tar. Use False for the tars of one run, in which keys are unique.
    """
    tars, others = find_files(source.location, TAR_ENDINGS)
    if not tars:
        listing = ", ".join(f"{unused.count} {unused.kind}" for unused in others)
        raise FileNotFoundError(
            f"{source.location}: there is no tar ({', '.join(TAR_ENDINGS)}), but "
            f"{listing or 'nothing'}"
        )
    tar_chunks = []
    for tar in tars:
        prefix = without_ending(tar.name, TAR_ENDINGS)
        prefix = prefix if id_per_tar else posixpath.dirname(prefix)
        read = partial(read_tar, tar.location, source.caption_key, f"{prefix}/" if prefix else "")
        tar_chunks.append(file_chunk(tar, read))
    return with_unused(tar_chunks, others)


def find_files(location: str, endings: tuple[str, ...]) -> tuple[list[Entry], list[Unused]]:
    """Find files below a folder by their endings, and count the other files.

    If the location is a file, return this file.
    """
    if not is_folder(location):
        version = "" if is_web(location) else file_version(location)
        size = 0 if is_web(location) else file_size(location)
        return [Entry(basename(location), location, False, size, version)], []
    listed = list_folder(location, deep=True)
    files = [entry for entry in listed if entry.name.lower().endswith(endings)]
    rest: Counter[str] = Counter()
    for entry in listed:
        name = entry.name.lower()
        if not name.endswith((*endings, *_COMPANIONS)):
            rest[posixpath.splitext(name)[1]] += 1
    return files, [
        Unused(f"files {ending or 'without an ending'}", n) for ending, n in rest.items()
    ]


def without_ending(name: str, endings: tuple[str, ...]) -> str:
    """Remove from a file's name the longest ending that matches."""
    lengths = [len(ending) for ending in endings if name.lower().endswith(ending)]
    return name[: len(name) - max(lengths, default=0)]


def file_chunk(entry: Entry, read: partial[Iterator[Found]]) -> Chunk:
    """Build a chunk of one file."""
    return Chunk(entry.name, read, f"{entry.size}-{entry.version}", input_bytes=entry.size)


def with_unused(file_chunks: list[Chunk], unused: Sequence[Unused]) -> list[Chunk]:
    """Add the unused files of the input to the last chunk, which yields them at its end."""
    if unused:
        file_chunks[-1] = replace(
            file_chunks[-1], read=partial(_read_with, file_chunks[-1].read, unused)
        )
    return file_chunks


def _read_with(read: Callable[[], Iterable[Found]], unused: Sequence[Unused]) -> Iterator[Found]:
    yield from read()
    yield from unused


def read_tar(location: str, caption_key: str = "", prefix: str = "") -> Iterator[Found]:
    """Read all samples of a tar.

    A damaged tar yields the samples before the damage, then two rejects: one for the sample that
    may be incomplete, and one for the tar.
    """
    unused: Counter[str] = Counter()
    try:
        # Read the tar as a stream without seeking, because it may come over a network.
        with open_file(location) as file:
            if file.peek(4)[:4] == _ZSTD:  # type: ignore[attr-defined]
                raise tarfile.ReadError("compressed by zstd: unpack it first (zstd -d)")
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
                for sample in _samples(tar, _Links(location), unused):
                    for pair in sample_pairs(sample, caption_key, unused):
                        yield replace(pair, id=prefix + pair.id)
    except _CutSample as cut:
        problem = f"the tar is damaged here: {cut.__cause__}"
        yield Reject(prefix + cut.name, Reason.DAMAGED_INPUT, problem)
        yield Reject(basename(location), Reason.DAMAGED_INPUT, str(cut.__cause__))
    except NotRegularFile as error:
        yield Reject(basename(location), Reason.NOT_REGULAR, str(error))
    except (*_DAMAGE, OSError) as error:
        if not _is_damage(error):
            raise
        yield Reject(basename(location), Reason.DAMAGED_INPUT, str(error))
    for kind, count in sorted(unused.items()):
        yield Unused(kind, count)


def _is_damage(error: Exception) -> bool:
    """Return True if the tar is damaged, False if the disk or the network failed.

    bz2 reports damage as an OSError without errno.
    """
    is_system = isinstance(error, RemoteError) or getattr(error, "errno", None) is not None
    return not is_system


class _CutSample(Exception):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Member(tarfile.TarInfo):
    """Tar member that raises ReadError if the tar ends without an end mark.

    By default, tarfile stops silently at a damaged header and at the end of a truncated tar.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _Member:
        member = super().frombuf(buf, encoding or "utf-8", errors)
        if member.type in _HEADER_TYPES and member.size > _LARGEST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {member.size / 1e6:.0f} MB")
        return member

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the end mark; the class is not public
                raise
            place = f"byte {archive.offset}"
            raise tarfile.ReadError(f"no end mark but {error or 'nothing'} at {place}") from error


class _Links:
    """Reads the targets of links in a tar, by a second pass, because a stream can't seek back."""

    def __init__(self, location: str):
        self._location = location
        self._tar: tarfile.TarFile | None = None

    def read(self, member: tarfile.TarInfo, largest: int) -> bytes | None:
        """Return the content of a link's target, or None if it is not in the tar."""
        if self._tar is None:
            self._tar = tarfile.open(fileobj=open_file(self._location), mode="r:*")  # noqa: SIM115
        try:
            return _content(self._tar, self._tar.getmember(member.name), largest)
        except (KeyError, RecursionError):
            return None


@dataclass
class Sample:
    """The files of a sample."""

    name: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Part of a file name after the first dot -> content, in the order of the tar."""
    offsets: dict[str, int] = field(default_factory=dict)
    """Part of a file name -> first byte of the content, for plain files in uncompressed tars."""
    stored_bytes: int = 0
    problem: str = ""
    """Reason why a file of the sample can't be read, or ""."""
    reason: Reason = Reason.MISSING_IMAGE
    """Reason of the reject if there is a problem."""

    def is_followed_by(self, ending: str) -> bool:
        """Return True if a file with the same name up to the first dot begins another sample.

        For example, photo.2.jpg does so after photo.1.jpg and photo.1.txt.
        """
        if ending in self.parts or len(self.parts) >= _LARGEST_SAMPLE:
            return True
        kinds: dict[str, set[str]] = {}
        for other in self.parts:
            kinds.setdefault(_inner(other), set()).add(kind_of(other))
        whole = [s for s, k in kinds.items() if s and _IMAGE in k and k & {_TEXT, _JSON}]
        return bool(whole and _inner(ending) and _inner(ending) not in kinds)


def _inner(ending: str) -> str:
    """Part of a name between the first and the last dot."""
    return ending.rpartition(".")[0]


def kind_of(ending: str) -> str:
    """Kind of a file by its last ending: image, text or json, or "" for others."""
    last = ending.rpartition(".")[2]
    if last in IMAGE_ENDINGS:
        return _IMAGE
    if last in TEXT_ENDINGS:
        return _TEXT
    return _JSON if last == "json" else ""


def _samples(tar: tarfile.TarFile, links: _Links, unused: Counter[str]) -> Iterator[Sample]:
    sample = Sample("")
    is_plain = getattr(tar.fileobj, "comptype", "tar") == "tar"
    try:
        for member in tar:
            if member.isdir():
                continue
            key, ending = _key(member.name)
            if not key or not (member.isfile() or member.islnk() or member.issym()):
                unused["hidden and special files"] += 1
                continue
            if not kind_of(ending):
                unused[f"files .{ending}" if ending else "files without an ending"] += 1
                continue
            if key != sample.name or sample.is_followed_by(ending):
                if sample.parts:
                    yield sample
                sample = Sample(key)
            sample.parts[ending] = b""  # the sample exists, even if its content can't be read
            sample.stored_bytes += tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE))
            room = LARGEST_FILE_BYTES - sum(map(len, sample.parts.values()))
            try:
                content = (
                    _content(tar, member, room) if member.isfile() else links.read(member, room)
                )
            except FileTooLarge as error:
                sample.problem, sample.reason = f"{ending}: {error}", Reason.FILE_TOO_LARGE
                continue
            if content is None:
                sample.problem = f"{ending} is a link to {member.linkname}, which is not in the tar"
            sample.parts[ending] = content or b""
            if is_plain and member.isreg() and not member.issparse():
                sample.offsets[ending] = member.offset_data
    except (*_DAMAGE, OSError) as error:
        if sample.parts and _is_damage(error):
            raise _CutSample(sample.name) from error
        raise
    if sample.parts:
        yield sample


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, largest: int) -> bytes:
    check_size(member.size, largest)
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _key(path: str) -> tuple[str, str]:
    """Return the sample that a file belongs to ("" if hidden), and the file's ending."""
    folder, slash, file_name = path.removeprefix("./").rpartition("/")
    stem, _, ending = file_name.partition(".")
    # A file without a stem is hidden, such as ._000.jpg on macOS.
    return (folder + slash + stem if stem else ""), ending.lower()


def sample_pairs(
    sample: Sample, caption_key: str, unused: Counter[str]
) -> Iterator[RawPair | Reject]:
    """Yield the pair of a sample, or several pairs if its images have their own texts."""
    endings = list(sample.parts)
    images = [ending for ending in endings if kind_of(ending) == _IMAGE]
    texts = {_inner(ending) for ending in endings if kind_of(ending) in (_TEXT, _JSON)}
    used: set[str] = set()
    if sample.problem:
        yield Reject(sample.name, sample.reason, sample.problem, captions=len(texts))
        return
    captioned = [ending for ending in images if _inner(ending) and _inner(ending) in texts]
    if captioned and all(map(_inner, images)):  # photo.1.jpg and photo.1.txt
        for image in captioned:
            parts = [ending for ending in endings if _inner(ending) == _inner(image)]
            yield _pair(f"{sample.name}.{_inner(image)}", sample, parts, caption_key, used)
    else:
        yield _pair(sample.name, sample, endings, caption_key, used)
    unused.update(f"files .{ending}" for ending in endings if ending not in used)


def _pair(
    name: str, sample: Sample, endings: Sequence[str], caption_key: str, used: set[str]
) -> RawPair:
    """Build a pair from some files of a sample, and add the files used to `used`."""
    # Endings without an inner dot come first: given a.jpg and a.mask.png, a.jpg is the image.
    plain_first = sorted(endings, key=lambda ending: bool(_inner(ending)))
    chosen: dict[str, str] = {}
    for ending in plain_first:
        chosen.setdefault(kind_of(ending), ending)
    image = chosen.get(_IMAGE)
    text = None if caption_key else chosen.get(_TEXT)
    content = sample.parts[chosen[_JSON]] if _JSON in chosen else b""
    fields = parse_json(content)
    if text is None:
        texts = {e.rpartition(".")[2]: e for e in plain_first[::-1] if kind_of(e) == _TEXT}
        named = {kind: as_text(sample.parts[ending]) for kind, ending in texts.items()}
        captions = captions_of({**named, **fields}, caption_key)
    else:
        captions = as_text(sample.parts[text])
    used.update(chosen.values())
    pair = pair_of(name, None if image is None else sample.parts[image], captions, fields)
    note = note_of(endings, "files")
    if content and not fields:
        note += "; the json is damaged or not an object"
    elif fields:
        note += f"; {pair.note}"
    elif image is None or text is None:
        note += "; where files of a sample do not follow each other, sort the tar by name"
    stored_bytes = sample.stored_bytes * len(endings) // len(sample.parts)
    offset = None if image is None else sample.offsets.get(image)
    return replace(pair, stored_bytes=stored_bytes, note=note, offset=offset)
