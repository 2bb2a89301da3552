"""Write the features of a data set to parquet files, and to a FAISS index.

blip-scale embed data/coco embeddings --model runs/filter --texts
blip-scale embed photos/ embeddings --model runs/filter --faiss
The same command continues where an interrupted one stopped. docs/predict.md describes the files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from blip_scale import logs
from blip_scale.commands.command_line import Parser, check_least, run_command
from blip_scale.config import exit_codes
from blip_scale.data.mds import INDEX_NAME
from blip_scale.inference import embeddings
from blip_scale.inference.embeddings import Content
from blip_scale.inference.images import find_images
from blip_scale.inference.loading import Loading, load_blip


def main(arguments: Sequence[str] | None = None, prog: str = "blip-scale embed") -> int:
    """Run the command, and return its exit code.

    It is 0, 1 if an image could not be read, 2 for refused input, and 130 or 143 after a signal.
    """
    options = _parser(prog).parse_args(arguments)
    return run_command(prog, lambda: _embed(options), "finished parts")


def _embed(options: argparse.Namespace) -> int:
    check_least(options, dict.fromkeys(("part_size", "batch_size", "threads", "image_size"), 1))
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is a file, but a folder is needed: give another OUT")
    if options.faiss:
        embeddings.require_faiss()
    is_shards = options.remote or (options.data / INDEX_NAME).is_file()
    images = [] if is_shards else find_images([str(options.data)])
    samples = embeddings.sample_set(options.data, options.remote, images)
    loading = Loading(
        options.recipe, options.tokenizer, options.image_size, options.device, options.precision
    )
    blip = load_blip(options.model, loading)
    blip.require("embed")
    content = Content(
        checkpoint=blip.fingerprint,
        data=samples.fingerprint,
        samples=samples.count,
        width=blip.network.config.embed_dim,
        dtype="float16" if options.half else "float32",
        texts=options.texts,
        part_size=options.part_size,
        image_size=blip.image_size,
    )
    missing = embeddings.prepare(options.out, content)
    print(
        f"{content.samples} images of {content.width} {content.dtype} numbers: "
        f"{_megabytes(content.image_bytes)} in {len(content.parts)} parts, {len(missing)} to write"
    )
    started, unreadable = time.perf_counter(), 0
    left = sum(len(content.parts[number]) for number in missing)
    batch = (options.batch_size, options.threads)
    with tqdm(total=left, unit="image") as bar:
        for number in missing:
            part = embeddings.embed_part(blip, samples, content, number, batch, options.out)
            for images_read, images_failed in part:
                bar.update(images_read)
                unreadable += images_failed
    seconds = time.perf_counter() - started
    print(f"wrote {left} images in {seconds:.1f} s, {unreadable} of them unreadable")
    if options.faiss:
        indexed = embeddings.write_faiss(options.out, content)
        size = (options.out / embeddings.INDEX).stat().st_size
        print(f"wrote {embeddings.INDEX}: {indexed} images, {_megabytes(size)}")
    print(logs.printable(f"{options.out}: {_megabytes(_size_of(options.out))}"))
    return exit_codes.FAILED if unreadable else exit_codes.DONE


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder of MDS shards, or folder of images")
    add("out", type=Path, metavar="OUT", help="folder of the parquet files")
    add("--model", required=True, type=Path, metavar="CHECKPOINT",
        help="a run's folder, step_N, BLIP's .pth, or a Hugging Face folder")  # fmt: skip
    add("--remote", metavar="URL", help="MDS shards in object storage; DATA is their cache")
    add("--texts", action="store_true", help="embed the captions of MDS shards, too")
    add("--half", action="store_true", help="write float16 in place of float32")
    add("--faiss", action="store_true",
        help=f"write an exact inner-product index of the images ({embeddings.INDEX})")  # fmt: skip
    add("--part-size", type=int, default=20_000, help="samples of a part (%(default)s)")
    add("--batch-size", type=int, default=32, help="images in a batch (%(default)s)")
    add("--threads", type=int, default=4, help="threads that decode images (%(default)s)")
    add("--recipe", help="recipe with the sizes of the network, if the checkpoint lacks them")
    add("--tokenizer", help="default: the recipe's, or the one beside the model")
    add("--image-size", type=int, help="pixels; default: the checkpoint's")
    add("--device", help="default: cuda if there is a GPU, else cpu")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")
    return parser
