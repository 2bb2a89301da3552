"""Test the published losses as a reference: the comparable runs, and the alarm."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from blip_scale.config import loss_reference
from blip_scale.config import recipe as recipes
from blip_scale.config.checks import check
from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.monitor import Monitor
from blip_scale.engine.watching.reference_alarms import POINTS, chosen_reference

SAMPLES, STEPS = 15_250_000, 5_295
BLIP = recipes.load("base_14M", ["log.reference=blip_14M"])


@pytest.mark.parametrize(
    ("factors", "rings"),
    [
        ({}, set()),
        ({"itc": 1.2, "itm": 0.85, "lm": 0.8}, set()),
        ({"itm": 1.27}, set()),  # 27 % above, but below the alarm's floor
        ({"lm": 1.4}, {"reference_lm"}),
        ({"itc": 0.6, "itm": 2.5}, {"reference_itc", "reference_itm"}),
    ],
)
def test_the_alarm_rings_far_from_the_curve_alone(
    tmp_path: Path, factors: dict[str, float], rings: set[str]
) -> None:
    """Alarms of a full-size run whose losses are the published ones times a factor from epoch 4."""
    reference, alarms = chosen_reference(BLIP, SAMPLES)
    assert reference is not None
    monitor = Monitor(LoggedRun(tmp_path, 0), [], True, 20 * STEPS, 2880, alarms)
    for step in range(4 * STEPS, 4 * STEPS + 50 * POINTS, 50):
        expected = reference.at(step / STEPS)
        losses = {
            f"loss/{name}": expected[f"reference/{name}"] * factors.get(name, 1.0)
            for name in ("itc", "itm", "lm")
        }
        assert not monitor.lasting_alarms()
        monitor.log(step, losses | expected)
    assert set(monitor.lasting_alarms()) == rings
    monitor.log(10 * STEPS, losses | reference.at(10))  # after the last epoch of the reference
    assert not monitor.lasting_alarms()
    monitor.close()


@pytest.mark.parametrize(
    ("change", "samples", "reason"),
    [
        ("objective.itc=in_batch", SAMPLES, "objective.itc is in_batch, not momentum"),
        ("model.vision.patch_dropout=0.5", SAMPLES, "model.vision.patch_dropout is 0.5, not 0"),
        ("train.global_batch_size=1440", SAMPLES, "train.global_batch_size is 1440, not 2880"),
        ("train.epochs=20", 64_000, "an epoch has 64000 samples, not 10000000 to 25000000"),
    ],
)
def test_another_run_is_drawn_without_an_alarm(
    change: str, samples: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        recipe = recipes.load("base_14M", ["log.reference=blip_14M", change])
        reference, alarms = chosen_reference(recipe, samples)
    assert reference is not None and reference.at(1.0)["reference/itc"] == pytest.approx(2.7135)
    assert alarms == () and caplog.messages[0].endswith(reason)
    assert chosen_reference(recipes.load("base_14M"), SAMPLES) == (None, ())


def test_the_means_of_the_epochs_are_the_middles_of_the_curve() -> None:
    curve = loss_reference.load("blip_14M")
    assert curve.at(0.49) == {}
    assert curve.at(0.5) == {"reference/itc": 3.002, "reference/itm": 0.337, "reference/lm": 3.352}
    assert curve.at(4.5)["reference/itc"] == pytest.approx(2.4)
    assert curve.at(9.0) == {"reference/itc": 2.284, "reference/itm": 0.137}, "LM is cut off"
    assert curve.at(9.01) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file; give blip_14M, or a JSON or CSV file"),
        ("losses.csv", "epoch,lm\n1,3.0\n", "line 2: expected epoch 0"),
        ("losses.csv", "epoch,lm\n0,low\n", "line 2: lm: 'low' is not a number"),
        ("losses.json", '{"losses": {"lm": ["low"]}}', "losses.lm"),
    ],
)
def test_a_file_without_losses_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    recipe = recipes.load("base_14M", [f"log.reference={tmp_path / name}"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(recipe, 32)
    (tmp_path / "whole.csv").write_text("epoch,itc,lm\n0,3,\n1,2,1\n")
    table = loss_reference.load(str(tmp_path / "whole.csv"))
    assert table.at(1.0) == {"reference/itc": 2.5} and table.at(1.5)["reference/lm"] == 1
