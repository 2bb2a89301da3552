"""Contenders of the step benchmarks: our step and the published one, each in its own process.

They take turns after each step, so a busy machine slows all of them equally. All train on the same
batches from the same weights.
"""

from __future__ import annotations

import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
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
from blip_scale.engine.watching.hang_limits import HangLimits
from blip_scale.engine.zero.onednn import OneDNNLinear
from blip_scale.inference.inputs import to_model_input
from blip_scale.inference.sizes import med_config
from blip_scale.model.flops import pretraining_flops
from tools.benchmarks.contest import Contest, Failure, ask
from tools.benchmarks.device_work import device_work, gpu_memory, waiting_places
from tools.benchmarks.host_work import host_work
from tools.benchmarks.plain_engine import PlainEngine, PlainMomentum

TOKEN_MEAN = 12.5
"""Mean number of tokens of a caption, including [CLS] and [SEP]. Captions of published sets have 10
to 15."""
TOKEN_SIGMA = 0.35
"""Standard deviation of the logarithm of a caption's number of tokens."""
WARM_UP_STEPS = 2
_BATCHES = 4  # number of different batches, which alternate
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment in which glibc keeps freed blocks, in huge pages, so steps don't reallocate them."""


@dataclass(frozen=True)
class Match:
    """Settings that all contenders share."""

    recipe: Recipe
    ds_config: str
    threads: int
    folder: Path
    """Folder of the data."""
    onednn: bool = True
    """Whether to use the linear layers that the engine uses on a CPU. It has no effect on a GPU."""


@dataclass(frozen=True)
class Contender:
    """One process of a contest."""

    kind: str
    """Key of KINDS."""
    match: Match


def make_match(
    chosen: Recipe,
    ds_config: str,
    threads: int,
    folder: Path,
    token_mean: float = TOKEN_MEAN,
    token_sigma: float = TOKEN_SIGMA,
) -> Match:
    """Write images of noise with captions of realistic lengths, and a recipe that reads them.

    The lengths are log-normal. With a sigma of 0 they are equal.
    """
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
    """The step of a real run, under DeepSpeed's engine."""

    def __init__(self, match: Match) -> None:
        from blip_scale.engine.run import History, WorstStep
        from blip_scale.engine.watching.communication import CommunicationMeter
        from blip_scale.engine.watching.sample_record import SampleRecord
        from blip_scale.engine.zero.engine import start
        from blip_scale.tasks.pretrain import Pretrain

        meter = CommunicationMeter()
        meter.install()
        self.device = start(HangLimits.of(match.recipe).longest_s)
        if self.device.type == "cuda":  # like the train loop, for graph captures
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        self.recipe = match.recipe
        self.task = Pretrain(match.recipe, self.device)
        self.engine, self.momentum = self.wrapped(match)
        self.engine.module.train()
        loader = self.task.batches()
        self.batches = [next(loader) for _ in range(_BATCHES)]
        self.run: Any = SimpleNamespace(
            recipe=self.recipe, task=self.task, engine=self.engine, momentum=self.momentum,
            micro_step=self.micro_step(), meter=meter, accumulation=1, step=0, schedule_shift=0,
            history=History(),
            samples=SampleRecord(match.folder, 0, enabled=False), worst=WorstStep(), named=set(),
            interrupts=SimpleNamespace(is_pending=False),
            heartbeat=SimpleNamespace(timer=SimpleNamespace(waiting_for_data=nullcontext)),
        )  # fmt: skip
        """Attributes of `engine.run.Run` that a step needs."""
        self._endless = itertools.cycle(self.batches)
        if not match.onednn:
            for module in self.engine.module.modules():
                if isinstance(module, OneDNNLinear):
                    module.__class__ = nn.Linear  # type: ignore[assignment]

    def micro_step(self) -> Any:
        """Forward and backward, with or without a graph according to the recipe."""
        from blip_scale.engine.micro_step import choose_micro_step

        setting = self.recipe.model.cuda_graph
        return choose_micro_step(self.engine, setting, self.task.capture_obstacle)

    def warm_up(self, steps: int = WARM_UP_STEPS) -> None:
        """Run some steps."""
        for _ in range(steps):
            self.step()

    def wrapped(self, match: Match) -> tuple[Any, Any]:
        """Build the engine with the task's network and initial weights, and the momentum copies."""
        from blip_scale.engine import collectives
        from blip_scale.engine.zero.engine import initialize
        from blip_scale.engine.zero.momentum import ShardedMomentum

        ranks = collectives.world_size()
        ds_config = checks.resolve_deepspeed(match.recipe, match.ds_config, ranks)
        engine = initialize(self.task.build_network, match.recipe, ds_config)
        engine.fill(self.task.initial_weights())
        return engine, ShardedMomentum(engine, self.task.momentum_pairs)

    def step(self) -> None:
        """Run one optimizer step of the train loop."""
        from blip_scale.engine.step import optimizer_step

        optimizer_step(self.run, self._endless)
        self.run.history.window.clear()

    def split(self) -> dict[str, float]:
        """Seconds of the parts of one step, measured by hooks at their ends."""
        parts: dict[str, float] = {}
        last = [time.perf_counter()]

        def mark(part: str) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            parts[part] = parts.get(part, 0.0) + now - last[0]
            last[0] = now

        with (
            _marked(self.engine.module, mark),
            _heard(self.run, "micro_step", lambda: mark("vision backward")),
            _heard(self.engine, "squared_norms", lambda: mark("gradient norms")),
            _heard(self.engine, "step", lambda: mark("optimizer")),
            _heard(self.task, "after_step", lambda: mark("momentum update, queue")),
        ):
            last[0] = time.perf_counter()
            self.step()
        return parts

    def flops(self) -> float:
        """FLOPs of forward and backward of a step, by torch's counter: mean over the batches."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            for _ in range(_BATCHES):
                self.step()
        return float(counter.get_total_flops()) / _BATCHES

    def trace(self, file: Path) -> None:
        """Write a trace of one step for Perfetto and TensorBoard's profiler."""
        with torch.profiler.profile() as profile:
            self.step()
        profile.export_chrome_trace(str(file))

    def paper_flops(self) -> float:
        """FLOPs of forward and backward of a step by formula, without fillers: mean of batches."""
        tokens = sum(batch.caption_tokens for batch in self.batches) // _BATCHES
        train, queue = self.recipe.train, self.recipe.objective.queue_size
        return pretraining_flops(self.task.config, train.global_batch_size, tokens, queue)

    def peak_flops(self) -> float:
        """FLOP/s of a matrix product in the dtype of the weights."""
        from blip_scale.engine.watching.monitor import measure_peak_flops

        return measure_peak_flops(self.device, self.engine.dtype)

    def describe(self) -> dict[str, float]:
        """Mean number of tokens of the captions."""
        tokens = sum(batch.caption_tokens for batch in self.batches)
        return {"token_mean": tokens / sum(len(batch.ids) for batch in self.batches)}


