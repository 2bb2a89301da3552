"""The ZeRO engine: a network under DeepSpeed's ZeRO, and the part of every parameter that this rank
owns.

Under ZeRO-3 each rank owns an equal slice of each flattened parameter; under ZeRO-1/2 a contiguous
stretch of all of them laid end to end. Both are the same thing to the rest of the engine: a list of
`ParameterSlice`s. Frozen parameters are cut as under ZeRO-3 at every stage.

Under ZeRO-3 the weights that compute stay whole on every rank where they fit (`whole_weights`), and
are partitioned otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from blip_scale import launcher, logs
from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives, rendezvous
from blip_scale.engine.zero import deepspeed_patches, onednn, whole_weights
from blip_scale.engine.zero.gradient_buckets import GradientBuckets
from blip_scale.engine.zero.parameter_slices import (
    ParameterSlice,
    SliceValues,
    frozen_slice,
    gradients_of,
    trainable_slice,
)
from blip_scale.engine.zero.whole_weights import FlatWeights
from blip_scale.model.compiling import compile_blocks

logger = logging.getLogger(__name__)

_AFTER_STACKS_S = 10.0
_SHARED_MEMORY = "deepspeed_shm_comm"
"""DeepSpeed's name for its exchange between ranks on a CPU."""


class AdamW(torch.optim.AdamW):
    """torch's AdamW with a switch: with `skip` set, a step leaves weights and moments untouched."""

    skip = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, unless `skip` is set."""
        if not self.skip:
            super().step(closure)


@dataclass
class ZeroEngine:
    """DeepSpeed's engine with the parameter slices of this rank.

    A micro-step is `forward` and `backward`. Where nothing stands against it (`capture_obstacle`),
    a CUDA graph can hold `forward` and `compute_gradients`; then `gather_weights` comes before a
    replay and `add_gradients` after it.
    """

    deepspeed: Any
    optimizer: torch.optim.Optimizer
    stage: int
    trainable: dict[str, nn.Parameter]
    slices: list[ParameterSlice]
    """Slices of what trains; after `fill` of what is frozen too."""
    towers: dict[str, list[int]]
    """Index into `slices` by tower (`vision`, `text`), for gradient norms."""
    weights_stay_whole: bool
    """Whether every rank keeps all weights that compute, in the passes and between them."""
    weights_reason: str
    """Sentence for the log: where the weights lie, and why."""
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameters that keep the weights of `fill`."""
    _flats: list[FlatWeights] = field(default_factory=list)
    _flat_of: dict[int, FlatWeights] = field(default_factory=dict)
    _norm: Tensor | None = None
    _gradient_pieces: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        zero = self.deepspeed.optimizer
        if self.stage == 3 and deepspeed_patches.are_checked():
            deepspeed_patches.share_masters(zero)
            deepspeed_patches.trim(zero, self._norm_for_clipping)
            deepspeed_patches.skip_waits(zero)
            if not self.weights_stay_whole:
                deepspeed_patches.drop_idle_hooks(zero)
        if self.weights_stay_whole:
            deepspeed_patches.drop_all_hooks(self.deepspeed)
            self.deepspeed.set_gradient_accumulation_boundary(True)  # `step` is called at the end
            trained = self.keep_whole(list(self.trainable.values()), zero.lp_param_buffer)
            self._buckets = GradientBuckets(
                trained.parameters,
                trained.sizes,
                zero.grad_partitions_flat_buffer,
                zero.reduce_bucket_size,
                self.deepspeed.gradient_accumulation_steps(),
                zero.communication_data_type,
            )

    @property
    def module(self) -> nn.Module:
        """The network that was wrapped."""
        return self.deepspeed.module

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return torch.device(self.deepspeed.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that compute."""
        return next(self.module.parameters()).dtype

    @property
    def parameter_count(self) -> int:
        """Trainable parameters, over all ranks."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.trainable.values())

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Names of the entries of `squared_norms`."""
        return ("all", *self.towers)

    @property
    def capture_obstacle(self) -> str | None:
        """Why forward and backward cannot be captured in a CUDA graph; None where they can."""
        if self.weights_stay_whole:
            return None
        if self.stage != 3:
            return f"ZeRO-{self.stage} reduces gradients from Python hooks in the backward pass"
        return f"weights are {self.weights_reason}: they are gathered from Python inside the blocks"

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the network; what tasks take as `network`."""
        if self.weights_stay_whole:
            self.gather_weights()
            return self.module(*arguments, **named)
        return self.deepspeed(*arguments, **named)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of loss / accumulation to this rank's share of the averaged gradient.

        Args:
            loss: of a micro-batch, 0-dimensional.
            is_last: whether it is the last micro-step before `step`.
        """
        if self.weights_stay_whole:
            self._buckets.backward(loss, is_last)
            return
        self.deepspeed.backward(loss)
        if not is_last:
            self.deepspeed.step()

    def compute_gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradients of loss / accumulation, one a trainable parameter; nothing else happens, so it
        can be captured. Whole weights only."""
        return self._buckets.compute(loss)

    def add_gradients(self, gradients: list[Tensor], is_last: bool) -> None:
        """Add what `compute_gradients` gave, or what a replay has written there, as `backward`
        does. Whole weights only."""
        self._buckets.add(gradients, is_last)

    def gather_weights(self) -> None:
        """Make the weights that compute follow the last step: one exchange for what trains and one
        for momentum copies, none where nothing changed. `forward` calls it; all ranks call."""
        if not self.weights_stay_whole:
            return
        if self._flat_of.keys() != self._ids:
            rest = [p for p in self.module.parameters() if id(p) not in self._flat_of]
            self.keep_whole(rest)
        for flat in self._flats:
            if flat.is_stale:
                flat.gather()

    @functools.cached_property
    def _ids(self) -> set[int]:
        return {id(p) for p in self.module.parameters()}

    def keep_whole(
        self, parameters: list[nn.Parameter], parts: Tensor | None = None
    ) -> FlatWeights:
        """Lay parameters into one flat tensor that is gathered at once; whole weights only.

        `parts`: see `FlatWeights`.
        """
        flat = FlatWeights(parameters, parts)
        self._flats.append(flat)
        self._flat_of |= {id(p): flat for p in parameters}
        return flat

    def step(self, learning_rate: float, apply: bool, norm: Tensor) -> None:
        """The optimizer step after the last micro-step; the host does not wait.

        Args:
            learning_rate: of this step.
            apply: False drops the gradients; weights and moments stay as they are.
            norm: L2 norm of the averaged gradient over all ranks, for clipping, a scalar on the
                device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.skip = not apply
        self._norm = norm
        if self.weights_stay_whole:
            zero = self.deepspeed.optimizer
            groups = zero.grad_partitions_flat_buffer.split(zero.fp16_partitioned_groups_flat_numel)
            zero.averaged_gradients = {index: [group] for index, group in enumerate(groups)}
            self._buckets.micro_steps = 0
        self.deepspeed.step()
        if self.weights_stay_whole:
            self._flats[0].is_stale |= apply
        elif self.stage == 3 and deepspeed_patches.are_checked():
            deepspeed_patches.trim_module_stack()

    def squared_norms(self) -> Tensor:
        """Sums of squares [1 + towers] of this rank's averaged gradients before clipping, fp64 on
        the device, in the order of `norm_names`; after the last backward.

        A sum over the ranks makes squared L2 norms of them. The host does not wait.
        """
        pieces = self._gradient_pieces or self._find_gradients()
        everything = [gradient for tower in pieces for gradient in tower]
        if not everything:
            return torch.zeros(1 + len(pieces), dtype=torch.float64, device=self.device)
        squares = torch.stack(torch._foreach_norm(everything)).double().square()
        squares = squares.to(self.device, non_blocking=True)  # offloaded gradients lie on the host
        towers = torch.stack([part.sum() for part in squares.split([len(p) for p in pieces])])
        return torch.cat([towers.sum()[None], towers])

    def _find_gradients(self) -> list[list[Tensor]]:
        """This rank's averaged gradients, a list a tower."""
        pieces = [
            gradients_of([self.slices[index] for index in indices], self.deepspeed)
            for indices in self.towers.values()
        ]
        if self.weights_stay_whole:  # they stay where they are
            self._gradient_pieces = pieces
        return pieces

    def _norm_for_clipping(self) -> Tensor:
        assert self._norm is not None, "DeepSpeed asks for the norm inside `step` alone"
        return self._norm.float()

    def assign(self, parameters: list[nn.Parameter], parts: list[SliceValues]) -> None:
        """Write compute weights from this rank's parts of some parameters.

        Every rank must call it with the same parameters; `parts` are those that this rank owns.
        ZeRO-3 needs no exchange: the next forward pass gathers what it needs. Below, where every
        rank holds whole parameters, the parts of all ranks are put together in one sum.
        """
        if not parameters:
            return
        if self.stage == 3:
            pairs = [
                (parameters[part.index].ds_tensor.data[: part.values.numel()], part.values)
                for part in parts
            ]  # in fp32 both are one memory
            apart = [(own, new) for own, new in pairs if own.data_ptr() != new.data_ptr()]
            if apart:
                torch._foreach_copy_([own for own, _ in apart], [new for _, new in apart])
            self._mark_stale(parameters)
            return
        numels = [p.numel() for p in parameters]
        flat = torch.zeros(sum(numels), dtype=self.dtype, device=self.device)
        pieces = flat.split(numels)
        targets = [
            pieces[part.index][part.start : part.start + part.values.numel()] for part in parts
        ]
        if parts:
            torch._foreach_copy_(targets, [part.values for part in parts])
        collectives.all_reduce_sum(flat)  # every element has one owner: adding zeros is exact
        wholes = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        torch._foreach_copy_([p.data for p in parameters], wholes)

    def _mark_stale(self, parameters: list[nn.Parameter]) -> None:
        """The next forward pass gathers these parameters."""
        if self.weights_stay_whole:
            for parameter in parameters:
                if id(parameter) in self._flat_of:
                    self._flat_of[id(parameter)].is_stale = True
            return
        stale = [p for p in parameters if _holds_a_copy(p)]
        if stale:
            stale[0].partition(stale)

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Set this rank's fp32 masters, and the compute weights after them, from whole tensors by
        name. Parameters among them that don't train become `frozen`."""
        for name, parameter in self.module.named_parameters():
            if name in weights and not parameter.requires_grad and name not in self.frozen:
                self.frozen[name] = parameter
                self.slices += frozen_slice(name, parameter)
        for piece in self.slices:
            values = weights[piece.name].detach().flatten()
            piece.weight.copy_(values[piece.start : piece.start + piece.numel])
        self.refresh()

    def refresh(self, names: list[str] | None = None) -> None:
        """Make the compute weights follow the fp32 masters: all of them, or those with these
        names."""
        known = self.trainable | self.frozen
        wanted = [name for name in known if names is None or name in names]
        positions = {name: index for index, name in enumerate(wanted)}
        parts = [
            SliceValues(positions[piece.name], piece.start, piece.weight)
            for piece in self.slices
            if piece.name in positions
        ]
        self.assign([known[name] for name in wanted], parts)

    def gather_into(self, source: nn.Module, target: nn.Module) -> None:
        """Copy the compute weights of `source`, a part of the wrapped module, into an ordinary
        module.

        Every rank must call it; every rank gets all weights. Partitioned parameters are gathered
        one at a time, so the peak is one parameter above the size of `target`.
        """
        self.gather_weights()
        for (name, parameter), (other, destination) in zip(
            source.named_parameters(), target.named_parameters(), strict=True
        ):
            if name != other:
                raise ValueError(f"gather_into: {name} of the engine faces {other} of the target")
            with whole(parameter, self.stage == 3 and not self.weights_stay_whole):
                destination.data.copy_(parameter.data)


@contextlib.contextmanager
def whole(parameter: nn.Parameter, is_partitioned: bool) -> Iterator[None]:
    """Inside, the parameter holds all its elements on every rank (read only)."""
    if not is_partitioned:
        yield
        return
    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def _holds_a_copy(parameter: nn.Parameter) -> bool:
    """Whether the parameter is whole, and in memory of its own: on one rank it is a view of this
    rank's part, and to gather it would only make the host wait for a GPU."""
    whole = parameter.ds_status.name == "AVAILABLE"
    return whole and parameter.data_ptr() != parameter.ds_tensor.data_ptr()


def start(timeout_s: float) -> torch.device:
    """Join the process group, one of a single rank where no launcher made more, and give this
    rank's device.

    `timeout_s`: so long a rank waits for the others in an exchange; 0: for ever.
    """
    for variable, alone in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(variable, alone)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(launcher.free_port())
    rendezvous.exchange_on_the_rendezvous_interface()
    _set_up_compiling()
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    elif int(os.environ["WORLD_SIZE"]) > 1:
        _announce_compilation()
    else:  # nothing to exchange: without the operation, nothing is compiled
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
    with logs.prints_to_log("DeepSpeed"):
        deepspeed.init_distributed(
            auto_mpi_discovery=False, verbose=False, timeout=_patience(timeout_s),
            init_method=f"{rendezvous.SCHEME}://",
        )  # fmt: skip
    if accelerator.device_name() == "cpu":
        collectives.barrier()  # all ranks of this node have opened each other's buffers
        _unlink_shared_buffer()
    return torch.device(accelerator.current_device_name())


def _set_up_compiling() -> None:
    """Give the operations that DeepSpeed compiles a folder for each environment.

    The folder is kept between runs, and clones that share an environment share it. In torch's own
    default folder two environments would overwrite each other's operations. Ranks that start at
    once compile only once: torch (2.14) locks the folder of an operation.
    """
    # DeepSpeed takes the ninja of PATH, which a virtual environment that is not activated leaves
    # out. Two versions of ninja would compile everything again in turns.
    tools = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([tools, *filter(None, [os.environ.get("PATH")])])
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    name = f"torch_{torch.__version__}_deepspeed_{deepspeed.__version__}_{environment}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "blip_scale" / "compiled" / name
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))  # blocks


