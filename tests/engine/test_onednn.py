"""Compare oneDNN's linear layer with torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blip_scale.engine.zero.onednn import OneDNNLinear, take_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 24), (0, 24)])
def test_values_gradients_and_operations_are_torchs(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16 in oneDNN")
    torchs = nn.Linear(24, 40, bias, dtype=dtype)
    ours = copy.deepcopy(torchs)
    take_onednn(ours)
    assert type(ours) is OneDNNLinear
    seed = torch.randn(*shape, dtype=dtype)
    results = []
    for layer in (torchs, ours):
        x = seed.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            y.square().sum().backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([y, x.grad, *gradients, torch.tensor(counter.get_total_flops())])
    for expected, value in zip(*results, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(value, expected)
        elif value.numel():  # rounded terms may cancel, so the tolerance is absolute
            largest = expected.abs().max().item()
            torch.testing.assert_close(value, expected, rtol=0.02, atol=0.01 * largest)


def test_a_columns_gradient_need_not_be_contiguous() -> None:
    layer = nn.Linear(24, 40)
    take_onednn(layer)
    x = torch.randn(6, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)  # the gradient is an expanded scalar
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(6, 24))


def test_nothing_need_be_contiguous() -> None:
    layer = nn.Linear(24, 40)
    layer.weight.data = torch.randn(24, 40).t()
    layer.bias.data = torch.randn(40, 2)[:, 0]
    x = torch.randn(5, 24, 3).transpose(1, 2)
    expected = layer(x)
    take_onednn(layer)
    torch.testing.assert_close(layer(x), expected)


def test_only_plain_linear_layers_are_exchanged() -> None:
    class Other(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(2, 2), Other(2, 2), nn.LayerNorm(2))
    take_onednn(network)
    assert [type(module) for module in network] == [OneDNNLinear, Other, nn.LayerNorm]
