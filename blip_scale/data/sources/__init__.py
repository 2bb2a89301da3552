"""One small reader a dataset: each tells the chunks of a source, as `blip_scale.data.conversion`
converts them. `demo` makes its set on its own.
"""

from blip_scale.data.conversion import Reader
from blip_scale.data.sources import (
    blip_json,
    coco,
    folder,
    img2dataset,
    nlvr2,
    visdial,
    visual_genome,
    vqa,
    webdataset,
)

READERS: dict[str, Reader] = {
    "coco": coco.chunks,
    "visual_genome": visual_genome.chunks,
    "conceptual_captions": img2dataset.chunks,
    "sbu": img2dataset.chunks,
    "laion": img2dataset.chunks,
    "blip_json": blip_json.chunks,
    "folder": folder.chunks,
    "webdataset": webdataset.chunks,
    "vqa": vqa.chunks,
    "nlvr2": nlvr2.chunks,
    "visdial": visdial.chunks,
}
"""By the name that tools/prepare_data.py and the records' `source` give them."""
