"""Choice of the attention kernel, on a CPU that pretends to be a GPU.

test_attention_kernels.py compares the kernels themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip_scale.model import kernels
from blip_scale.model.attention import Segments
from blip_scale.model.kernels import PackedLengths, choose_kernel, packed_attention

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    cached = (choose_kernel, kernels._torch_flash, kernels._flash_attn_4, kernels._flash_attn_2)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that there is a GPU of some compute capability, with some packages installed."""

    def pretend(capability: tuple[int, int], *packages: str, torch_flash: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        for name in ("flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, name, None)
        for name in packages:
            module = ModuleType(name)
            module.flash_attn_varlen_func = lambda *_, **__: None  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
        if "flash_attn.cute" in packages and "flash_attn" not in packages:
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        if not torch_flash:
            changed = (*kernels._FORWARD_ARGUMENTS, ("another", "int"))
            monkeypatch.setattr(kernels, "_FORWARD_ARGUMENTS", changed)

    return pretend


@pytest.mark.parametrize(
    ("capability", "packages", "torch_flash", "training", "evaluation"),
    [
        ((8, 0), (), True, "torch_flash", "torch_flash"),
        ((8, 0), ("flash_attn.cute",), True, "torch_flash", "torch_flash"),
        ((9, 0), (), True, "torch_flash", "torch_flash"),
        ((9, 0), ("flash_attn.cute",), True, "torch_flash", "flash_attn_4"),
        ((10, 0), ("flash_attn.cute", "flash_attn"), True, "torch_flash", "flash_attn_4"),
        ((8, 0), ("flash_attn",), False, "flash_attn_2", "flash_attn_2"),
        ((9, 0), ("flash_attn.cute",), False, "sdpa", "sdpa"),
        ((7, 5), ("flash_attn",), True, "sdpa", "sdpa"),
    ],
)
def test_auto_on_gpus(
    gpu: Callable[..., None],
    capability: tuple[int, int],
    packages: tuple[str, ...],
    torch_flash: bool,
    training: str,
    evaluation: str,
) -> None:
    gpu(capability, *packages, torch_flash=torch_flash)
    choice = choose_kernel("auto", CUDA, BF16)
    assert (choice.training, choice.evaluation) == (training, evaluation)
    assert choice.backend(0.1) == training and choice.backend(0.0) == evaluation
    assert choice.takes_packed == (training != "sdpa")


def test_a_package_that_cannot_be_imported_is_not_taken(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn-4 creates a package `flash_attn` that lacks flash-attn's function."""
    gpu((8, 0), "flash_attn.cute", torch_flash=False)
    choice = choose_kernel("auto", CUDA, BF16)
    assert choice.training == "sdpa"
    assert "flash_attn_varlen_func" in choice.reason and "another schema" in choice.reason
    with pytest.raises(ValueError, match=r"model\.attention: flash cannot run: .*another schema"):
        choose_kernel("flash", CUDA, BF16)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        (CPU, BF16, 64, "not on cpu"),
        (CUDA, torch.float32, 64, "not float32"),
        (CUDA, BF16, 12, "not 12"),
        (CUDA, BF16, 512, "not 512"),
    ],
)
def test_the_reason_is_named(
    gpu: Callable[..., None], device: torch.device, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    gpu((9, 0))
    choice = choose_kernel("auto", device, dtype, head_dim)
    assert not choice.takes_packed and reason in str(choice)
    with pytest.raises(ValueError, match=reason):
        choose_kernel("flash", device, dtype, head_dim)
    assert str(choose_kernel("sdpa", device, dtype, head_dim)) == "SDPA"


def test_an_old_gpu_is_named(gpu: Callable[..., None]) -> None:
    gpu((7, 5))
    assert "this GPU has 7.5" in choose_kernel("auto", CUDA, BF16).reason


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="expected auto, flash or sdpa"):
        choose_kernel("eager", CPU, BF16)  # type: ignore[arg-type]


def test_the_operation_in_this_torch_fits(gpu: Callable[..., None]) -> None:
    """Forward and backward of torch's private operation give the right shapes and dtypes.

    The CUDA tensors are fake: no number is computed.
    """
    gpu((9, 0))
    segments = Segments.from_lengths([3, 5])
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (
            torch.empty(8, 2, 64, dtype=BF16, device="cuda", requires_grad=True) for _ in range(3)
        )
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        lengths = PackedLengths(offsets, offsets, segments.max_length, segments.max_length)
        out = packed_attention("torch_flash", q, k, v, lengths, 0.1, True)
        assert out.shape == q.shape and out.dtype == BF16
        # Autograd's engine needs a real device. Its node can be called without one.
        assert out.grad_fn is not None
        gradients = out.grad_fn(torch.empty_like(out))[:3]
        assert [tuple(gradient.shape) for gradient in gradients] == [tuple(q.shape)] * 3
