"""The readers of `prepare-data`. To add a reader, add an entry to `READERS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blip_scale.data.conversion.pairs import Reader
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.sources.blip_json import chunks as blip_json_chunks
from blip_scale.data.sources.coco import chunks as coco_chunks
from blip_scale.data.sources.flickr30k import chunks as flickr30k_chunks
from blip_scale.data.sources.folder import chunks as folder_chunks
from blip_scale.data.sources.foreign_mds import chunks as mds_chunks
from blip_scale.data.sources.img2dataset import chunks as img2dataset_chunks
from blip_scale.data.sources.nlvr2 import chunks as nlvr2_chunks
from blip_scale.data.sources.published import SETS
from blip_scale.data.sources.sbu import chunks as sbu_chunks
from blip_scale.data.sources.visdial import chunks as visdial_chunks
from blip_scale.data.sources.visual_genome import chunks as visual_genome_chunks
from blip_scale.data.sources.vqa import chunks as vqa_chunks
from blip_scale.data.sources.webdataset import chunks as webdataset_chunks


@dataclass(frozen=True)
class SourceReader:
    """A reader with its help text and options."""

    chunks: Reader
    """Function chunks(source, **options) that returns the chunks to convert."""
    help: str
    """Description of the input, in one line."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Option of this reader only -> help text. A keyword `split` of `chunks` becomes `--split`.
    Values are text, "" by default."""
    max_words: int = Rules.max_words
    """Number of words to which captions are truncated, unless the user sets --max-words."""


_IMG2DATASET = "as written by img2dataset: tars, parquet or files"
_PUBLISHED = {
    name: SourceReader(img2dataset_chunks, f"{published.title} {_IMG2DATASET}")
    for name, published in SETS.items()
}

READERS: dict[str, SourceReader] = {
    "coco": SourceReader(
        coco_chunks,
        "dataset_coco.json (Karpathy), or BLIP's coco_karpathy_*.json",
        {"split": "part of dataset_coco.json: train (with restval), val or test; default: all"},
    ),
    "visual_genome": SourceReader(
        visual_genome_chunks,
        "folder with region_descriptions.json and image_data.json, or vg_caption.json",
    ),
    "conceptual_captions": SourceReader(img2dataset_chunks, f"CC3M or CC12M {_IMG2DATASET}"),
    "sbu": SourceReader(sbu_chunks, f"SBU captions {_IMG2DATASET}, or its two lists of lines"),
    "flickr30k": SourceReader(flickr30k_chunks, "results_20130124.token or results.csv"),
    **_PUBLISHED,
    "laion": SourceReader(img2dataset_chunks, f"LAION-400M and other lists {_IMG2DATASET}"),
    "blip_json": SourceReader(blip_json_chunks, "JSON lists of {image or url, caption}"),
    "folder": SourceReader(
        folder_chunks,
        "images with captions.csv, metadata.jsonl or a .txt beside each",
        {
            "encoding": "encoding of tables and .txt that are not UTF-8: latin-1, utf-16, ...",
            "columns": "names of the columns of a table without a header: image,caption",
        },
    ),
    "webdataset": SourceReader(webdataset_chunks, "tars of NAME.jpg, NAME.txt, NAME.json"),
    "mds": SourceReader(mds_chunks, "MDS shards of other tools, with --image-key, --caption-key"),
    "vqa": SourceReader(
        vqa_chunks, "BLIP's vqa_*.json and vg_qa.json: {question, answer, image}", max_words=50
    ),
    "nlvr2": SourceReader(
        nlvr2_chunks, "BLIP's nlvr_*.json: {images, sentence, label}", max_words=40
    ),
    "visdial": SourceReader(
        visdial_chunks,
        "visdial_1.0_*.json: dialogs with 100 candidates for each answer",
        {"relevance": "visdial_1.0_val_dense_annotations.json, for NDCG"},
        max_words=50,
    ),
}
"""Name on the command line -> reader. The name is also the default `source` of the records."""
