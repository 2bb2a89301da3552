"""Run a tiny BLIP on tiny data, and read the files of such runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from fork_server import ForkedProcess, ForkServer
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

from blip_scale import launcher
from blip_scale.data.shards import Record, write_shards

REPO = Path(__file__).resolve().parent.parent.parent
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
SHAPES = ["disc", "square", "bar", "cross"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "big", "small", "on", "grey", "and"]

WIDER: dict[str, Any] = {
    "vision": {"overrides": {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}},
    "text": {"width": 96, "mlp_width": 384},
}
"""Sizes of a network whose weights are large compared with the padding of their ZeRO partitions."""


def picture(colour: str, shape: str, big: bool) -> bytes:
    """Draw a shape of the given colour and size, as a PNG."""
    image = Image.new("RGB", (40, 40), "grey")
    draw, r = ImageDraw.Draw(image), 17 if big else 8
    box = (20 - r, 20 - r, 20 + r, 20 + r)
    if shape == "disc":
        draw.ellipse(box, colour)
    elif shape == "square":
        draw.rectangle(box, colour)
    else:
        draw.rectangle((20 - r, 17, 20 + r, 23), colour)
        if shape == "cross":
            draw.rectangle((17, 20 - r, 23, 20 + r), colour)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def records(name: str) -> list[Record]:
    """Return all 64 drawings, with captions of different lengths."""
    drawings = []
    for colour in COLOURS:
        for shape in SHAPES:
            for big in (True, False):
                size = "big" if big else "small"
                caption = f"a {size} {colour} {shape}" + (" on grey" if big else "")
                key = f"{name}-{colour}-{shape}-{size}"
                drawings.append(Record(key, picture(colour, shape, big), caption, name))
    return drawings


def make_recipe(folder: Path, **changes: Any) -> Path:
    """Write the data, vocabulary and recipe of a run to `folder`, with `changes` to the recipe."""
    from transformers import BertTokenizerFast

    if not (folder / "shapes").exists():
        write_shards(folder / "shapes", records("shapes"), shard_size="8kb")
        write_shards(folder / "heldout", records("heldout")[::4])
        vocabulary = folder / "vocabulary"
        vocabulary.mkdir()
        (vocabulary / "vocab.txt").write_text("\n".join([*WORDS, *COLOURS, *SHAPES]) + "\n")
        BertTokenizerFast.from_pretrained(vocabulary).save_pretrained(vocabulary)
    recipe: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {
            "vision": {
                "name": "vit_tiny_patch16_224",
                "image_size": 32,
                "overrides": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
            },
            "text": {
                "checkpoint": None, "tokenizer": str(folder / "vocabulary"),
                "layers": 2, "width": 48, "heads": 3, "mlp_width": 96,
            },
            "embed_dim": 16,
        },
        "objective": {"queue_size": 40, "momentum": 0.9},
        "data": {
            "streams": [{"name": "shapes", "local": str(folder / "shapes")}],
            "heldout": [{"name": "heldout", "local": str(folder / "heldout")}],
            "workers": 0,
        },
        # Large eps: gradients that are zero except for rounding must not cause full Adam steps.
        "optimizer": {"peak_lr": 3e-3, "warmup_steps": 4, "eps": 1e-3},
        "train": {"global_batch_size": 16, "max_steps": 6, "epochs": 100, "precision": "fp32"},
        "checkpoint": {"every_steps": 1000, "keep_last": 100},
        "log": {"every_steps": 1, "peak_tflops": 0.1},
        "evaluation": {
            "every_steps": 1000, "captions": 2, "max_caption_tokens": 8, "rerank_top_k": 4,
        },
    }  # fmt: skip
    _merge(recipe, changes)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


Rank = ForkedProcess | subprocess.Popen[bytes]
TRAIN = REPO / "blip_scale" / "train.py"
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def launch(
    recipe: Path, ranks: int = 1, *arguments: str, stage: int = 3, script: Path = TRAIN
) -> list[Rank]:
    """Start the train command on several ranks, like a launcher.

    Each rank writes stderr to its own file. `script` replaces train.py, and gets its arguments. The
    ranks are forked from a process with all imports done; `launch_by_command` starts new
    interpreters.
    """
    port = launcher.free_port()
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        command = [str(script), "--recipe", str(recipe)]
        command += ["--deepspeed", str(REPO / f"ds_configs/zero{stage}.json"), *arguments]
        with (recipe.parent / f"stderr_{rank}.txt").open("a") as stderr:
            processes.append(fork_server().start(command, environment, REPO, stderr))
    return processes


def run_forked(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the train command to its end in a forked process, as one rank without a launcher.

    Its stderr and stdout are combined as stderr, and stored in a file in `folder`.
    """
    file = folder / "command_output.txt"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    with file.open("w") as output:
        process = fork_server().start([str(TRAIN), *arguments], environment, REPO, output)
    return subprocess.CompletedProcess(arguments, process.wait(300), "", file.read_text())


@cache
def fork_server() -> ForkServer:
    return ForkServer(os.environ | {"DS_ACCELERATOR": "cpu"})


def launch_by_command(recipe: Path, ranks: int | None = None) -> subprocess.Popen:
    """Start a run by a user's command: the `deepspeed` launcher or, without `ranks`, plain Python.

    The files `stdout` and `stderr` beside the recipe hold the output. Plain Python uses ZeRO-2.
    """
    tools = Path(sys.executable).parent
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
    environment |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    if ranks is None:
        command = [sys.executable, "blip_scale/train.py", "--deepspeed", "ds_configs/zero2.json"]
    else:
        command = [str(tools / "deepspeed"), "--num_gpus", str(ranks)]
        command += ["--master_port", str(launcher.free_port()), "--log_level", "error"]
        command += ["blip_scale/train.py", "--deepspeed", "ds_configs/zero3.json"]
    command += ["--recipe", str(recipe)]
    with (recipe.parent / "stdout").open("w") as out, (recipe.parent / "stderr").open("w") as err:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=REPO
        )


def finish(processes: list[Rank], timeout_s: float = 540) -> list[int]:
    """Wait for all ranks, and return their exit codes. If a rank fails, kill the others."""
    codes = []
    for process in processes:
        codes.append(process.wait(timeout_s))
        if codes[-1] not in (0, 75):
            for other in processes:
                other.kill()
    return codes


def train(recipe: Path, ranks: int = 1, *arguments: str, stage: int = 3) -> None:
    """Train to the end. If a rank fails, fail with the output of all ranks."""
    codes = finish(launch(recipe, ranks, *arguments, stage=stage))
    assert codes == [0] * ranks, said(recipe)


def said(recipe: Path) -> str:
    """Return the terminal output of all ranks."""
    return "\n".join(file.read_text() for file in sorted(recipe.parent.glob("stderr_*.txt")))


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Return the losses by step, from metrics.jsonl."""
    by_step = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss/total" in entry:
            values = {name: entry[name] for name in entry if name.startswith("loss/")}
            by_step[entry["step"]] = values
    return by_step


def whole_tensors(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """Return all flattened tensors of a kind: `weight`, `momentum`, `exp_avg` or `exp_avg_sq`."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for path in sorted(checkpoint.glob("rank_*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, start in file.metadata().items():
                if f"{kind}/{name}" in file.keys():  # noqa: SIM118
                    piece = file.get_tensor(f"{kind}/{name}")
                    pieces.setdefault(name, []).append((int(start), piece))
    wholes = {}
    for name, parts in pieces.items():
        in_order = sorted(parts, key=lambda part: part[0])
        wholes[name] = torch.cat([piece for _, piece in in_order])
    return wholes
