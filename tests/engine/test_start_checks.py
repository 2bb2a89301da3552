"""Test the checks of the loop before the first step, and its averages of logged values."""

from __future__ import annotations

import math

import pytest
import torch

from blip_scale.engine import loop
from blip_scale.engine.watching import reporting
from blip_scale.errors import RefusedInput


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_initial_weights_that_are_not_finite_are_named(value: float) -> None:
    """Non-finite initial weights can't be trained, and the log would blame the samples."""
    weights = {name: torch.ones(3) for name in ("a", "b", "c", "d", "e")}
    loop._refuse_nonfinite(weights)
    weights["b"][1] = value
    with pytest.raises(RefusedInput, match=r"hold NaN or infinity in b: give other files as model"):
        loop._refuse_nonfinite(weights)
    for name in weights:
        weights[name][0] = value
    with pytest.raises(RefusedInput, match=r"in a, b, c and 2 more parameters"):
        loop._refuse_nonfinite(weights)


@pytest.mark.parametrize(
    ("variables", "is_chosen"),
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "6"}, True),
        ({"OMP_NUM_THREADS": "1"}, True),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, True),
    ],
)
def test_the_users_number_of_threads_is_kept(
    variables: dict[str, str], is_chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the user sets nothing, torchrun sets OMP_NUM_THREADS to 1. This is not a user's choice."""
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert loop._user_chose_threads() is is_chosen


def test_a_skipped_step_does_not_blank_a_point() -> None:
    window = [{"loss": 1.0, "norm": 2.0}, {"loss": math.nan, "norm": math.inf}]
    assert reporting._means([*window, {"loss": 3.0, "norm": 4.0}]) == {"loss": 2.0, "norm": 3.0}
    blank = reporting._means([window[1], {"loss": math.nan, "norm": 1.0}])
    assert math.isnan(blank["loss"])
    assert blank["norm"] == 1.0
