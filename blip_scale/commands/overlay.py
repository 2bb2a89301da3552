"""Make an overlay: new captions for the images of finished shards. The shards are not changed.

blip-scale overlay data/laion recaptions.parquet data/laion_re --join uid --caption-key re_caption
blip-scale overlay s3://b/laion captions.jsonl s3://b/laion_re --join url --caption-key syn=syn_text
docs/data.md explains how a stream uses overlays and what overlay.json counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from blip_scale.commands.command_line import Parser, run_command
from blip_scale.commands.prepare_data import check_not_read
from blip_scale.config import exit_codes
from blip_scale.data.captions import parse_roles
from blip_scale.data.conversion.caption_files import KEYS, CaptionFiles
from blip_scale.data.conversion.overlay import OverlayJob, make_overlay


def main(arguments: Sequence[str] | None = None, prog: str = "overlay.py") -> int:
    """Run the command, and return its exit code.

    It is 0, 2 for refused input, and 130 or 143 after a signal.
    """
    options = _parser(prog).parse_args(arguments)
    return run_command(prog, lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    caption_key = ",".join(options.caption_key)
    parse_roles(caption_key)
    files = CaptionFiles(
        tuple(options.captions), options.join, caption_key, options.key_column, options.tar_ids
    )
    for location in options.captions:
        check_not_read(options.out, location)
    job = OverlayJob(options.images, files, options.out, options.duplicates, options.scratch)
    with tqdm(desc="overlay", unit="row", mininterval=1.0) as bar:
        manifest = make_overlay(job, bar.update)
    _tell(options.out, manifest)
    return exit_codes.DONE


def _tell(out: str, manifest: dict[str, Any]) -> None:
    captions, samples = manifest["captions"], manifest["samples"]
    roles = ", ".join(f"{count} {role}" for role, count in manifest["roles"].items())
    parts = " + ".join(f"{captions[name]} {name}" for name in captions if name != "read")
    print(f"{out}: {roles}")
    print(f"captions: {captions['read']} read = {parts}")
    for reason, count in manifest["rejects"].items():
        print(f"  {reason}: {count}")
    rest = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in samples.items())
    print(f"images: {rest}")


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="shards of prepare-data: a folder or a remote")
    add(
        "captions", metavar="CAPTIONS", nargs="+",
        help="parquet, JSON lines or tars with the captions: files or folders",
    )  # fmt: skip
    add("out", metavar="OUT", help="folder, or a remote: s3://b/p")
    add("--join", choices=KEYS, required=True, help="key that matches captions to images")
    add(
        "--caption-key", action="append", required=True, metavar="KEY,ROLE=KEY,...",
        help="keys or columns of captions, and their roles; may be repeated",
    )  # fmt: skip
    add("--key-column", default="", help="column of the key, if it has an unusual name")
    add(
        "--tar-ids", action="store_true",
        help="ids from tars begin with the tar's name, as those of the webdataset reader do",
    )  # fmt: skip
    add(
        "--duplicates", choices=("refuse", "first", "all"), default="refuse",
        help="rule for a key that occurs again with other captions (%(default)s)",
    )  # fmt: skip
    add("--scratch", help="folder for files of remotes (default: the system's)")
    return parser
