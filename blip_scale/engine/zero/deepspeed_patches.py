"""Monkey patches for DeepSpeed 0.19.8 that skip redundant work in the ZeRO-3 step.

Each patch replaces a private name. `REPLACED` lists the names and the cost of DeepSpeed's code. Run
tests/engine/test_zero3_step.py before upgrading DeepSpeed. With a version that is not in
`CHECKED_VERSIONS` no patch is applied: DeepSpeed's code runs with partitioned weights, and the log
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from torch import Tensor, nn

from blip_scale.engine import collectives

CHECKED_VERSIONS = ("0.19.8",)
"""Versions of DeepSpeed for which every entry of `REPLACED` was read and tested."""

_ZERO3 = "DeepSpeedZeroOptimizer_Stage3"
REPLACED = {
    f"{_ZERO3}._get_norm_groups": "a second pass over all gradients, in fp64, for their norm",
    f"{_ZERO3}._prepare_fp32_grad_for_sub_group": "a copy of gradients that already lie in one "
    "tensor",
    f"{_ZERO3}.unscale_and_clip_grads": "a multiplication of all gradients by 1 without clipping",
    f"{_ZERO3}._unflatten_partitioned_parameters": "views of all parameters, the same in every "
    "step",
    f"{_ZERO3}._reassign_or_swap_out_partitioned_parameters": "in fp32, a second copy of the "
    "weights: DeepSpeed compares a device with a device's name, and the two are never equal",
    f"{_ZERO3}.persistent_parameters": "one gather after the step for each small weight",
    f"{_ZERO3}._partition_all_parameters": "a walk over all modules to release whole weights",
    f"{_ZERO3}._grad_acc_hooks": "a hook, a copy and a view for each gradient of whole weights",
    f"{_ZERO3}.reduce_and_partition_stream": "a wait of the host for the exchanges of the backward "
    "pass; the patch makes the GPU's stream wait instead",
    "DeepSpeedZeRoOffload.forward_hooks": "some hundred lines of Python around every module call, "
    "even if nothing is gathered",
    "DeepSpeedZeRoOffload.backward_hooks": "see forward_hooks",
    "DeepSpeedZeRoOffload.fwd_pre_hook": "see forward_hooks",
    "DeepSpeedEngine.module_forward_pre_hook": "a walk over all modules before a forward pass",
    "DeepSpeedEngine.module_forward_post_hook": "a walk over all modules after a forward pass",
    "ZeROOrderedDict": "Python code at every access to a parameter",
    "InsertPostInitMethodToModuleSubClasses.linear_bk": "a linear layer in Python that saves no "
    "gathered weight",
    "stage3.is_invalid_grad_norm": "a read of the norm, for which the host waits; the train loop "
    "skips steps that are not finite itself",
    "parameter_offload.FWD_MODULE_STACK": "a leak: recomputing a checkpointed block leaves entries",
}
"""Private name -> redundant work of DeepSpeed's code."""


def are_checked() -> bool:
    """Whether the patches were checked for the installed DeepSpeed."""
    return deepspeed.__version__ in CHECKED_VERSIONS


def unchecked_reason() -> str:
    """Return a log message that says why the patches are not applied."""
    return (
        f"the patches of the ZeRO-3 step were checked for DeepSpeed {', '.join(CHECKED_VERSIONS)}, "
        f"not for {deepspeed.__version__}, so they are not applied"
    )


def trim(zero: Any, norm: Callable[[], Tensor]) -> None:
    """Replace methods of a ZeRO-3 optimizer's step with faster ones that give equal results.

    An offloaded optimizer is left unchanged, because its step uses other methods.

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
        norm: returns the L2 norm of the averaged gradient over all ranks, a scalar. It is called
            during a step.
    """
    if zero.offload_optimizer:
        return
    copy_gradients, unscale_and_clip = (
        zero._prepare_fp32_grad_for_sub_group, zero.unscale_and_clip_grads,
    )  # fmt: skip

    def prepare(sub_group: int) -> None:
        # Contiguous gradients become the gradient of the fp32 master without a copy.
        master = zero.fp32_partitioned_groups_flat[sub_group]
        whole = joined(zero.averaged_gradients[sub_group])
        if whole is None or whole.dtype != master.dtype or whole.numel() != master.numel():
            copy_gradients(sub_group)
            return
        master.grad = whole
        zero.averaged_gradients[sub_group] = None

    def unscale(sub_group: int, total_norm: Tensor) -> None:
        if zero.clip_grad > 0 or zero.loss_scale != 1:
            unscale_and_clip(sub_group, total_norm)

    zero._prepare_fp32_grad_for_sub_group = prepare
    zero.unscale_and_clip_grads = unscale
    zero._get_norm_groups = lambda: [norm()]
    # This rank's part of a weight is a view of its group from the start.
    zero._unflatten_partitioned_parameters = lambda sub_group: None


