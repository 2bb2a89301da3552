"""A MED small enough for tests that take seconds, with weights far from their initial values."""

from __future__ import annotations

import pytest
import torch
from tiny_med import SENTENCES, MakeMED, tiny_config

from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED


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
