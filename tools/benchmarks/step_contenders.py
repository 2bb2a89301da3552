"""What `tools/benchmark.py step` measures: ours and the published step, in processes of their own.

They take turns, a step each, so that whatever else the machine does meets both. Both train on the
same batches from the same weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip_scale.config import checks, recipe
from blip_scale.config.recipe import Recipe
from blip_scale.data.shards import Record, write_shards
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.engine.transfers import to_host
from blip_scale.inference.inputs import to_model_input
from blip_scale.inference.sizes import med_config
from tools.benchmarks.contest import Contest, ask
from tools.benchmarks.host_work import host_work
from tools.benchmarks.plain_engine import PlainEngine, PlainMomentum

TOKEN_MEAN = 12.5
"""Tokens of a caption, [CLS] and [SEP] included: published captions lie at 10 to 15."""
TOKEN_SIGMA = 0.35
"""Of the logarithm of their number."""
_WARM_UP_STEPS = 2
_BATCHES = 4  # different ones, in turns
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""glibc keeps large blocks, in huge pages: their cost is no matter of the step."""


@dataclass(frozen=True)
class Match:
    """What all contenders run."""

    recipe: Recipe
    ds_config: str
    threads: int
    folder: Path
    """Holds the data."""


def make_match(
    chosen: Recipe,
    ds_config: str,
    threads: int,
    folder: Path,
    token_mean: float = TOKEN_MEAN,
    token_sigma: float = TOKEN_SIGMA,
) -> Match:
    """Write pictures of noise with captions of realistic lengths (log-normal; with a sigma of 0 all
    are equal), and a recipe that reads them."""
    batch = chosen.train.global_batch_size
    tokenizer = load_tokenizer(chosen.model.text)
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii()]
    rng = np.random.default_rng(0)
    side = chosen.model.vision.image_size

    def records() -> Iterator[Record]:
        for number in range(_BATCHES * batch):
            drawn = rng.lognormal(np.log(token_mean) - token_sigma**2 / 2, token_sigma)
            length = int(np.clip(round(drawn), 3, chosen.model.text.max_tokens)) - 2
            caption = " ".join(rng.choice(words, length))
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            yield Record(f"{number:06}", _encoded(pixels), caption, "noise")

    write_shards(folder / "noise", records())
    streams = [recipe.StreamRecipe(name="noise", local=str(folder / "noise"))]
    reading = recipe.DataRecipe(streams=streams, workers=0)
    ready = replace(chosen, data=reading, output_dir=str(folder / "run"))
    return Match(ready, ds_config, threads, folder)


def _encoded(pixels: np.ndarray) -> bytes:
    import simplejpeg

    return simplejpeg.encode_jpeg(pixels)


