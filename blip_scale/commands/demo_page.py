"""Serve a page to try checkpoints on: captions, questions, matching, words on the image, search.

python tools/demo.py runs/demo --images data/demo/heldout_drawing
python tools/demo.py runs/captioner runs/filter runs/vqa --images photos/
Each checkpoint serves the tasks that it was trained for. A pretraining checkpoint captions,
matches, explains and searches.
The page is reachable only from this machine unless --host is set, and fetches nothing from
other hosts. It needs gradio: pip install --no-deps -r requirements-web.txt
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_scale.commands.command_line import Parser, refuse, report_error, within
from blip_scale.commands.page_service import Service
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.inference.images import find_images
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.inference.training_record import training_record

if TYPE_CHECKING:
    import gradio as gr

_MOST_FROM_SHARDS = 1000
"""Maximum number of images taken from a set of shards."""
_LABEL_LENGTH = 60


def main(arguments: Sequence[str] | None = None, prog: str = "demo.py") -> int:
    """Run the command, and return its exit code: 0, or 2 if nothing can be served."""
    options = parser(prog).parse_args(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        # Store uploads in a folder of this process. Gradio's default, /tmp/gradio, is shared by
        # all users.
        with tempfile.TemporaryDirectory(prefix="blip_scale_page_") as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder
            with tempfile.TemporaryDirectory(prefix="blip_scale_images_") as unpacked:
                launch(build(service(options, Path(unpacked))), options)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        fix = "`pip install gradio`, or in a clone `pip install --no-deps -r requirements-web.txt`"
        return refuse(prog, f"the page needs gradio; run {fix}")
    except (OSError, ValueError) as error:
        return report_error(prog, error)
    return 0


def service(options: argparse.Namespace, unpacked: Path | None = None) -> Service:
    """Load the checkpoints and find the images.

    Args:
        options: result of `parser`.
        unpacked: empty folder to which images from shards are written.
    """
    import gradio  # noqa: F401  reports a missing gradio before anything is loaded

    loading = Loading(tokenizer=options.tokenizer, recipe=options.recipe, device=options.device)
    images, labels = [], {}
    if options.images and (Path(options.images) / INDEX_NAME).is_file():
        labels = _unpack(options.images, unpacked or Path(tempfile.mkdtemp()))
        images = list(labels)
    elif options.images:
        images = find_images([options.images])
    blips = [load_blip(path, loading) for path in options.models]
    records = [training_record(path) for path in options.models]
    return Service(blips, images, labels, records)


def _unpack(shards: str, folder: Path) -> dict[str, str]:
    """Write images from a set of shards to files: at most 1,000, evenly spaced over the set.

    Returns:
        Path of each image -> start of its first caption.
    """
    store = StreamStore(StreamRecipe("images", shards))
    step = -(-store.samples // _MOST_FROM_SHARDS)
    labels = {}
    for number, (shard, sample) in enumerate(store.places(range(0, store.samples, step))):
        try:
            content = store.read(shard, sample)
        except CorruptSample:
            continue
        path = folder / f"{number:06d}"
        path.write_bytes(content["image"])
        labels[str(path)] = content["captions"][0][:_LABEL_LENGTH]
    return labels


def build(service: Service) -> gr.Blocks:
    """Build the page. A use that no checkpoint serves gives an error when it is requested."""
    from blip_scale.commands import page_layout

    return page_layout.build(service)


def launch(page: gr.Blocks, options: argparse.Namespace, **more: Any) -> None:
    """Serve the page; `more` is passed to gradio's `launch`."""
    from blip_scale.commands import page_layout

    page_layout.launch(page, options, **more)


def parser(prog: str = "demo.py") -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="CHECKPOINT",
        help="a run's folder, step_N, BLIP's .pth, or a Hugging Face folder",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="FOLDER",
        help="images to show as examples and to search by text: a folder of files or of shards",
    )  # fmt: skip
    parser.add_argument(
        "--recipe",
        help="recipe with the sizes of the network, if the checkpoints do not hold them",
    )
    parser.add_argument("--tokenizer", help="default: the recipe's, or the one beside the model")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="address to serve on; 0.0.0.0 serves other machines too (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=within(int, 1, 65_535), help="default: the first free one from 7860 on"
    )
    parser.add_argument("--open", action="store_true", help="open the browser")
    return parser
