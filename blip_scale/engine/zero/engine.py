"""The ZeRO engine: a network under DeepSpeed's ZeRO, and the parameter slices that this rank owns.

Under ZeRO-3 each rank owns an equal slice of each flattened parameter. Under ZeRO-1/2 it owns a
contiguous stretch of all parameters laid end to end. The rest of the engine sees a list of
`ParameterSlice`s in both cases. Frozen parameters are cut as under ZeRO-3 at every stage.

The optimizer updates fp32 master weights. The compute weights are the parameters of the network.
Under ZeRO-3 they stay whole on every rank if they fit (`whole_weights`), and are partitioned
otherwise.
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
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from blip_scale import launcher, logs
from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives, rendezvous
from blip_scale.engine.watching.hang_limits import HangLimits
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
from blip_scale.model.towers import refill_constants

logger = logging.getLogger(__name__)

_AFTER_STACKS_S = 10.0
_FOREVER_S = 365 * 86_400.0


class AdamW(torch.optim.AdamW):
    """AdamW whose `step` does nothing while `skip` is True: weights and moments stay unchanged."""

    skip = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights and moments, unless `skip` is True."""
        if not self.skip:
            super().step(closure)


@dataclass
class ZeroEngine:
    """DeepSpeed's engine with the parameter slices of this rank.

    A micro-step calls `forward` and `backward`. If `capture_obstacle` is None, `forward` and
    `compute_gradients` can be captured in a CUDA graph instead. Call `gather_weights` before each
    replay and `add_gradients` after it.
    """

    deepspeed: Any
    optimizer: torch.optim.Optimizer
    stage: int
    trainable: dict[str, nn.Parameter]
    slices: list[ParameterSlice]
    """Slices of trainable parameters and, after `fill`, of frozen ones."""
    towers: dict[str, list[int]]
    """Indices into `slices` by tower (`vision`, `text`), for gradient norms."""
    weights_stay_whole: bool
    """Whether every rank always keeps all compute weights under ZeRO-3."""
    weights_reason: str
    """Whether the weights are whole or partitioned, and why, for the log."""
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameters that the optimizer does not update; `fill` sets their weights."""
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
            # `step` is called only after the last micro-step, so every call is a boundary.
            self.deepspeed.set_gradient_accumulation_boundary(True)
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
        """The wrapped network."""
        return self.deepspeed.module

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return torch.device(self.deepspeed.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the compute weights."""
        return next(self.module.parameters()).dtype

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters of the whole network."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.trainable.values())

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Names of the entries of `squared_norms`."""
        return ("all", *self.towers)

    @property
    def capture_obstacle(self) -> str | None:
        """Why forward and backward can't be captured in a CUDA graph; None if they can."""
        if self.weights_stay_whole:
            return None
        if self.stage != 3:
            return f"ZeRO-{self.stage} reduces gradients from Python hooks in the backward pass"
        return f"weights are {self.weights_reason}: they are gathered from Python inside the blocks"

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the network. Tasks call this instead of the network itself."""
        if self.weights_stay_whole:
            self.gather_weights()
            return self.module(*arguments, **named)
        return self.deepspeed(*arguments, **named)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of loss / accumulation to this rank's part of the averaged gradient.

        Args:
            loss: loss of a micro-batch, 0-dimensional.
            is_last: whether it is the last micro-step before `step`.
        """
        if self.weights_stay_whole:
            self._buckets.backward(loss, is_last)
            return
        self.deepspeed.backward(loss)
        if not is_last:
            self.deepspeed.step()

    def compute_gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients of loss / accumulation, one for each trainable parameter.

        Requires whole weights. It has no other effect, so a CUDA graph can capture it.
        """
        return self._buckets.compute(loss)

    def add_gradients(self, gradients: list[Tensor], is_last: bool) -> None:
        """Add the gradients that `compute_gradients` or its replay computed, like `backward`.

        Requires whole weights.
        """
        self._buckets.add(gradients, is_last)

    def gather_weights(self) -> None:
        """Gather whole compute weights that have changed since the last gather.

        It takes one all-gather for trainable weights and one for momentum copies. `forward` calls
        this method. Call it on all ranks.
        """
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
        """Move parameters into one flat tensor, which one all-gather refreshes.

        Requires whole weights. `parts` is documented in `FlatWeights`.
        """
        flat = FlatWeights(parameters, parts)
        self._flats.append(flat)
        self._flat_of |= {id(p): flat for p in parameters}
        return flat

    def step(self, learning_rate: float, apply: bool, norm: Tensor) -> None:
        """Run the optimizer step after the last micro-step. The host does not wait.

        Args:
            learning_rate: learning rate of this step.
            apply: if False, drop the gradients and keep weights and moments.
            norm: L2 norm of the averaged gradient over all ranks, for clipping: a scalar on the
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
        """Return the squared norms of this rank's averaged gradients, in the order of `norm_names`.

        The result is fp64 [1 + towers] on the device, before clipping. Its sum over all ranks is
        the squared L2 norm of the whole gradients. Call this after the last backward. The host does
        not wait.
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
        """This rank's averaged gradients: a list for each tower."""
        pieces = []
        for indices in self.towers.values():
            slices = [self.slices[index] for index in indices]
            pieces.append(gradients_of(slices, self.deepspeed))
        if self.weights_stay_whole:  # gradients stay in the same memory
            self._gradient_pieces = pieces
        return pieces

    def _norm_for_clipping(self) -> Tensor:
        assert self._norm is not None, "DeepSpeed asks for the norm inside `step` alone"
        return self._norm.float()

    def assign(self, parameters: list[nn.Parameter], parts: list[SliceValues]) -> None:
        """Write compute weights from this rank's parts of some parameters.

        Every rank must call this with the same parameters and with the parts that it owns. ZeRO-3
        needs no communication here: the next forward gathers the weights. Under ZeRO-1/2 every rank
        holds whole parameters, so one all-reduce combines the parts of all ranks.
        """
        if not parameters:
            return
        if self.stage == 3:
            targets, values = [], []
            for part in parts:
                target = parameters[part.index].ds_tensor.data[: part.values.numel()]
                if target.data_ptr() != part.values.data_ptr():  # fp32: may share memory
                    targets.append(target)
                    values.append(part.values)
            if targets:
                torch._foreach_copy_(targets, values)
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
        collectives.all_reduce_sum(flat)  # exact: all ranks but the owner add 0
        wholes = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        torch._foreach_copy_([p.data for p in parameters], wholes)

    def _mark_stale(self, parameters: list[nn.Parameter]) -> None:
        """Make the next forward gather these parameters."""
        if self.weights_stay_whole:
            for parameter in parameters:
                if id(parameter) in self._flat_of:
                    self._flat_of[id(parameter)].is_stale = True
            return
        stale = [p for p in parameters if _holds_a_copy(p)]
        if stale:
            stale[0].partition(stale)

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Set this rank's fp32 masters and the compute weights from whole tensors by name.

        Parameters of `weights` that are not trained are added to `frozen`.
        """
        for name, parameter in self.module.named_parameters():
            if name in weights and not parameter.requires_grad and name not in self.frozen:
                self.frozen[name] = parameter
                self.slices += frozen_slice(name, parameter)
        for piece in self.slices:
            values = weights[piece.name].detach().flatten()
            piece.weight.copy_(values[piece.start : piece.start + piece.numel])
        self.refresh()

    def refresh(self, names: list[str] | None = None) -> None:
        """Copy the fp32 masters to the compute weights: all of them, or those with these names."""
        parameters = self.trainable | self.frozen
        wanted = [name for name in parameters if names is None or name in names]
        positions = {name: index for index, name in enumerate(wanted)}
        parts = []
        for piece in self.slices:
            if piece.name in positions:
                parts.append(SliceValues(positions[piece.name], piece.start, piece.weight))
        self.assign([parameters[name] for name in wanted], parts)

    def gather_into(self, source: nn.Module, target: nn.Module) -> None:
        """Copy the compute weights of `source`, a part of the wrapped module, to a plain module.

        Call it on all ranks. Every rank receives all weights. Partitioned parameters are gathered
        one at a time, so the peak memory exceeds `target` by one parameter.

        Raises:
            ValueError: the parameter names of the two modules differ.
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
    """Context manager in which a parameter holds all its elements on every rank (read only)."""
    if not is_partitioned:
        yield
        return
    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def _holds_a_copy(parameter: nn.Parameter) -> bool:
    """Whether the whole parameter has its own memory.

    On a single rank it is a view of the rank's part. Gathering it again would be useless and make
    the host wait for the GPU.
    """
    whole = parameter.ds_status.name == "AVAILABLE"
    return whole and parameter.data_ptr() != parameter.ds_tensor.data_ptr()