def _announce_compilation() -> None:
    """Say that DeepSpeed is about to compile its exchange between CPU ranks, unless it is there."""
    library = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / _SHARED_MEMORY / f"{_SHARED_MEMORY}.so"
    if not library.is_file():
        logger.info(
            "building DeepSpeed's shared-memory operation, once per environment, about a minute"
        )


def _unlink_shared_buffer() -> None:
    """Take away the name of the 64 MB in shared memory that DeepSpeed (0.19.8) makes for every
    rank on a CPU and never removes: without a name it is freed with its process, killed or not."""
    place = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"
    buffer = Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_{place}"
    buffer.unlink(missing_ok=True)


def _patience(timeout_s: float) -> timedelta:
    """Time that an exchange may take: longer than the heartbeat's, whose timer writes the stacks
    of a rank that waits, and ends it."""
    return timedelta(seconds=timeout_s + _AFTER_STACKS_S) if timeout_s else timedelta(days=365)


def initialize(
    build: Callable[[], nn.Module], recipe: Recipe, ds_config: dict[str, Any]
) -> ZeroEngine:
    """Build the network under the ZeRO stage of `ds_config` and wrap it.

    Args:
        build: makes the network; under ZeRO-3 it runs inside `zero.Init`, so that no rank ever
            holds it whole.
        recipe: gives optimizer and precision.
        ds_config: DeepSpeed's settings with every "auto" resolved.
    """
    stage = ds_config["zero_optimization"]["stage"]
    with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=stage == 3):
        network = build()
    if stage != 3:
        network.to(torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    stays_whole, reason = False, f"ZeRO-{stage} keeps them whole"
    if stage == 3:
        stays_whole, reason = whole_weights.decide(network, recipe, ds_config)
    obstacle = None if stays_whole or stage != 3 else f"weights are {reason}"
    is_compiled = _is_to_be_compiled(recipe, obstacle)
    if stays_whole:
        ds_config = whole_weights.deepspeed_settings(ds_config)
    ds_config.setdefault("timers", {"throughput": {"enabled": False}})  # it waits for the GPU
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = _build_optimizer(list(trainable.values()), recipe, ds_config)
    with _exchanging_on_one_thread():
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=ds_config)
    if is_compiled:
        compile_blocks(network)
    else:
        onednn.take_where_faster(network)
    torch.distributed.set_timeout(  # of DeepSpeed's own group, which has torch's 10 or 30 minutes
        _patience(recipe.train.stall_timeout_s), engine.data_parallel_group
    )
    slices = [
        piece for name, p in trainable.items() for piece in trainable_slice(engine, stage, name, p)
    ]
    towers: dict[str, list[int]] = {"vision": [], "text": []}
    for index, piece in enumerate(slices):
        towers["vision" if "vision" in piece.name else "text"].append(index)
    return ZeroEngine(engine, optimizer, stage, trainable, slices, towers, stays_whole, reason)


