"""Compare the losses of 20 steps of the tiny run with the files in golden/.

This detects unintended changes of the numbers. On the kind of machine that wrote the files, the
losses must be equal to the last bit. Other machines sum in a different order, and `TOLERANCE`
bounds the effect. After an intended change, write the files again (about a minute, on an idle
machine):

    OMP_NUM_THREADS=1 python tests/engine/test_golden.py --write
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import tiny_runs
import torch

pytestmark = pytest.mark.multiprocess

GOLDEN = Path(__file__).parent / "golden"
FILES = {1: "one_rank.json", 2: "two_ranks.json"}
STEPS = 20
TOLERANCE = 1e-3
"""Absolute tolerance for losses between 0.6 and 12. A different order of summation changes a number
by about 1e-7 (one unit in the last place). If the initial weights differ by this much, the losses
of this run differ by up to 5e-5 after 20 steps. A real mistake changes the first losses by far more
than 1e-3: a different dropout mask or hard negative changes them by 1e-2 or more."""
PACKAGES = ("torch", "deepspeed", "timm", "transformers", "numpy", "pillow", "torchvision")
"""Packages that affect the numbers: pixels, augmentation, network, optimizer."""


def kind(ranks: int) -> dict[str, Any]:
    """Return the properties that affect the last bits: processor, threads of a rank, versions."""
    processor = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("vendor_id", "cpu family", "model", "model name"):
            processor.setdefault(name.strip(), value.strip())
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": max(1, len(os.sched_getaffinity(0)) // ranks),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def draws() -> list[float]:
    """Return a few rounded random numbers of the two kinds that a step draws.

    From the same seed, torch draws different dropout masks (here: of causal attention) and
    exponential numbers on Intel processors than on others.
    """
    generator = torch.Generator().manual_seed(7)
    mask = torch.empty(16).bernoulli_(0.5, generator=generator)
    race = torch.empty(4).exponential_(generator=generator)
    return [round(value, 4) for value in [*mask.tolist(), *race.tolist()]]


def measure(folder: Path, ranks: int) -> dict[int, dict[str, float]]:
    """Return the losses by step of a run in fp32, with dropout, under ZeRO-3."""
    recipe = tiny_runs.make_recipe(folder, train={"max_steps": STEPS})
    tiny_runs.train(recipe, ranks)
    return tiny_runs.losses(folder / "run")


def write() -> None:
    """Write the golden files from this machine's numbers. Two runs must give the same numbers."""
    for ranks, name in FILES.items():
        runs = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure(Path(folder), ranks))
        if runs[0] != runs[1]:
            raise SystemExit(f"{ranks} rank(s): two runs differ, there is nothing to write down")
        golden = {"kind": kind(ranks), "draws": draws(), "losses": runs[0]}
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / name).write_text(json.dumps(golden, indent=1) + "\n")
        print(f"wrote {GOLDEN / name}")


@pytest.mark.parametrize("ranks", FILES)
def test_losses_are_those_that_were_written_down(tmp_path: Path, ranks: int) -> None:
    golden = json.loads((GOLDEN / FILES[ranks]).read_text())
    if golden["draws"] != draws():
        pytest.skip("torch draws other random numbers from the same seed on this processor")
    expected = {int(step): losses for step, losses in golden["losses"].items()}
    measured = measure(tmp_path, ranks)
    assert list(measured) == list(expected) == list(range(1, STEPS + 1))
    if golden["kind"] == kind(ranks):
        assert measured == expected
    for step in expected:
        assert measured[step] == pytest.approx(expected[step], rel=0, abs=TOLERANCE), step


def test_the_curves_are_worth_keeping() -> None:
    """Both runs learn. Their curves are similar, but not equal: the local batches differ."""
    curves = [json.loads((GOLDEN / name).read_text())["losses"] for name in FILES.values()]
    for curve in curves:
        for name in ("loss/total", "loss/itc", "loss/lm"):
            assert curve[str(STEPS)][name] < 0.8 * curve["1"][name]
    assert curves[0] != curves[1]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: python {sys.argv[0]} --write")
    write()
