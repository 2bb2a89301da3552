"""Parts of `gpu_report.py` that time the step on a GPU at one micro-batch."""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip_scale.config import recipe
from blip_scale.config.recipe import Recipe
from tools.benchmarks.contest import ContenderError, receive
from tools.benchmarks.gpu_rows import Rows
from tools.benchmarks.growth import OFFLINE
from tools.benchmarks.step_contenders import Contender, Match, StepContest, make_match
from tools.benchmarks.vocabulary import BERT_SIZE, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent


def _modes(compile_: str, graph: str) -> tuple[str, ...]:
    return f"model.compile={compile_}", f"model.cuda_graph={graph}"


_COMPILED = "ZeRO-3, compiled"
CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "published": ("published", ()),
    "plain PyTorch": ("plain", _modes("false", "false")),
    "ZeRO-3": ("ours", _modes("false", "false")),
    _COMPILED: ("ours", _modes("true", "false")),
    "ZeRO-3, CUDA graph": ("ours", _modes("false", "true")),
    "ZeRO-3, compiled CUDA graph": ("ours", _modes("true", "true")),
}
"""Title -> kind of contender, and its settings in addition to the common ones."""
TINY = (
    "model.vision.name=vit_tiny_patch16_224",
    "model.vision.image_size=32",
    "model.vision.overrides={embed_dim: 48, depth: 2, num_heads: 3}",
    *("model.text.layers=2", "model.text.width=48", "model.text.heads=4"),
    *("model.text.mlp_width=96", "model.embed_dim=16", "objective.queue_size=64"),
)
"""Settings of a network that trains on a CPU in seconds."""

_TOGETHER = 90
"""Largest micro-batch at which all contenders fit on a 140 GB GPU at the same time."""


@dataclass(frozen=True)
class StepPart:
    """Settings of a part that times the step."""

    precision: str
    batch_size: int
    device: str
    tiny: bool
    rounds: int
    """Number of turns per contender."""
    steps: int
    """Number of timed steps per turn."""

    @property
    def key(self) -> dict[str, Any]:
        """Values that identify the rows of this part."""
        return {"precision": self.precision, "batch_size": self.batch_size}


def run_step(part: StepPart, rows: Rows) -> None:
    """Time the contenders in turns, then profile each. Add a row for each contender and stage.

    If a contender refuses its settings, fails or runs out of memory, its row records that, and the
    others continue.
    """
    if part.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as name:
        folder = Path(name)
        chosen = _matches(part, folder, rows)
        with _Turns(part, rows, {}) as turns:
            turns.begin(chosen)
            turns.take()
            turns.look_closer()


