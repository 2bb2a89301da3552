"""Recipe and DeepSpeed JSON -> a ZeRO engine, and access to the part of every parameter that this
rank owns.

Under ZeRO-3 each rank owns an equal slice of each flattened parameter; under ZeRO-1/2 a contiguous
stretch of all of them laid end to end. Both are the same thing to the rest of the engine: a list of
`ParameterSlice`s. Frozen parameters are cut as under ZeRO-3 at every stage.
"""

from __future__ import annotations

import contextlib
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
from deepspeed.runtime.zero import parameter_offload
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from blip_scale import launcher, logs
from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives
from blip_scale.engine.zero import deepspeed_patches, onednn
from blip_scale.engine.zero.parameter_slices import (
    ParameterSlice,
    SliceValues,
    frozen_slice,
    gradient_of,
    trainable_slice,
)

logger = logging.getLogger(__name__)

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
    """DeepSpeed's engine with the parameter slices of this rank."""

    deepspeed: Any
    optimizer: torch.optim.Optimizer
    stage: int
    trainable: dict[str, nn.Parameter]
    slices: list[ParameterSlice]
    """Slices of what trains; after `fill` of what is frozen too."""
    towers: dict[str, list[int]]
    """Index into `slices` by tower (`vision`, `text`), for gradient norms."""
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameters that keep the weights of `fill`."""
    _norm: Tensor | None = None

    def __post_init__(self) -> None:
        if self.stage == 3:
            deepspeed_patches.share_masters(self.deepspeed.optimizer)
            deepspeed_patches.trim(self.deepspeed.optimizer, self._gradient_norm)
            deepspeed_patches.drop_idle_hooks(self.deepspeed.optimizer)
            if collectives.world_size() == 1:
                deepspeed_patches.keep_gradients(self.deepspeed.optimizer)
                deepspeed_patches.keep_weights(self.deepspeed.optimizer)

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
    def forward(self) -> Callable[..., Any]:
        """Call of the network in a training step."""
        return self.deepspeed

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Names of the entries of `squared_norms`."""
        return ("all", *self.towers)

    @property
    def capture_obstacle(self) -> str | None:
        """Why forward and backward cannot be captured in a CUDA graph; None where they can."""
        return "weights are gathered by hooks in the forward pass"

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of loss / accumulation to this rank's share.

        Args:
            loss: scalar.
            is_last: whether it is the last micro-step before `step`.
        """
        self.deepspeed.backward(loss)
        if not is_last:
            self.deepspeed.step()

    def step(self, learning_rate: float, apply: bool, norm: Tensor) -> None:
        """The optimizer step at a gradient-accumulation boundary.

        Args:
            learning_rate: of all parameter groups.
            apply: False drops the gradients; weights and moments stay as they are.
            norm: L2 norm of the averaged gradient over all ranks, a scalar, for clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.skip = not apply
        self._norm = norm.float()
        self.deepspeed.step()
        # Recomputing a checkpointed block leaves entries behind in DeepSpeed 0.19.8, a few more
        # each step.
        del parameter_offload.FWD_MODULE_STACK[1:]

    def squared_norms(self) -> Tensor:
        """Sums of squares of this rank's averaged gradients after the last backward.

        Returns:
            [1 + towers] fp64 on the device: all, then each tower; sums over ranks give the squares
            of the global norms.
        """
        towers = [self._squared_norm(indices) for indices in self.towers.values()]
        return torch.stack([torch.stack(towers).sum(), *towers])

    def _squared_norm(self, indices: list[int]) -> Tensor:
        """Sum of squares of this rank's gradients of some slices, fp64; in a few launches, not some
        a slice."""
        gradients = [
            gradient[: piece.numel]
            for piece in (self.slices[index] for index in indices)
            if (gradient := gradient_of(piece, self.stage)) is not None and gradient.numel()
        ]
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    def _gradient_norm(self) -> Tensor:
        """The norm for clipping that `step` was given."""
        assert self._norm is not None
        return self._norm

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
            stale = [p for p in parameters if _holds_a_copy(p)]
            if stale:
                stale[0].partition(stale)  # the next forward pass gathers them
            return
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=self.dtype, device=self.device)
        pieces = flat.split([p.numel() for p in parameters])
        for part in parts:
            pieces[part.index][part.start : part.start + part.values.numel()] = part.values
        collectives.all_reduce_sum(flat)  # every element has one owner: adding zeros is exact
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data.copy_(piece.view_as(parameter))

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

        Every rank must call it; every rank gets all weights. Parameters are gathered one at a time,
        so the peak is one parameter above the size of `target`.
        """
        for (name, parameter), (other, destination) in zip(
            source.named_parameters(), target.named_parameters(), strict=True
        ):
            if name != other:
                raise ValueError(f"gather_into: {name} of the engine faces {other} of the target")
            with whole(parameter, self.stage):
                destination.data.copy_(parameter.data)


@contextlib.contextmanager
def whole(parameter: nn.Parameter, stage: int) -> Iterator[None]:
    """Inside, the parameter holds all its elements on every rank (read only)."""
    if stage != 3:
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
            auto_mpi_discovery=False, verbose=False, timeout=_patience(timeout_s)
        )
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
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "blip_scale" / "compiled" / name))


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
    return timedelta(seconds=timeout_s) if timeout_s else timedelta(days=365)


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
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = _build_optimizer(list(trainable.values()), recipe, ds_config)
    with _exchanging_on_one_thread():
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=ds_config)
    if recipe.model.compile:
        for module in network.modules():
            if isinstance(module, Block):  # of a ViT: the shapes of texts change with every batch
                module.compile(dynamic=False)
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
    return ZeroEngine(engine, optimizer, stage, trainable, slices, towers)


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
