"""Attention kernels for packed sequences, and the choice between them.

Three kernels take packed sequences. All of them need a CUDA device of compute capability 8.0 (A100)
or newer:

- `torch_flash`: FlashAttention-2 inside the torch wheel, with dropout and autograd. The operation
  `aten::_flash_attention_forward` is private, so its schema is checked before use. Tested with
  torch 2.14.1; tests/model/test_kernels.py guards it.
- `flash_attn_4`: the package flash-attn-4, a pure wheel without dropout.
- `flash_attn_2`: the package flash-attn, built from source against a CUDA toolkit.

Otherwise, `torch.nn.functional.scaled_dot_product_attention` (`sdpa`) runs on padded sequences.

Shapes: T packed tokens, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["auto", "flash", "sdpa"]
"""Values of the setting `model.attention`."""
Backend = Literal["torch_flash", "flash_attn_4", "flash_attn_2", "sdpa"]

_NAMES: dict[Backend, str] = {
    "torch_flash": "torch's FlashAttention",
    "flash_attn_4": "flash-attn-4",
    "flash_attn_2": "flash-attn",
    "sdpa": "SDPA",
}
_FORWARD_ARGUMENTS = (
    ("query", "Tensor"),
    ("key", "Tensor"),
    ("value", "Tensor"),
    ("cum_seq_q", "Optional[Tensor]"),
    ("cum_seq_k", "Optional[Tensor]"),
    ("max_q", "int"),
    ("max_k", "int"),
    ("dropout_p", "float"),
    ("is_causal", "bool"),
    ("return_debug_mask", "bool"),
)
"""Names and types of the arguments that are passed to `aten::_flash_attention_forward`."""


@dataclass(frozen=True)
class KernelChoice:
    """Attention kernels of a run."""

    training: Backend
    """Kernel with dropout on the probabilities."""
    evaluation: Backend
    """Kernel without dropout."""
    reason: str
    """Why no packed kernel is used; empty if one is used."""

    @property
    def takes_packed(self) -> bool:
        """Whether the kernels take packed sequences, which need only a bound of their length."""
        return self.training != "sdpa"

    def backend(self, dropout_p: float) -> Backend:
        """Return the kernel for this dropout probability."""
        return self.training if dropout_p > 0 else self.evaluation

    def __str__(self) -> str:
        if not self.takes_packed:
            return f"SDPA ({self.reason})" if self.reason else "SDPA"
        if self.training == self.evaluation:
            return _NAMES[self.training]
        return f"{_NAMES[self.training]}, {_NAMES[self.evaluation]} without dropout"


@lru_cache(maxsize=64)
def choose_kernel(
    choice: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int = 64
) -> KernelChoice:
    """Select the kernels for tensors of this device, dtype and head size.

    Raises:
        ValueError: `choice` is unknown, or it is flash and no packed kernel can run here.
    """
    if choice not in ("auto", "flash", "sdpa"):
        raise ValueError(f"model.attention: {choice!r} is unknown; expected auto, flash or sdpa")
    if choice == "sdpa":
        return KernelChoice("sdpa", "sdpa", "")
    reason = _unfit(device, dtype, head_dim)
    if reason is None:
        with_dropout = _first_present(("torch_flash", "flash_attn_2"))
        if with_dropout is not None:
            is_hopper = torch.cuda.get_device_capability(device)[0] >= 9
            without = _first_present(("flash_attn_4",)) if is_hopper else None
            return KernelChoice(with_dropout, without or with_dropout, "")
        reason = "; ".join(f"{_NAMES[name]}: {_missing(name)}" for name in _PACKED)
    if choice == "flash":
        raise ValueError(f"model.attention: flash cannot run: {reason}; set it to auto or sdpa")
    return KernelChoice("sdpa", "sdpa", reason)


@torch.compiler.assume_constant_result
def chosen_backend(
    choice: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, has_dropout: bool
) -> Backend:
    """Return the kernel of `choose_kernel` as a constant, because torch.compile can't trace it."""
    kernels = choose_kernel(choice, device, dtype, head_dim)
    return kernels.training if has_dropout else kernels.evaluation


