"""Read samples of a stream from webdataset tars with an index (`conversion.tar_index`)."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.conversion.pairs import LARGEST_FILE_BYTES
from blip_scale.data.conversion.screening import turned_upright
from blip_scale.data.conversion.tar_index import (
    IndexJob,
    is_current,
    list_tars,
    write_index,
)
from blip_scale.data.loading import workers
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.reading.cache import (
    FETCHED_TAR_INDEX,
    TAR_INDEX,
    TAR_LIST,
    drop_shards,
    locked,
)
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.storage.locations import Entry, join

_LARGEST_UNINDEXED = 16 << 30
"""Maximum bytes of tars to index when a run starts, at about 100 MB/s."""
_BLOCK = 512  # bytes of the header before each file in a tar
_SIZE = slice(124, 136)  # position of the file's size in the header, in octal digits

logger = logging.getLogger(__name__)


class TarStore(StreamStore):
    """Random access to the samples of tars. Each tar is treated as a shard.

    The index is in the folder of the tars or, if that is read-only, in the local cache. If it is
    missing or belongs to other tars, it is built now, unless the tars are too large.
    """

    index_name = f"{TAR_INDEX}/{TAR_LIST}/{INDEX_NAME}"

    @property
    def index_path(self) -> Path:
        """Path of the list of tars."""
        return self._index / TAR_LIST / INDEX_NAME

    @property
    def roles(self) -> list[str]:
        """Roles of the captions."""
        return self._texts.roles

    def _prepare_index(self, stream: StreamRecipe, retry_s: float) -> Path:
        location = self.remote or str(self.folder)
        try:
            tars = list_tars(location)
            remote_index = join(location, TAR_INDEX)
            remote = remote_index if self.remote and is_current(remote_index, tars) else None
            self._index = self.folder / (FETCHED_TAR_INDEX if remote else TAR_INDEX)
            if remote is None and not is_current(str(self._index), tars):
                self._make_index(location, tars)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(self._message(str(error))) from error
        if remote:
            self._fetch_index()
        texts = replace(
            stream, local=str(self._index), remote=remote, format="mds", captions={}, overlays=[]
        )
        self._texts = StreamStore(texts, self._make_with, self.cache if remote else None, retry_s)
        """Store of all columns except the images."""
        return self._index

    def _make_index(self, location: str, tars: list[Entry]) -> None:
        index_folder = self._index
        size = sum(tar.size for tar in tars)
        command = f"blip-scale index-tars {location}"
        if size > _LARGEST_UNINDEXED:
            raise FileNotFoundError(
                f"{location}: {len(tars)} tars of {size / 1e9:.0f} GB have no current index; "
                f"run `{command}` first"
            )
        try:
            index_folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder, TAR_INDEX):
                if is_current(str(index_folder), tars):  # another process has built it
                    return
                logger.info("stream %s: indexing %d tars in %s", self.name, len(tars), index_folder)
                if self.remote:
                    drop_shards(self.folder)  # the tars have changed
                workers.start_server()
                job = IndexJob(location, str(index_folder))
                summary = write_index(job, start_method=workers.CONTEXT)
        except PermissionError as error:
            raise FileNotFoundError(
                f"{location} has no index and can't be written ({error}): run `{command}` as its "
                "owner, or set it as `remote`, with a cache folder as `local`"
            ) from error
        assert summary is not None  # there is one part
        if not summary["pairs"]["written"]:
            raise ValueError(f"{location}: the tars hold no pairs ({summary['rejects']})")
        logger.info(
            "stream %s: %s of the tars; left out: %s",
            self.name, summary["pairs"], summary["rejects"] or "nothing",
        )  # fmt: skip

    def read(self, number: int, sample: int) -> dict[str, Any]:
        """Read a sample with the columns of `shards.COLUMNS`, fetching a remote tar first.

        Raises:
            CorruptSample: the sample is not at the position in the index.
            DamagedShard: the tar in the remote is damaged or missing.
            FileNotFoundError: the tar can't be fetched, or is evicted at once.
        """
        columns = self._texts.read(number, sample)
        image_place = columns.pop("image_place", ())
        columns["image"] = self._read_from(number, lambda: self._image(number, *image_place))
        columns["source"] = self.name
        return columns

    def prefetch(self, number: int) -> bool:
        """Fetch a tar and its texts; see `StreamStore.prefetch`."""
        return self._texts.prefetch(number) and super().prefetch(number)

    def _image(self, number: int, offset: int, size: int, is_turned: bool) -> bytes:
        end = offset + size
        if not (
            offset >= _BLOCK and 0 <= size <= LARGEST_FILE_BYTES and end <= self.shard_bytes(number)
        ):
            raise ValueError(
                f"no file of {size} bytes can be at byte {offset}: index the tars again"
            )
        path = self.folder / self.shards.name(number)
        file = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(file, _BLOCK + size, offset - _BLOCK)
        finally:
            os.close(file)
        size_field = data[_SIZE].rstrip(b" \0")
        if len(data) != _BLOCK + size or not size_field.isdigit() or int(size_field, 8) != size:
            raise ValueError(f"no file of {size} bytes at byte {offset}: the tar has changed")
        image = data[_BLOCK:]
        return turned_upright(image) if is_turned else image
