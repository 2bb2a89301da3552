"""Webdataset tars: consecutive files with the same name up to the first dot are a sample.

What follows the last dot decides what a file is: s.input.jpg is an image. The caption is in the
.txt (or .caption), else under a usual key of the .json, which also holds url and similarity. Ids
begin with the name of the tar, as keys are unique in a tar alone.
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

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_COMPANIONS = (".parquet", ".json", ".idx")
"""What img2dataset and indexers put beside tars."""
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
_IMAGE, _TEXT, _JSON = "image", "text", "json"
_LARGEST_HEADER_BYTES = 1 << 20
"""Largest long name or extended attributes: tarfile reads them whole."""
_HEADER_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_LARGEST_SAMPLE = 100  # files with the same name up to the first dot


def chunks(source: Source, id_per_tar: bool = True) -> list[Chunk]:
    """Every tar below the folder, or the one tar, is a chunk.

    `id_per_tar`: ids begin with the tar's name; else with its folder below the location, for tars
    of one run, whose keys differ.
    """
    tars, others = find_files(source.location, TAR_ENDINGS)
    if not tars:
        found = ", ".join(f"{unused.count} {unused.kind}" for unused in others)
        raise FileNotFoundError(
            f"{source.location}: there is no tar ({', '.join(TAR_ENDINGS)}), but "
            f"{found or 'nothing'}"
        )
    found_chunks = []
    for tar in tars:
        prefix = without_ending(tar.name, TAR_ENDINGS)
        prefix = prefix if id_per_tar else posixpath.dirname(prefix)
        read = partial(read_tar, tar.location, source.caption_key, f"{prefix}/" if prefix else "")
        found_chunks.append(file_chunk(tar, read))
    return with_unused(found_chunks, others)


def find_files(location: str, endings: tuple[str, ...]) -> tuple[list[Entry], list[Unused]]:
    """Files below a folder by their endings, and what else is there; a location that is a file is
    taken as it is."""
    if not is_folder(location):
        version = "" if is_web(location) else file_version(location)
        size = 0 if is_web(location) else file_size(location)
        return [Entry(basename(location), location, False, size, version)], []
    listed = list_folder(location, deep=True)
    files = [entry for entry in listed if entry.name.lower().endswith(endings)]
    rest = Counter(
        posixpath.splitext(entry.name)[1].lower()
        for entry in listed
        if not entry.name.lower().endswith((*endings, *_COMPANIONS))
    )
    return files, [
        Unused(f"files {ending or 'without an ending'}", n) for ending, n in rest.items()
    ]


def without_ending(name: str, endings: tuple[str, ...]) -> str:
    """A file's name without the longest of the endings that it has."""
    lengths = [len(ending) for ending in endings if name.lower().endswith(ending)]
    return name[: len(name) - max(lengths, default=0)]


def file_chunk(entry: Entry, read: partial[Iterator[Found]]) -> Chunk:
    """A chunk that is a file."""
    return Chunk(entry.name, read, f"{entry.size}-{entry.version}", input_bytes=entry.size)


def with_unused(found: list[Chunk], unused: Sequence[Unused]) -> list[Chunk]:
    """The chunks; the last one tells what else is in the input."""
    if unused:
        found[-1] = replace(found[-1], read=partial(_read_with, found[-1].read, unused))
    return found


def _read_with(read: Callable[[], Iterable[Found]], unused: Sequence[Unused]) -> Iterator[Found]:
    yield from read()
    yield from unused


def read_tar(location: str, caption_key: str = "", prefix: str = "") -> Iterator[Found]:
    """All samples of a tar. A damaged one gives what is before the damage, then rejects: the sample
    that the damage may have cut, and the tar."""
    unused: Counter[str] = Counter()
    try:
        # As a stream: nothing is sought, so that it may come over a network.
        with (
            open_file(location) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar,
        ):
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
    """Whether the tar is at fault, not the disk or the network; bz2 says it by a bare OSError."""
    is_system = isinstance(error, RemoteError) or getattr(error, "errno", None) is not None
    return not is_system


class _CutSample(Exception):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Member(tarfile.TarInfo):
    """Takes nothing but the end mark for the end: tarfile also ends, and says nothing, at a damaged
    header and where a tar was cut off."""

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
            if type(error).__name__ == "EOFHeaderError":  # the end mark; the class isn't public
                raise
            place = f"byte {archive.offset}"
            raise tarfile.ReadError(f"no end mark but {error or 'nothing'} at {place}") from error