class Ours:
    """The step of a real run on one rank, under DeepSpeed's engine."""

    def __init__(self, match: Match) -> None:
        from blip_scale.engine.zero.engine import start
        from blip_scale.tasks.pretrain import Pretrain

        self.device = start(match.recipe.train.stall_timeout_s)
        self.recipe = match.recipe
        self.task = Pretrain(match.recipe, self.device)
        self.engine, self.momentum = self.wrapped(match)
        self.engine.module.train()
        loader = self.task.batches()
        self.batches = [next(loader) for _ in range(_BATCHES)]
        self.steps = 0

    def wrapped(self, match: Match) -> tuple[Any, Any]:
        """The engine around the task's network, filled, and the momentum copies."""
        from blip_scale.engine import collectives
        from blip_scale.engine.zero.engine import initialize
        from blip_scale.engine.zero.momentum import ShardedMomentum

        ranks = collectives.world_size()
        ds_config = checks.resolve_deepspeed(match.recipe, match.ds_config, ranks)
        engine = initialize(self.task.build_network, match.recipe, ds_config)
        engine.fill(self.task.initial_weights())
        return engine, ShardedMomentum(engine, self.task.momentum_pairs)

    def step(self, mark: Callable[[str], None] = lambda part: None) -> None:
        """One optimizer step as the train loop takes it; `mark` hears what has just ended."""
        self.forward_and_backward(mark)
        norms = self.engine.squared_norms().sqrt()
        apply = to_host(norms)[0] < float("inf")
        self.engine.step(self.recipe.optimizer.peak_lr, apply=apply, norm=norms[0])
        mark("optimizer")
        self.task.after_step(self.engine, self.momentum, applied=True)
        mark("momentum update, queue")
        self.steps += 1

    def forward_and_backward(self, mark: Callable[[str], None]) -> None:
        from blip_scale.engine.task import Progress

        batch = self.batches[self.steps % _BATCHES]
        progress = Progress(self.steps, self.steps, self.task.steps_per_epoch)
        outputs = self.engine.forward(*self.task.inputs(batch, progress))
        self.task.collect(outputs, progress)
        mark("losses")
        self.engine.backward(outputs["loss/total"], is_last=True)
        mark("vision backward")

    def split(self) -> dict[str, float]:
        """Seconds of the parts of one step, by hooks at their ends."""
        network = self.engine.module
        parts: dict[str, float] = {}
        last = [time.perf_counter()]

        def mark(part: str) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            parts[part] = parts.get(part, 0.0) + now - last[0]
            last[0] = now

        with _marked(network, mark):
            last[0] = time.perf_counter()
            self.step(mark)
        return parts

    def flops(self) -> float:
        """Of forward and backward of a step, by torch's counter: mean over the batches."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            for _ in range(_BATCHES):
                self.forward_and_backward(lambda part: None)
                self.task.after_step(self.engine, self.momentum, applied=False)
                self.engine.step(0.0, apply=False, norm=torch.zeros((), device=self.device))
                self.steps += 1
        return float(counter.get_total_flops()) / _BATCHES

    def trace(self, file: Path) -> None:
        """One step in the format of Perfetto and TensorBoard's profiler."""
        with torch.profiler.profile() as profile:
            self.step()
        profile.export_chrome_trace(str(file))

    def peak_flops(self) -> float:
        """Of a matrix product in the type of the weights."""
        from blip_scale.engine.watching.monitor import measure_peak_flops

        return measure_peak_flops(self.device, self.engine.dtype)

    def describe(self) -> dict[str, float]:
        """Token mean of the captions."""
        tokens = sum(len(batch.token_ids) for batch in self.batches)
        return {"token_mean": tokens / sum(len(batch.ids) for batch in self.batches)}