def share_masters(zero: Any) -> None:
    """In fp32, make the compute weights and the optimizer's masters share memory.

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
    """
    pairs = [
        *zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
    ]
    if zero.offload_optimizer or any(flat.dtype != master.dtype for flat, master in pairs):
        return
    for flat, master in pairs:
        master.data = flat.data
    zero._reassign_or_swap_out_partitioned_parameters = lambda sub_group: None


def skip_waits(zero: Any) -> None:
    """Remove the points in the backward pass and the step at which the host waits for a GPU.

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
    """
    vars(stage3)["is_invalid_grad_norm"] = lambda norm: False
    stream = zero.reduce_and_partition_stream
    if isinstance(stream, torch.cuda.Stream):
        replaced: Any = stream
        replaced.synchronize = lambda: torch.cuda.current_stream().wait_stream(stream)


def drop_all_hooks(engine: Any) -> None:
    """Make the network of a DeepSpeed engine a plain module again, for weights that stay whole.

    Calling the network then runs no DeepSpeed code, and gradients stay in `Parameter.grad`.

    Args:
        engine: `DeepSpeedEngine` under ZeRO-3.
    """
    zero, network = engine.optimizer, engine.module
    zero.parameter_offload.destroy()
    for hook in (
        *zero._grad_acc_hooks, engine.module_forward_pre_hook, engine.module_forward_post_hook,
    ):  # fmt: skip
        hook.remove()
    for module in network.modules():
        module._parameters = dict(module._parameters)
    linear = getattr(partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if linear is not None:
        nn.functional.linear = linear
    zero.persistent_parameters = []
    zero._partition_all_parameters = lambda: None


def trim_module_stack() -> None:
    """Remove the entries that recomputed blocks leak in every step. Call this between steps."""
    del parameter_offload.FWD_MODULE_STACK[1:]


def drop_idle_hooks(zero: Any) -> None:
    """Remove DeepSpeed's hooks from modules that have nothing to gather or release.

    These modules have no parameters, or only persistent ones. The optimizer step partitions
    persistent parameters. Before the next forward, one all-gather at the root gathers them again.

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
    """
    offload = zero.parameter_offload
    network: nn.Module = offload.module
    idle_hooks: set[int] = set()
    for module in network.modules():
        if module is network:  # the root keeps its hooks
            continue
        if all(parameter.ds_persist for parameter in iter_params(module)):
            idle_hooks |= {id(module._forward_pre_hooks), id(module._forward_hooks)}
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        if id(hook.hooks_dict_ref()) in idle_hooks:
            hook.remove()
    staying = zero.persistent_parameters
    zero.persistent_parameters = []  # DeepSpeed would gather them one by one after each step

    def gather(module: nn.Module, inputs: Any) -> None:
        partitioned = [p for p in staying if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if partitioned:
            gather_together(partitioned)

    network.register_forward_pre_hook(gather, prepend=True)


def gather_together(parameters: Sequence[nn.Parameter]) -> None:
    """Gather partitioned parameters in one all-gather. DeepSpeed uses one for each parameter.

    If parts are quantized, on another device or split over groups of ranks, DeepSpeed gathers them.
    """
    ranks = collectives.world_size()
    parts = [p.ds_tensor for p in parameters]

    def is_plain(parameter: Any) -> bool:
        part = parameter.ds_tensor
        return (
            part.dtype == parameter.dtype == parts[0].dtype
            and part.device == parameter.device
            and part.numel() == -(-parameter.ds_numel // ranks)
        )

    if ranks == 1 or not all(map(is_plain, parameters)):
        parameters[0].all_gather(parameters)
        return
    everyone = collectives.all_gather(torch.cat([part.data for part in parts])[None])
    pieces = everyone.split([part.numel() for part in parts], dim=1)
    for parameter, piece in zip(parameters, pieces, strict=True):
        whole = piece.contiguous().view(-1)
        parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE


def joined(pieces: Sequence[Tensor]) -> Tensor | None:
    """Return one view of flat tensors that are contiguous in one storage; None if they aren't."""
    first, end = pieces[0], pieces[0].storage_offset()
    for piece in pieces:
        same = piece.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        flat = piece.dim() == 1 and piece.is_contiguous() and piece.dtype == first.dtype
        if not same or not flat or piece.storage_offset() != end:
            return None
        end += piece.numel()
    return torch.as_strided(first, (end - first.storage_offset(),), (1,), first.storage_offset())
