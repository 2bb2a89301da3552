"""Gradients of whole weights, averaged over ranks in a few flat exchanges.

A bucket holds consecutive parameters. Buckets are sent in a fixed order, last parameters first. A
bucket is sent as soon as all its gradients are computed, so communication overlaps the backward
pass. With several micro-steps, each rank sums its gradients in fp32 and exchanges them once.

Legend: W ranks, P elements of this rank's parts of all parameters, laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blip_scale.engine import collectives


def bucket_ranges(numels: Sequence[int], limit: int) -> list[range]:
    """Split the indices of parameters into buckets of consecutive ones, last parameters first.

    Args:
        numels: number of elements of each parameter.
        limit: maximum number of elements in a bucket. A larger parameter gets its own bucket.
    """
    ranges: list[range] = []
    end, elements = len(numels), 0
    for index in reversed(range(len(numels))):
        if elements and elements + numels[index] > limit:
            ranges.append(range(index + 1, end))
            end, elements = index + 1, 0
        elements += numels[index]
    return [*ranges, range(end)] if end else ranges


@dataclass
class _Bucket:
    indices: range
    """Indices of the bucket's parameters."""
    parts: slice
    """Range of the parameters' parts in [P]."""
    missing: int = 0
    """Number of gradients that the backward pass has not computed yet."""


@dataclass
class _Exchange:
    """A reduction in progress. It keeps the sent tensor alive."""

    work: Any
    sent: Tensor
    received: Tensor
    sums: Tensor

    def finish(self) -> None:
        """Wait for the reduction and store its result. On a GPU the host does not wait."""
        self.work.wait()
        if self.received is not self.sums:
            self.sums.copy_(self.received)


@dataclass
class GradientBuckets:
    """This rank's part of the averaged gradient, filled by the backward passes of a step."""

    parameters: Sequence[nn.Parameter]
    sizes: Sequence[int]
    """Number of elements of this rank's part of each parameter."""
    sums: Tensor
    """[P] fp32: after the last backward of a step, the gradient averaged over micro-steps and
    ranks."""
    limit: int
    """Maximum number of elements of a bucket."""
    accumulation: int
    """Number of micro-steps in an optimizer step."""
    exchange_dtype: torch.dtype
    """Dtype in which gradients are exchanged."""
    micro_steps: int = 0
    """Number of backward passes since the last optimizer step."""
    _pending: list[_Exchange] = field(default_factory=list)
    _sent: int = 0
    _is_last: bool = True
    _is_overlapping: bool = False

    def __post_init__(self) -> None:
        self.ranks = collectives.world_size()
        ends = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        self.buckets: list[_Bucket] = []
        for indices in bucket_ranges([p.ds_numel for p in self.parameters], self.limit):
            parts = slice(ends[indices.start], ends[indices.stop])
            self.buckets.append(_Bucket(indices, parts))
        self._local: Tensor | None = None
        if self.ranks > 1 and self.accumulation > 1:
            self._local = self.sums.new_empty(self.ranks * self.sums.numel())
        for bucket in self.buckets:
            for index in bucket.indices:
                hook = partial(self._arrived, bucket)
                self.parameters[index].register_post_accumulate_grad_hook(hook)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of loss / accumulation; exchanges overlap the backward pass.

        Args:
            loss: loss of a micro-batch, 0-dimensional.
            is_last: whether it is the last micro-step of the optimizer step.
        """
        self._begin(is_last)
        self._is_overlapping = True
        try:
            self._share(loss).backward()
        finally:
            self._is_overlapping = False
        while self._sent < len(self.buckets):  # parameters without a gradient count as zero
            self._send_next()
        self._finish()

    def compute(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients of loss / accumulation, one for each parameter.

        Each gradient is contiguous and has the dtype of its parameter. Only autograd runs: there is
        no hook, no exchange and no change of this object. A CUDA graph can therefore capture this
        method. A replay overwrites the returned tensors.
        """
        gradients = torch.autograd.grad(
            self._share(loss), list(self.parameters), allow_unused=True, materialize_grads=True
        )
        return [gradient.contiguous() for gradient in gradients]

    def add(self, gradients: Sequence[Tensor], is_last: bool) -> None:
        """Add the gradients that `compute` or its replay computed to the sums, like `backward`."""
        self._begin(is_last)
        for bucket in self.buckets:
            self._send(bucket, [gradients[index] for index in bucket.indices])
        self._finish()

    def _share(self, loss: Tensor) -> Tensor:
        return loss if self.accumulation == 1 else loss / self.accumulation

    def _begin(self, is_last: bool) -> None:
        self._is_last, self._sent = is_last, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.indices)

    def _arrived(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        """Record that a gradient was computed, and send the next buckets that are complete."""
        if not self._is_overlapping:
            return
        bucket.missing -= 1
        while self._sent < len(self.buckets) and not self.buckets[self._sent].missing:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self.buckets[self._sent]
        self._sent += 1
        parameters = [self.parameters[index] for index in bucket.indices]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        self._send(bucket, gradients)
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def _send(self, bucket: _Bucket, gradients: Sequence[Tensor]) -> None:
        """Add gradients to a bucket's sums and, in the last micro-step, start its exchange."""
        ranks, sums = self.ranks, self.sums[bucket.parts]
        # If the first dimension is divisible by W, splitting it equals splitting the flat gradient.
        rows = [g if g.dim() and len(g) % ranks == 0 else g.reshape(-1) for g in gradients]
        if ranks == 1:
            self._sum_up(rows, sums.view(1, -1))
            return
        if self._local is None:
            sent = torch._chunk_cat(rows, 0, ranks)
        else:
            begin, end = ranks * bucket.parts.start, ranks * bucket.parts.stop
            sent = self._local[begin:end].view(ranks, -1)
            self._sum_up(rows, sent)
            if not self._is_last:
                return
        sent = sent.to(self.exchange_dtype).div_(ranks)
        same = self.exchange_dtype == sums.dtype
        received = sums if same else torch.empty_like(sums, dtype=self.exchange_dtype)
        work = dist.reduce_scatter_tensor(received, sent.view(-1), async_op=True)
        self._pending.append(_Exchange(work, sent, received, sums))

    def _sum_up(self, rows: list[Tensor], total: Tensor) -> None:
        """Write the gradients of the first micro-step to `total` [W, n], and add later ones."""
        if self.micro_steps == 0:
            torch._chunk_cat(rows, 0, self.ranks, out=total)
        else:
            total.add_(torch._chunk_cat(rows, 0, self.ranks))

    def _finish(self) -> None:
        for exchange in self._pending:
            exchange.finish()
        self._pending.clear()
        self.micro_steps += 1
