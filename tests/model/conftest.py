"""A MED small enough for tests that take seconds, with weights far from their initial values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from blip_scale.model import MED, MEDConfig, SpecialTokens, TextConfig, VisionConfig, init_weights

PAD, CLS, SEP, ENC, DEC = range(5)
SPECIAL = SpecialTokens(pad=PAD, cls=CLS, sep=SEP, enc=ENC, dec=DEC)
SENTENCES = [
    [CLS, 7, 8, SEP],
    [CLS, 9, SEP],
    [CLS, 7, 8, 9, 10, 11, SEP],
    [CLS, 20, 21, 22, 23, SEP],
]

MakeMED = Callable[..., MED]


def tiny_config(**changes: object) -> MEDConfig:
    """ViT of 3 blocks, width 24, 17 tokens; text of 3 layers, width 32."""
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
    text = {"vocab_size": 60, "width": 32, "layers": 3, "heads": 4, "mlp_width": 64}
    text |= {"max_positions": 24, "dropout": 0.0}
    text |= {name: changes.pop(name) for name in list(changes) if name in text}
    return MEDConfig(
        VisionConfig("vit_tiny_patch16_224", 32, sizes), TextConfig(SPECIAL, **text), 16, **changes
    )


@pytest.fixture
def make_med() -> MakeMED:
    """Builds a MED; keywords change its config. Same seed, same weights."""

    def make(**changes: object) -> MED:
        med = MED(tiny_config(**changes))
        init_weights(med, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # norms and biases too, so that a mistake in them shows
            for parameter in med.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            med.temperature.value.fill_(0.07)
        return med

    return make


@pytest.fixture
def med(make_med: MakeMED) -> MED:
    return make_med()


@pytest.fixture
def images() -> torch.Tensor:
    """[4, 3, 32, 32]."""
    return torch.randn(len(SENTENCES), 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def sentences() -> list[list[int]]:
    return [list(ids) for ids in SENTENCES]
