"""What DeepSpeed's ZeRO-3 step (0.19.8) does twice or for nothing, left out.

In the optimizer step it took more time than AdamW itself, on a CPU as on a GPU, where all of it is
memory traffic: a second pass over the gradients for their norm, in fp64; a copy of all gradients
into a new tensor, although they already lie in one; a multiplication of all of them by 1. In
forward and backward: some hundred lines of Python around every call of every module, also of those
that have nothing to gather; on several ranks, an exchange for each of the small weights that
all ranks keep whole; and, on a single rank, gradients that are copied, divided by 1 and cast on
their way to where they are summed, and weights that are let go and taken back one by one. In fp32:
a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from torch import Tensor, nn

from blip_scale.engine import collectives


def trim(zero: Any, norm: Callable[[], Tensor]) -> None:
    """Replace four methods of a ZeRO-3 optimizer by shorter ways to the same result.

    With an optimizer on the host (offload) they are left alone: it takes other ways there.

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
        norm: gives the L2 norm of the averaged gradient over all ranks, scalar; called in a step.
    """
    if zero.offload_optimizer:
        return
    theirs, unscale_and_clip = zero._prepare_fp32_grad_for_sub_group, zero.unscale_and_clip_grads

    def prepare(sub_group: int) -> None:
        master = zero.fp32_partitioned_groups_flat[sub_group]
        whole = joined(zero.averaged_gradients[sub_group])
        if whole is None or whole.dtype != master.dtype or whole.numel() != master.numel():
            theirs(sub_group)
            return
        master.grad = whole
        zero.averaged_gradients[sub_group] = None

    def unscale(sub_group: int, total_norm: Tensor) -> None:
        if zero.clip_grad > 0 or zero.loss_scale != 1:
            unscale_and_clip(sub_group, total_norm)

    zero._prepare_fp32_grad_for_sub_group = prepare
    zero.unscale_and_clip_grads = unscale
    zero._get_norm_groups = lambda: [norm()]
    # A weight's part is a view of its group from the start: it need not be made one in every step.
    zero._unflatten_partitioned_parameters = lambda sub_group: None


def share_masters(zero: Any) -> None:
    """In fp32 let the weights that compute be the optimizer's masters, in one memory, as DeepSpeed
    means to: it compares a device with the name of one, which are never equal.

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


def keep_gradients(zero: Any) -> None:
    """On a single rank, which has nobody to reduce with: a gradient goes to the sum of its
    micro-batches in one pass, without a bucket on the way. With an optimizer on the host (offload)
    DeepSpeed's way stays.

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
    """
    if zero.offload_optimizer:
        return

    def keep(parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        sums: dict[int, Tensor] = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        total = sums[parameter.ds_id][: gradient.numel()].view_as(gradient)
        if zero.micro_step_id == 0:
            total.copy_(gradient)
        else:
            total.add_(gradient)
        parameter.grad = None

    zero.reduce_independent_p_g_buckets_and_remove_grads = keep


def keep_weights(zero: Any) -> None:
    """Where all weights stay whole on a single rank, whose part of a weight is all of it: the step
    writes what the next forward pass reads, and so leaves them where they are. DeepSpeed parts each
    of them before the step and gathers it after. With an optimizer on the host (offload) its way
    stays.

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
    """
    if zero.offload_optimizer:
        return
    network: nn.Module = zero.parameter_offload.module
    parameters = list(iter_params(network, recurse=True))
    if all(p.ds_persist and p.ds_tensor.device == p.device for p in parameters):
        zero._partition_all_parameters = lambda: None


def drop_idle_hooks(zero: Any) -> None:
    """Take DeepSpeed's hooks off the modules that have nothing to gather or release: no parameters
    of their own, or only such as stay gathered. The latter are looked after at the root instead,
    before a forward pass that finds them parted (the step parts them).

    Args:
        zero: `DeepSpeedZeroOptimizer_Stage3`.
    """
    offload = zero.parameter_offload
    network: nn.Module = offload.module
    idle = [
        module
        for module in network.modules()
        if module is not network and all(p.ds_persist for p in iter_params(module))
    ]
    theirs = {id(d) for m in idle for d in (m._forward_pre_hooks, m._forward_hooks)}
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        if id(hook.hooks_dict_ref()) in theirs:
            hook.remove()
    staying = zero.persistent_parameters
    zero.persistent_parameters = []  # else they are gathered after each step, one by one

    def gather(module: nn.Module, inputs: Any) -> None:
        parted = [p for p in staying if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if parted:
            gather_together(parted)

    network.register_forward_pre_hook(gather, prepend=True)


def gather_together(parameters: Sequence[nn.Parameter]) -> None:
    """Make parameters whole that lie in parts on all ranks, in one exchange; DeepSpeed takes one
    for each. Parts that are quantized, on another device or in groups of ranks go its way."""
    ranks = collectives.world_size()
    own = [p.ds_tensor for p in parameters]
    plain = all(
        part.dtype == p.dtype == own[0].dtype
        and part.device == p.device
        and part.numel() == -(-p.ds_numel // ranks)
        for part, p in zip(own, parameters, strict=True)
    )
    if ranks == 1 or not plain:
        parameters[0].all_gather(parameters)
        return
    everyone = collectives.all_gather(torch.cat([part.data for part in own])[None])
    pieces = everyone.split([part.numel() for part in own], dim=1)
    for parameter, piece in zip(parameters, pieces, strict=True):
        whole = piece.contiguous().view(-1)
        parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE


def joined(pieces: Sequence[Tensor]) -> Tensor | None:
    """The flat tensors as one, a view, where they lie end to end in one storage; else None."""
    first, end = pieces[0], pieces[0].storage_offset()
    for piece in pieces:
        same = piece.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        flat = piece.dim() == 1 and piece.is_contiguous() and piece.dtype == first.dtype
        if not same or not flat or piece.storage_offset() != end:
            return None
        end += piece.numel()
    return torch.as_strided(first, (end - first.storage_offset(),), (1,), first.storage_offset())