class _Links:
    """Contents of links in a tar, which a stream can't go back to."""

    def __init__(self, location: str):
        self._location = location
        self._tar: tarfile.TarFile | None = None

    def read(self, member: tarfile.TarInfo, largest: int) -> bytes | None:
        """None where the tar does not hold what the link names."""
        if self._tar is None:
            self._tar = tarfile.open(fileobj=open_file(self._location), mode="r:*")  # noqa: SIM115
        try:
            return _content(self._tar, self._tar.getmember(member.name), largest)
        except (KeyError, RecursionError):
            return None


@dataclass
class Sample:
    """The files of one sample."""

    name: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Contents by what follows the first dot of the names, in the order of the tar."""
    stored_bytes: int = 0
    problem: str = ""
    """Why a file of it can't be read."""
    reason: Reason = Reason.MISSING_IMAGE
    """Reason of the reject where there is a problem."""

    def is_followed_by(self, ending: str) -> bool:
        """Whether a file with the same name up to the first dot begins another sample: photo.2.jpg
        after photo.1.jpg and photo.1.txt."""
        if ending in self.parts or len(self.parts) >= _LARGEST_SAMPLE:
            return True
        kinds: dict[str, set[str]] = {}
        for own in self.parts:
            kinds.setdefault(_inner(own), set()).add(kind_of(own))
        whole = [s for s, k in kinds.items() if s and _IMAGE in k and k & {_TEXT, _JSON}]
        return bool(whole and _inner(ending) and _inner(ending) not in kinds)


def _inner(ending: str) -> str:
    """What stands between the first dot of a name and the last."""
    return ending.rpartition(".")[0]


def kind_of(ending: str) -> str:
    """Image, text or json; "" for what is not read. The last ending decides."""
    last = ending.rpartition(".")[2]
    if last in IMAGE_ENDINGS:
        return _IMAGE
    if last in TEXT_ENDINGS:
        return _TEXT
    return _JSON if last == "json" else ""


def _samples(tar: tarfile.TarFile, links: _Links, unused: Counter[str]) -> Iterator[Sample]:
    sample = Sample("")
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
            sample.parts[ending] = b""  # the sample is begun, even if its content can't be read
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
    """The sample that a file belongs to ("" for none), and its ending there."""
    folder, slash, file_name = path.removeprefix("./").rpartition("/")
    stem, _, ending = file_name.partition(".")
    # Without a stem it is a hidden file, such as the ._000.jpg of a Mac.
    return (folder + slash + stem if stem else ""), ending.lower()


def sample_pairs(
    sample: Sample, caption_key: str, unused: Counter[str]
) -> Iterator[RawPair | Reject]:
    """The pair of a sample's files, or several where its images have texts of their own."""
    endings = list(sample.parts)
    images = [ending for ending in endings if kind_of(ending) == _IMAGE]
    texts = {_inner(ending) for ending in endings if kind_of(ending) in (_TEXT, _JSON)}
    used: set[str] = set()
    if sample.problem:
        yield Reject(sample.name, sample.reason, sample.problem, captions=len(texts))
        return
    of_their_own = [ending for ending in images if _inner(ending) and _inner(ending) in texts]
    if of_their_own and all(map(_inner, images)):  # photo.1.jpg and photo.1.txt
        for image in of_their_own:
            parts = [ending for ending in endings if _inner(ending) == _inner(image)]
            yield _pair(f"{sample.name}.{_inner(image)}", sample, parts, caption_key, used)
    else:
        yield _pair(sample.name, sample, endings, caption_key, used)
    unused.update(f"files .{ending}" for ending in endings if ending not in used)


def _pair(
    name: str, sample: Sample, endings: Sequence[str], caption_key: str, used: set[str]
) -> RawPair:
    """The pair of some files of a sample; adds those that it takes to `used`."""
    # Plain endings before others: a.jpg is the image of a.jpg, a.mask.png.
    plain_first = sorted(endings, key=lambda ending: bool(_inner(ending)))
    chosen: dict[str, str] = {}
    for ending in plain_first:
        chosen.setdefault(kind_of(ending), ending)
    image = chosen.get(_IMAGE)
    text = None if caption_key else chosen.get(_TEXT)
    content = sample.parts[chosen[_JSON]] if _JSON in chosen else b""
    fields = parse_json(content)
    captions = captions_of(fields, caption_key) if text is None else as_text(sample.parts[text])
    used.update(chosen.values())
    pair = pair_of(name, None if image is None else sample.parts[image], captions, fields)
    note = note_of(endings, "files")
    if content and not fields:
        note += "; the json is damaged or no object"
    elif fields:
        note += f"; {pair.note}"
    elif image is None or text is None:
        note += "; where files of a sample do not follow each other, sort the tar by name"
    stored_bytes = sample.stored_bytes * len(endings) // len(sample.parts)
    return replace(pair, stored_bytes=stored_bytes, note=note)