def start(timeout_s: float) -> torch.device:
    """Join the process group and return this rank's device.

    Without a launcher the group has a single rank.

    Args:
        timeout_s: the longest hang limit in seconds; infinity for no limit.
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
    # DeepSpeed 0.19.8 reads this table to decide whether to compile a shared-memory all-reduce for
    # CPUs. Training never calls that operation, and compiling it takes a minute.
    deepspeed.ops.__compatible_ops__ = {}
    with logs.prints_to_log("DeepSpeed"):
        deepspeed.init_distributed(
            auto_mpi_discovery=False, verbose=False, timeout=_patience(timeout_s),
            init_method=f"{rendezvous.SCHEME}://",
        )  # fmt: skip
    return torch.device(accelerator.current_device_name())


def _set_up_compiling() -> None:
    """Keep compiled operations and blocks in a folder of this Python environment.

    The folder outlives the run. Clones that share an environment share the folder. In torch's
    default folder, environments would overwrite each other's operations. Ranks that start together
    compile an operation only once, because torch (2.14) locks its folder.
    """
    # DeepSpeed finds ninja through PATH, which lacks this environment if it is not activated. With
    # two versions of ninja, each would recompile everything.
    tools = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([tools, *filter(None, [os.environ.get("PATH")])])
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    name = f"torch_{torch.__version__}_deepspeed_{deepspeed.__version__}_{environment}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "blip_scale" / "compiled" / name
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))
    blocks = folder / "inductor"
    # Importing torch 2.14 sets the variable to its default, a folder in /tmp that other users may
    # write to.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        with contextlib.suppress(OSError):  # a read-only home keeps the default
            blocks.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(blocks)


def _patience(timeout_s: float) -> timedelta:
    """Return the timeout of a collective, longer than any hang limit.

    The hang timer must expire first: it names the rank that hangs, writes the stacks of the waiting
    rank and ends it.
    """
    return timedelta(seconds=min(timeout_s + _AFTER_STACKS_S, _FOREVER_S))


def initialize(
    build: Callable[[], nn.Module], recipe: Recipe, ds_config: dict[str, Any]
) -> ZeroEngine:
    """Build the network under the ZeRO stage of `ds_config` and wrap it.

    Args:
        build: builds the network. Under ZeRO-3 it runs inside `zero.Init`, so no rank ever holds
            the whole network.
        recipe: the recipe, for optimizer, precision and model settings.
        ds_config: DeepSpeed's settings with every "auto" resolved.

    Raises:
        ValueError: `model.compile` is true, but the weights are partitioned.
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
    # DeepSpeed's throughput timer would wait for the GPU.
    ds_config.setdefault("timers", {"throughput": {"enabled": False}})
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = _build_optimizer(list(trainable.values()), recipe, ds_config)
    with _exchanging_on_one_thread():
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=ds_config)
    refill_constants(network)  # zero.Init and bf16 round them
    if is_compiled:
        compile_blocks(network)
    else:
        onednn.take_where_faster(network)
    # DeepSpeed's group has torch's default timeout of 10 or 30 minutes.
    patience = _patience(HangLimits.of(recipe).longest_s)
    torch.distributed.set_timeout(patience, engine.data_parallel_group)
    slices: list[ParameterSlice] = []
    for name, parameter in trainable.items():
        slices += trainable_slice(engine, stage, name, parameter)
    towers: dict[str, list[int]] = {"vision": [], "text": []}
    for index, piece in enumerate(slices):
        towers["vision" if "vision" in piece.name else "text"].append(index)
    return ZeroEngine(engine, optimizer, stage, trainable, slices, towers, stays_whole, reason)


def _is_to_be_compiled(recipe: Recipe, partitioned: str | None) -> bool:
    """Decide from `model.compile` whether to compile the blocks, and log the reason.

    Args:
        recipe: the recipe, for the setting and the task.
        partitioned: why the weights are partitioned; None if they stay whole.

    Raises:
        ValueError: `model.compile` is true, but the weights are partitioned.
    """
    setting, obstacle = recipe.model.compile, None
    device = deepspeed.accelerator.get_accelerator().device_name()
    if setting is True and partitioned:
        raise ValueError(
            f"model.compile: {partitioned}; they are gathered from Python inside the blocks, "
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
    """Context manager that sets torch to one thread, so that gloo's threads keep this setting.

    A gloo thread copies torch's number of threads when it first computes. With more than one, it
    would start its own OpenMP threads, and libgomp would count more threads than cores. All threads
    would then sleep instead of spin between operations. On two cores this costs a sixth of the
    step time.
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
    """Build AdamW with one group and weight decay on all parameters, as BLIP publishes it."""
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
