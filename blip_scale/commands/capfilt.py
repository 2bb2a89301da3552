"""CapFilt: write synthetic captions for web images, and keep the captions that match.

python tools/capfilt.py data/laion data/laion_capfilt --captioner runs/cap --filter runs/filter
python tools/capfilt.py s3://bucket/laion s3://bucket/clean --captioner ... --shard 0/64
python tools/capfilt.py data/laion data/laion_vlm --as overlay --captioner-url URL/v1 ...
docs/capfilt.md explains how to train the two checkpoints, and describes the output.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from blip_scale import logs
from blip_scale.capfilt.endpoint import KEY_VARIABLE, Endpoint
from blip_scale.capfilt.filtering import Settings
from blip_scale.capfilt.job import Job, Task, run
from blip_scale.commands.command_line import Parser, check_least, progress_on, refuse, run_command
from blip_scale.config import exit_codes
from blip_scale.data.conversion.pairs import Reason
from blip_scale.data.conversion.run import Part
from blip_scale.inference.loading import Loading
from blip_scale.model.generation import NucleusSettings
from blip_scale.storage.free_space import parse_bytes

_LEAST = {"image_size": 1, "batch_size": 1, "workers": 1, "threads": 1, "shown": 0}
"""Option name, with underscores -> smallest value allowed."""


def main(arguments: Sequence[str] | None = None, prog: str = "capfilt.py") -> int:
    """Run the command, and return its exit code.

    It is 0, 2 for refused input, and 130 or 143 after a signal.
    """
    options = _parser(prog).parse_args(arguments)
    return run_command(prog, lambda: _run(options, prog), "finished shards")


def _run(options: argparse.Namespace, prog: str) -> int:
    check_least(options, _LEAST)
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    workers = options.workers or (1 if on_gpu else os.cpu_count() or 1)
    job = Job(
        options.input, options.out, _settings(options, on_gpu), parse_bytes(options.shard_size),
        options.shown,
    )  # fmt: skip
    task = Task(Part.parse(options.shard), workers, options.scratch)
    start_s = time.perf_counter()
    with tqdm(desc="capfilt", unit="image", mininterval=1.0, smoothing=0.05) as bar:
        statistics = run(job, task, progress_on(bar, "shard"))
        images, seconds = bar.n, time.perf_counter() - start_s
    where = torch.cuda.get_device_name() if on_gpu else f"{workers} CPU processes"
    print(f"{images} images in {seconds:.0f} s: {images / seconds:.1f} images/s on {where}")
    if statistics is None:
        print(f"{options.out}: part {options.shard} is done; other parts are not done yet")
        return exit_codes.DONE
    _print(options.out, statistics)
    asked = statistics["images"]["read"] - statistics["undecodable_images"]
    if 0 < asked == statistics["images_without_answer"]:
        example = statistics["reject_examples"][Reason.NO_ANSWER]
        return refuse(
            prog,
            f"{options.captioner_url}: no image got a caption ({logs.printable(example)}); check "
            f"--captioner-model and --captioner-prompt, then remove {options.out} and start again",
        )
    return exit_codes.DONE


def _settings(options: argparse.Namespace, on_gpu: bool) -> Settings:
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold {options.threshold}: expected a probability from 0 to 1")
    if not options.role.strip() or set(options.role) & {",", "="}:
        raise ValueError(f"--role {options.role!r}: expected a name without , and =")
    sampling = NucleusSettings(
        top_p=options.top_p,
        top_k=options.top_k,
        temperature=options.temperature,
        max_length=options.max_tokens,
        min_length=options.min_tokens,
        repetition_penalty=options.repetition_penalty,
    )
    loading = Loading(
        options.recipe,
        options.tokenizer,
        options.image_size,
        "cuda" if on_gpu else "cpu",
        options.precision or ("bf16" if on_gpu else "fp32"),
    )
    endpoint = _endpoint(options)
    return Settings(
        options.captioner or "", options.filter or "", options.threshold, sampling, options.prompt,
        options.seed, options.batch_size, loading, options.threads, endpoint,
        without_images=options.written_as == "overlay", role=options.role,
    )  # fmt: skip


def _endpoint(options: argparse.Namespace) -> Endpoint | None:
    """Return the external captioner, or None without --captioner-url."""
    if not options.captioner_url:
        if not (options.captioner and options.filter):
            raise ValueError("give --captioner and --filter, or --captioner-url")
        return None
    if options.captioner:
        raise ValueError("--captioner and --captioner-url exclude each other; keep one")
    return Endpoint(
        options.captioner_url.rstrip("/"), options.captioner_model, options.captioner_prompt,
        options.captioner_tokens, requests=options.captioner_requests,
        timeout_s=options.captioner_timeout, retry_s=options.captioner_retry,
    )  # fmt: skip


def _print(out: str, statistics: dict[str, Any]) -> None:
    images = statistics["images"]
    print(f"{out}: {images['written']} of {images['read']} images keep a caption")
    for kind in ("web", "synthetic"):
        counts = statistics[kind]
        print(f"{kind} captions: {counts['kept']} kept, {counts['dropped']} dropped")
    if statistics["images_without_answer"]:
        print(f"{statistics['images_without_answer']} images got no caption (rejects.jsonl)")
    if statistics["undecodable_images"]:
        print(f"{statistics['undecodable_images']} images can't be decoded (rejects.jsonl)")


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", help="shards of prepare_data: a folder or a remote")
    parser.add_argument("out", metavar="OUT", help="folder, or a remote: s3://b/p")
    models = parser.add_argument_group("checkpoints (a run, step_N, .pth, Hugging Face folder)")
    sampling = parser.add_argument_group("synthetic captions (nucleus sampling)")
    running = parser.add_argument_group("running")

    def add(group: argparse._ArgumentGroup, name: str, default: Any, text: str) -> None:
        kind = int if default is None else type(default)
        shown = "" if default is None else " (%(default)s)"
        group.add_argument(name, type=kind, default=default, help=text + shown)

    models.add_argument("--captioner", help="fine-tuned for captions")
    models.add_argument(
        "--filter",
        help="fine-tuned for retrieval; without it, all captions of --captioner-url are kept",
    )
    _add_endpoint_options(parser.add_argument_group("external captioner"), add)
    models.add_argument(
        "--recipe", help="recipe with the sizes of the network, if the checkpoints do not hold them"
    )
    models.add_argument(
        "--tokenizer", help="default: that of the recipe, or the one beside the checkpoints"
    )
    add(models, "--image-size", None, "pixels; default: the image size of each checkpoint")
    models.add_argument("--device", choices=("cpu",), help="default: the GPU if there is one")
    models.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU")
    add(
        models,
        "--threshold",
        Settings.threshold,
        "captions with a lower matching probability are dropped",
    )
    drawn = NucleusSettings()
    add(
        sampling,
        "--top-p",
        drawn.top_p,
        "share of the probability that nucleus sampling draws from",
    )
    add(sampling, "--top-k", drawn.top_k, "number of most likely tokens to draw from")
    add(sampling, "--temperature", drawn.temperature, "above 1: more varied captions")
    add(sampling, "--repetition-penalty", drawn.repetition_penalty, "above 1: fewer repeated words")
    add(sampling, "--max-tokens", 20, "longest caption in tokens, prompt and [SEP] included")
    add(sampling, "--min-tokens", 5, "shortest caption in tokens, prompt included")
    sampling.add_argument(
        "--prompt", help="beginning of every caption; default: that of the checkpoint"
    )
    add(sampling, "--seed", 0, "seed; with the id of an image it fixes the caption")
    add(running, "--batch-size", Settings.batch_size, "images at once")
    add(running, "--workers", None, "processes; default: one on a GPU, else one a core")
    running.add_argument(
        "--as", dest="written_as", choices=("set", "overlay"), default="set",
        help="write a set with images, or an overlay for the shards of IN (%(default)s)",
    )  # fmt: skip
    add(running, "--role", Settings.role, "role of synthetic captions")
    add(running, "--threads", Settings.threads, "threads that decode images in each process")
    add(running, "--shard", "0/1", "process only part i of n, from 0/n to n-1/n")
    add(running, "--shard-size", "64mb", "largest size of a shard")
    add(running, "--shown", 48, "images on the sample sheet")
    add(running, "--scratch", tempfile.gettempdir(), "folder for shards of remotes")
    return parser


def _add_endpoint_options(
    group: argparse._ArgumentGroup, add: Callable[[argparse._ArgumentGroup, str, Any, str], None]
) -> None:
    """Add the options of a captioner behind HTTP."""
    group.add_argument(
        "--captioner-url", default="", metavar="URL",
        help="URL of an API like OpenAI's, such as http://127.0.0.1:8000/v1; its key, if it wants "
        f"one, is in {KEY_VARIABLE}",
    )  # fmt: skip
    add(group, "--captioner-model", "", "name of its model")
    add(group, "--captioner-prompt", Endpoint.prompt, "prompt sent with each image")
    add(group, "--captioner-tokens", Endpoint.max_tokens, "most tokens of a caption")
    add(group, "--captioner-requests", Endpoint.requests, "requests at a time, of each process")
    add(group, "--captioner-timeout", Endpoint.timeout_s, "seconds that a request may take")
    add(group, "--captioner-retry", Endpoint.retry_s, "seconds of retrying a server that fails")