def _matches(part: StepPart, folder: Path, rows: Rows) -> dict[str, Contender]:
    """Contenders with a valid recipe. For each other one, add a row with the error."""
    tokenizer = make_tokenizer(folder / "tokenizer", 500 if part.tiny else BERT_SIZE)
    common = [
        *OFFLINE,
        *(TINY if part.tiny else ()),
        f"model.text.tokenizer={tokenizer}",
        f"train.precision={part.precision}",
        f"train.global_batch_size={part.batch_size}",
        f"train.micro_batch_size={part.batch_size}",
    ]
    threads = max(1, len(os.sched_getaffinity(0)) // len(CONTENDERS))
    ds_config = str(ROOT / "ds_configs" / "zero3.json")
    match = make_match(recipe.load("base_129M", common), ds_config, threads, folder)
    chosen = {}
    for title, (kind, settings) in CONTENDERS.items():
        if part.tiny and title == _COMPILED:  # compiling takes a minute on a CPU
            continue
        try:
            wanted: Recipe = recipe.load("base_129M", [*common, *settings])
        except ValueError as error:
            reason = " ".join(str(error).split())
            rows.add(contender=title, refused=f"refused: {reason}"[:300], **part.key)
            continue
        wanted = replace(wanted, data=match.recipe.data, output_dir=match.recipe.output_dir)
        chosen[title] = Contender(kind, Match(wanted, ds_config, threads, folder))
    return chosen


class _Turns(StepContest):
    """Contenders on one device. Each empties its memory cache before the next one's turn."""

    def __init__(self, part: StepPart, rows: Rows, contenders: dict[str, Contender]) -> None:
        super().__init__(contenders)
        self.part, self.rows = part, rows

    def begin(self, contenders: dict[str, Contender]) -> None:
        """Start all contenders, build their networks in parallel, and run the first steps.

        If all fit on the device together, the first steps, which compile, run in parallel too.
        """
        for title, contender in contenders.items():
            self.add(title, contender)
        for title in list(self.pipes):
            self.attempt(title, "ready")
        titles = list(self.pipes)
        together = titles if self.part.batch_size <= _TOGETHER else []
        for title in together:
            self.pipes[title].send(("first_steps", (_first_steps(title),)))
        for title in titles:
            if title in together:
                seconds = self.attempt(title, "first_steps", is_sent=True)
            else:
                seconds = self.attempt(title, "first_steps", _first_steps(title))
            if seconds is not None:
                self.rows.add(contender=title, first_steps_s=round(seconds, 1), **self.part.key)

    def take(self) -> None:
        """Run all rounds, and add a row for each contender."""
        times: dict[str, list[float]] = {title: [] for title in self.pipes}
        for _ in range(self.part.rounds):
            for title in list(self.pipes):
                times[title] += self.attempt(title, "turn", self.part.steps) or []
        for title, seconds in times.items():
            if title in self.pipes:
                memory = self.attempt(title, "gpu_memory") or {}
                median = statistics.median(seconds)
                self.rows.add(
                    contender=title, seconds=median, least_s=min(seconds), steps=len(seconds),
                    pairs_per_s=self.part.batch_size / median, **memory, **self.part.key,
                )  # fmt: skip

    def look_closer(self) -> None:
        """Add rows with the FLOPs of a step and the profiler's figures."""
        for title in list(self.pipes):
            counting = "flops" if title == "published" else "paper_flops"
            flops = self.attempt(title, counting, ends=False)
            self.rows.add(contender=title, flops=flops, **self.part.key)
            description = self.attempt(title, "describe", ends=False) or {}
            self.rows.add(contender=title, **description, **self.part.key)
            if self.part.device == "cpu":
                reason = "no CUDA device: kernels, launches and waits cannot be counted"
                self.rows.add(contender=title, profile_skipped=reason, **self.part.key)
                continue
            work = self.attempt(title, "device_work", ends=False) or {}
            self.rows.add(contender=title, **work, **self.part.key)
            places = self.attempt(title, "waiting_places", ends=False)
            self.rows.add(contender=title, waiting_places=places, **self.part.key)

    def attempt(
        self, title: str, what: str, *arguments: Any, ends: bool = True, is_sent: bool = False
    ) -> Any:
        """Return a contender's answer. If it fails, add a row and return None.

        Args:
            title: title of the contender.
            what: method to call.
            arguments: arguments of the method.
            ends: whether to remove the contender if it fails.
            is_sent: whether the request was sent before.
        """
        try:
            if is_sent:
                return receive(self.pipes[title], title)
            return self.ask(title, what, *arguments)
        except ContenderError as error:
            failure = error.failure
            column, text = "error", f"{failure.kind}: {failure.message}"[:300]
            if failure.kind == "OutOfMemoryError":
                text = "out of memory"
            elif failure.kind == "ValueError":
                column, text = "refused", f"refused: {failure.message}"[:300]
            self.rows.add(contender=title, during=what, **{column: text}, **self.part.key)
            if ends:
                self.pipes.pop(title).close()
            return None


def _first_steps(title: str) -> int:
    """Number of untimed first steps, enough to capture a graph for each batch."""
    return 12 if "graph" in title else 3