@contextmanager
def _heard(owner: Any, name: str, after: Callable[[], None]) -> Iterator[None]:
    """Context manager that calls `after` each time a method or callable attribute returns."""
    original = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        after()
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _marked(network: Any, mark: Callable[[str], None]) -> Iterator[None]:
    """Context manager with hooks that mark the end of each part of a PretrainNetwork."""
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
    handles.append(network.register_forward_hook(lambda *_: mark("losses")))
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

        self.device = start(HangLimits.of(match.recipe).longest_s)
        chosen = match.recipe
        task = Pretrain(chosen, self.device)
        loader = task.batches()
        batches = [next(loader) for _ in range(_BATCHES)]
        config = med_config(chosen, load_tokenizer(chosen.model.text))
        queue = FeatureQueue(chosen.model.embed_dim, chosen.objective.queue_size, chosen.seed)
        features = (queue.features.image.to(self.device), queue.features.text.to(self.device))
        med = networks.initialized_med(chosen, config).to(self.device)
        with self.device:
            self.network = PublishedStep(
                med, chosen.objective, chosen.optimizer, features, chosen.model.text.max_tokens
            )
        self.batches = []
        for batch in batches:
            images, text = to_model_input(batch, self.device, torch.float32)
            self.batches.append((images, self.network.padded(text)))
        self.bf16 = chosen.train.precision == "bf16"
        self.steps = 0
        self.attention = "eager"

    def warm_up(self, steps: int = WARM_UP_STEPS) -> None:
        """Choose the ViT's attention and run some steps."""
        self.attention = self._faster_attention()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """Run one optimizer step. In bf16 it runs under autocast, as users of the code do."""
        images, captions = self.batches[self.steps % _BATCHES]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.network.step(images, captions, alpha=0.0)
        self.steps += 1

    def flops(self) -> float:
        """FLOPs of forward and backward of a step, by torch's counter: mean over the batches."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            for _ in range(_BATCHES):
                self.step()
        return float(counter.get_total_flops()) / _BATCHES

    def _faster_attention(self) -> str:
        """Time both attention variants of the ViT and return the faster, for a fair comparison."""
        self.step()
        seconds = {}
        for kind in ("eager", "sdpa"):
            self.network.take_attention(kind)
            seconds[kind] = min(_timed(self.step) for _ in range(2))
        best = min(seconds, key=lambda kind: seconds[kind])
        self.network.take_attention(best)
        return best

    def describe(self) -> dict[str, str]:
        """Name of the chosen attention."""
        return {"published_vision_attention": self.attention}


class Plain(Ours):
    """Our step without DeepSpeed."""

    def wrapped(self, match: Match) -> tuple[Any, Any]:
        """Build the network in a `PlainEngine`, and the momentum copies."""
        from blip_scale.engine.zero import onednn

        network = self.task.build_network()
        weights = self.task.initial_weights()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name].view_as(parameter))
        bf16 = match.recipe.train.precision == "bf16"
        network.to(self.device, torch.bfloat16 if bf16 else torch.float32)
        onednn.take_where_faster(network)  # like the engine
        engine = PlainEngine(network, match.recipe.optimizer)
        return engine, PlainMomentum(engine, self.task.momentum_pairs)

    def micro_step(self) -> Any:
        """Forward and backward without a graph."""
        from blip_scale.engine.micro_step import EagerMicroStep

        return EagerMicroStep(self.engine)


KINDS: dict[str, Callable[[Match], Any]] = {
    "ours": Ours,
    "plain": Plain,
    "published": Published,
}


class StepContest(Contest):
    """Contenders by name, each in its own process."""

    def __init__(self, contenders: dict[str, Contender]) -> None:
        super().__init__()
        self.pipes: dict[str, Connection] = {}
        for name, contender in contenders.items():
            self.add(name, contender)
            self.ask(name, "ready")  # one after another, because building needs the most memory
            self.ask(name, "warm_up")

    def add(self, name: str, contender: Contender) -> None:
        """Start a process, which begins to build its contender."""
        self.pipes[name] = self.start(serve, contender)

    def ask(self, name: str, what: str, *arguments: Any) -> Any:
        """Call a method of a contender.

        Raises:
            ContenderError: the contender failed or died.
        """
        return ask(self.pipes[name], name, (what, arguments))


def serve(pipe: Connection, contender: Contender) -> None:
    """Build a contender and answer calls of its methods until the pipe is closed.

    The answer to `ready` is True if it could be built. If a call raises, the answer is a `Failure`.
    """
    torch.set_num_threads(contender.match.threads)
    torch.manual_seed(0)
    contestant: Any = None

    def built() -> bool | Failure:
        nonlocal contestant
        contestant = KINDS[contender.kind](contender.match)
        return True

    readiness = _attempted(built)
    answers: dict[str, Callable[..., Any]] = {
        "ready": lambda: readiness,
        "seconds": lambda: _timed(contestant.step),
        "turn": lambda steps: _turn(contestant.step, steps),
        "first_steps": lambda steps: _first_steps(contestant, steps),
        "cpu_seconds": lambda: _cpu_seconds(contestant.step),
        "host_work": lambda: host_work(contestant.step),
        "device_work": lambda: device_work(contestant.step),
        "waiting_places": lambda: waiting_places(contestant.step),
        "peak_memory_gib": lambda: _peak_memory_gib(contestant.device),
        "gpu_memory": gpu_memory,
    }
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # skips the shutdown of DeepSpeed's process group
        method = answers.get(what) or getattr(contestant, what)
        pipe.send(_attempted(method, *arguments))


def _attempted(method: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a call, or its exception as a `Failure`."""
    try:
        return method(*arguments)
    except Exception as error:
        traceback.print_exc()
        return Failure.of(error)


def _timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _first_steps(contestant: Any, steps: int) -> float:
    """Run the warm-up and return its seconds. Peak memory is reset afterwards."""
    seconds = _timed(lambda: contestant.warm_up(steps))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return seconds


def _turn(step: Callable[[], None], steps: int) -> list[float]:
    """Seconds of several steps, after an untimed step that fills the allocator's cache.

    The cache is emptied at the end.
    """
    step()
    seconds = [_timed(step) for _ in range(steps)]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return seconds


def _cpu_seconds(step: Callable[[], None]) -> float:
    """CPU seconds of a step, over all threads of the process."""
    began = time.process_time()
    step()
    return time.process_time() - began


def _peak_memory_gib(device: torch.device) -> float:
    from blip_scale.engine.watching.monitor import peak_memory_gib

    return peak_memory_gib(device)