@contextmanager
def _marked(network: Any, mark: Callable[[str], None]) -> Iterator[None]:
    """Hooks on the parts of a PretrainNetwork that say when each ended, forward and backward."""
    med, momentum = network.med, network.contrast.momentum
    handles = []
    passes = [0]

    def after_text(module: nn.Module, inputs: Any, output: Tensor) -> None:
        passes[0] += 1
        if passes[0] == 1:
            mark("text forward")
            output.register_hook(lambda gradient: mark("sweep backward"))
        else:
            mark("sweep forward")
            output.register_hook(lambda gradient: mark("head backward"))

    def after_vision(module: nn.Module, inputs: Any, output: Tensor) -> None:
        mark("vision forward")
        output.register_hook(lambda gradient: mark("text backward"))

    for module, hook in ((med.vision, after_vision), (med.text, after_text)):
        handles.append(module.register_forward_hook(hook))
    for module, part in (
        (momentum.vision, "momentum vision"), (momentum.text, "momentum text"),
        (med.lm_head, "head forward"),
    ):  # fmt: skip
        handles.append(module.register_forward_hook(lambda *_, part=part: mark(part)))
    handles.append(med.temperature.register_forward_hook(lambda *_: mark("projections")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Published:
    """The step of the published code, from the same weights, on the same batches."""

    def __init__(self, match: Match) -> None:
        from blip_scale.engine.zero.engine import start
        from blip_scale.objectives.feature_queue import FeatureQueue
        from blip_scale.tasks import networks
        from blip_scale.tasks.pretrain import Pretrain
        from tools.benchmarks.published_step import PublishedStep

        self.device = start(match.recipe.train.stall_timeout_s)
        chosen = match.recipe
        task = Pretrain(chosen, self.device)
        loader = task.batches()
        batches = [next(loader) for _ in range(_BATCHES)]
        self.batches = [to_model_input(b, self.device, torch.float32) for b in batches]
        config = med_config(chosen, load_tokenizer(chosen.model.text))
        queue = FeatureQueue(chosen.model.embed_dim, chosen.objective.queue_size, chosen.seed)
        features = (queue.features.image.to(self.device), queue.features.text.to(self.device))
        med = networks.initialized_med(chosen, config).to(self.device)
        with self.device:
            self.network = PublishedStep(
                med, chosen.objective, chosen.optimizer, features, chosen.model.text.max_tokens
            )
        self.bf16 = chosen.train.precision == "bf16"
        self.steps = 0
        self.attention = self._faster_attention()

    def step(self) -> None:
        """One optimizer step; in bf16 under autocast, as its users run it."""
        images, text = self.batches[self.steps % _BATCHES]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.network.step(images, text, alpha=0.0)
        self.steps += 1

    def _faster_attention(self) -> str:
        """The ViT's, by trying: a comparison should not be won by a bad choice."""
        self.step()
        seconds = {}
        for kind in ("eager", "sdpa"):
            self.network.take_attention(kind)
            seconds[kind] = min(_timed(self.step) for _ in range(2))
        best = min(seconds, key=lambda kind: seconds[kind])
        self.network.take_attention(best)
        return best

    def describe(self) -> dict[str, str]:
        """What was chosen."""
        return {"published_vision_attention": self.attention}


class Plain(Ours):
    """Our step without DeepSpeed."""

    def wrapped(self, match: Match) -> tuple[Any, Any]:
        """The network itself."""
        from blip_scale.engine.zero import onednn

        network = self.task.build_network()
        weights = self.task.initial_weights()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name].view_as(parameter))
        bf16 = match.recipe.train.precision == "bf16"
        network.to(self.device, torch.bfloat16 if bf16 else torch.float32)
        onednn.take_where_faster(network)  # as the engine does
        engine = PlainEngine(network, match.recipe.optimizer)
        return engine, PlainMomentum(engine, self.task.momentum_pairs)


CONTENDERS: dict[str, Callable[[Match], Any]] = {
    "ours": Ours,
    "plain": Plain,
    "published": Published,
}


class StepContest(Contest):
    """A process a contender."""

    def __init__(self, match: Match, names: list[str]) -> None:
        super().__init__()
        self._pipes: dict[str, Connection] = {}
        for name in names:
            self._pipes[name] = self.start(serve, CONTENDERS[name], match)
            self.ask(name, "ready")  # one after another: building takes the most memory

    def ask(self, name: str, what: str, *arguments: Any) -> Any:
        """Call a method of a contender; raises RuntimeError where it died."""
        return ask(self._pipes[name], name, (what, arguments))


def serve(pipe: Connection, build: Callable[[Match], Any], match: Match) -> None:
    """Build a contender, warm it up, and answer with its methods until the pipe is closed."""
    torch.set_num_threads(match.threads)
    torch.manual_seed(0)
    contender = build(match)
    for _ in range(_WARM_UP_STEPS):
        contender.step()
    from blip_scale.engine.watching.monitor import peak_memory_gib

    answers: dict[str, Callable[..., Any]] = {
        "ready": lambda: True,
        "seconds": lambda: _timed(contender.step),
        "host_work": lambda: host_work(contender.step),
        "peak_memory_gib": lambda: peak_memory_gib(contender.device),
    }
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # DeepSpeed's process group is not torn down
        pipe.send((answers.get(what) or getattr(contender, what))(*arguments))


def _timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