def _is_to_be_compiled(recipe: Recipe, partitioned: str | None) -> bool:
    """Follow `model.compile`, and log what is taken and why.

    Args:
        recipe: gives the setting and the task.
        partitioned: why weights do not stay whole between the passes; None where they do.

    Raises:
        ValueError: blocks are to be compiled, and weights are partitioned.
    """
    setting, obstacle = recipe.model.compile, None
    device = deepspeed.accelerator.get_accelerator().device_name()
    if setting is True and partitioned:
        raise ValueError(
            f"model.compile: {partitioned}; they are gathered from Python inside of the blocks, "
            "which torch.compile can't trace. Set it to false, or train.whole_weights to true"
        )
    if setting is False:
        obstacle = "model.compile is false"
    elif setting == "auto":
        if device != "cuda":
            obstacle = f"model.compile: auto compiles for CUDA devices, not for {device}"
        elif recipe.task not in ("pretrain", "retrieval"):
            obstacle = f"the shapes of {recipe.task} change with every batch"
        else:
            obstacle = partitioned
    if obstacle:
        is_expected = setting is False or device == "cpu"
        level = logging.DEBUG if is_expected else logging.INFO
        logger.log(level, "blocks run uncompiled: %s", obstacle)
        return False
    logger.info("blocks are compiled in the first steps; the results are kept for later starts")
    return True


@contextlib.contextmanager
def _exchanging_on_one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread; gloo's threads that exchange here do so for good.

    They take torch's number of threads when they first compute. With helpers of their own libgomp
    would count more threads than cores and have all of them sleep, instead of spin, between two
    operations of a step: a sixth of its time on two cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _build_optimizer(
    parameters: list[nn.Parameter], recipe: Recipe, ds_config: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW over all parameters in one group, decay on all of them: as published."""
    settings = recipe.optimizer
    arguments: dict[str, Any] = {
        "lr": settings.peak_lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload == "none":
        return AdamW(parameters, fused=True, **arguments)

    class OffloadedAdamW(deepspeed.ops.adam.DeepSpeedCPUAdam):
        skip = False

        def step(self, closure: None = None) -> None:
            if not self.skip:
                super().step(closure)

    return OffloadedAdamW(parameters, adamw_mode=True, **arguments)
