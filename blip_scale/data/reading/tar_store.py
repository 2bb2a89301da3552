"""Samples of a stream out of webdataset tars, by their index (`conversion.tar_index`)."""

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
"""Bytes of tars that are indexed when a run starts, at about 100 MB/s."""
_BLOCK = 512  # bytes of a tar's header, in front of every file
_SIZE = slice(124, 136)  # the file's size in it, in octal digits

logger = logging.getLogger(__name__)


class TarStore(StreamStore):
    """Random access to the samples of tars, which take the place of shards.

    The index lies beside the tars, or in the local cache where it can't lie there. If there is none
    of just these tars, it is made now, unless they are large.
    """

    index_name = f"{TAR_INDEX}/{TAR_LIST}/{INDEX_NAME}"

    @property
    def index_path(self) -> Path:
        """The list of the tars."""
        return self._index / TAR_LIST / INDEX_NAME

    @property
    def roles(self) -> list[str]:
        """Roles of the captions."""
        return self._texts.roles

    def _prepare_index(self, stream: StreamRecipe, retry_s: float) -> Path:
        location = self.remote or str(self.folder)
        try:
            tars = list_tars(location)
            beside = join(location, TAR_INDEX)
            remote = beside if self.remote and is_current(beside, tars) else None
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
        """Everything but the images."""
        return self._index

    def _make_index(self, location: str, tars: list[Entry]) -> None:
        here = self._index
        size = sum(tar.size for tar in tars)
        command = f"blip-scale index-tars {location}"
        if size > _LARGEST_UNINDEXED:
            raise FileNotFoundError(
                f"{location}: {len(tars)} tars of {size / 1e9:.0f} GB have no index, or one of "
                f"other tars; run `{command}` first"
            )
        try:
            here.mkdir(parents=True, exist_ok=True)
            with locked(self.folder, TAR_INDEX):
                if is_current(str(here), tars):  # made by another process in the meantime
                    return
                logger.info("stream %s: %d tars are indexed in %s", self.name, len(tars), here)
                if self.remote:
                    drop_shards(self.folder)  # tars that have changed
                workers.start_server()
                job = IndexJob(location, str(here))
                summary = write_index(job, start_method=workers.CONTEXT)
        except PermissionError as error:
            raise FileNotFoundError(
                f"{location} has no index and can't be written ({error}): run `{command}` as its "
                "owner, or give it as `remote` with a cache as `local`"
            ) from error
        assert summary is not None  # it is of all parts
        if not summary["pairs"]["written"]:
            raise ValueError(f"{location}: no pair is in the tars ({summary['rejects']})")
        logger.info(
            "stream %s: %s of the tars; left out: %s",
            self.name, summary["pairs"], summary["rejects"] or "nothing",
        )  # fmt: skip

    def read(self, number: int, sample: int) -> dict[str, Any]:
        """One sample as the columns of `shards.COLUMNS`; a remote tar is fetched first.

        Raises:
            CorruptSample: the sample is not where the index says.
            DamagedShard: the remote's tar is damaged.
            FileNotFoundError: the tar can't be fetched, or is evicted at once.
        """
        columns = self._texts.read(number, sample)
        place = columns.pop("image_place", ())
        columns["image"] = self._read_from(number, lambda: self._image(number, *place))
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
        stated = data[_SIZE].rstrip(b" \0")
        if len(data) != _BLOCK + size or not stated.isdigit() or int(stated, 8) != size:
            raise ValueError(f"no file of {size} bytes at byte {offset}: the tar has changed")
        image = data[_BLOCK:]
        return turned_upright(image) if is_turned else image