def _unfit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Explain why no packed kernel takes such tensors; None if one might."""
    if device.type != "cuda":
        return f"FlashAttention runs on CUDA devices, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"FlashAttention takes heads of 8, 16, ... 256 channels, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 8:
        have = ".".join(map(str, capability))
        return f"FlashAttention needs compute capability 8.0 (A100) or newer, this GPU has {have}"
    return None


def _first_present(names: tuple[Backend, ...]) -> Backend | None:
    return next((name for name in names if _missing(name) is None), None)


def _missing(name: Backend) -> str | None:
    """Import a kernel, and explain why it cannot be called; None if it can."""
    try:
        _PACKED[name]()
    except (ImportError, AttributeError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None


@lru_cache(maxsize=1)
def _torch_flash() -> Callable[..., Any]:
    """Return FlashAttention of the torch wheel.

    Raises:
        AttributeError: this torch lacks the operation, or the operation has another schema.
    """
    operation = torch.ops.aten._flash_attention_forward.default
    schema = operation._schema
    arguments = [(a.name, str(a.type)) for a in schema.arguments if not a.kwarg_only]
    returns = [str(value.type) for value in schema.returns]
    if tuple(arguments) != _FORWARD_ARGUMENTS or returns != ["Tensor"] * 5:
        raise AttributeError(f"torch {torch.__version__} has another schema: {schema}")
    if torch.version.cuda is None:
        raise AttributeError(f"torch {torch.__version__} is built without CUDA")
    return operation


@lru_cache(maxsize=1)
def _flash_attn_4() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


@lru_cache(maxsize=1)
def _flash_attn_2() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


_PACKED: dict[Backend, Callable[[], Callable[..., Any]]] = {
    "torch_flash": _torch_flash,
    "flash_attn_4": _flash_attn_4,
    "flash_attn_2": _flash_attn_2,
}
"""Packed kernel -> function that imports it."""


class PackedLengths(NamedTuple):
    """Boundaries of the query and key sequences in packed tensors."""

    query_offsets: Tensor
    """Start of each query sequence, followed by the end of the last, [S+1] int32."""
    key_offsets: Tensor
    """Start of each key sequence, followed by the end of the last, [S+1] int32."""
    max_query: int
    """Upper bound of the length of the query sequences."""
    max_key: int
    """Upper bound of the length of the key sequences."""


def packed_attention(
    backend: Backend,
    q_THC: Tensor,
    k_THC: Tensor,
    v_THC: Tensor,
    lengths: PackedLengths,
    dropout_p: float,
    causal: bool,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(C)) v within each packed sequence, on a CUDA device.

    Args:
        backend: one of the packed kernels.
        q_THC: [T of the queries, H, C] in bf16 or fp16, sequences in order.
        k_THC: [T of the keys, H, C], like q_THC.
        v_THC: [T of the keys, H, C], like q_THC.
        lengths: boundaries of the sequences. Query sequence s attends to key sequence s.
        dropout_p: probability of dropping a weight; 0 for flash_attn_4.
        causal: whether each token attends only to itself and the tokens before it.

    Returns:
        [T of the queries, H, C].
    """
    if backend == "torch_flash":  # do not call _torch_flash: torch.compile can't trace it
        operation = torch.ops.aten._flash_attention_forward.default
        out: Tensor = operation(q_THC, k_THC, v_THC, *lengths, dropout_p, causal, False)[0]
        return out
    function = _PACKED[backend]()
    settings: dict[str, Any] = {"causal": causal}
    if backend == "flash_attn_2":
        settings["dropout_p"] = dropout_p
    result = function(
        q_THC,
        k_THC,
        v_THC,
        cu_seqlens_q=lengths.query_offsets,
        cu_seqlens_k=lengths.key_offsets,
        max_seqlen_q=lengths.max_query,
        max_seqlen_k=lengths.max_key,
        **settings,
    )
    return result if isinstance(result, Tensor) else result[0]
