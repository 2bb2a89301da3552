"""The readers that `prepare-data` offers: each tells the chunks of a source, as
`blip_scale.data.conversion` converts them. The sets of `demo_sets` are made on their own.
"""

from __future__ import annotations

from blip_scale.data.conversion.pairs import Reader
from blip_scale.data.sources.blip_json import chunks as blip_json_chunks
from blip_scale.data.sources.coco import chunks as coco_chunks
from blip_scale.data.sources.folder import chunks as folder_chunks
from blip_scale.data.sources.img2dataset import chunks as img2dataset_chunks
from blip_scale.data.sources.nlvr2 import chunks as nlvr2_chunks
from blip_scale.data.sources.visdial import chunks as visdial_chunks
from blip_scale.data.sources.visual_genome import chunks as visual_genome_chunks
from blip_scale.data.sources.vqa import chunks as vqa_chunks
from blip_scale.data.sources.webdataset import chunks as webdataset_chunks

READERS: dict[str, Reader] = {
    "coco": coco_chunks,
    "visual_genome": visual_genome_chunks,
    "conceptual_captions": img2dataset_chunks,
    "sbu": img2dataset_chunks,
    "laion": img2dataset_chunks,
    "blip_json": blip_json_chunks,
    "folder": folder_chunks,
    "webdataset": webdataset_chunks,
    "vqa": vqa_chunks,
    "nlvr2": nlvr2_chunks,
    "visdial": visdial_chunks,
}
"""By the name that tools/prepare_data.py and the records' `source` give them."""
