"""Virtual environments that tests make: over the packages of this one, with some of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_NO_INDEX = ("No matching distribution found", "Could not find a version")


def make_environment(folder: Path, packages: Sequence[str], *pip_options: str) -> Path:
    """Make a virtual environment in `folder` and return its bin folder.

    `packages` are installed into it and hide those of the same name here; all others are imported
    from here, through a .pth file. The test is skipped where pip has no index to install from.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = (folder / "lib").glob("python3*/site-packages")
    below = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "below.pth").write_text("\n".join(below) + "\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")),
            *("install", "--quiet", "--no-compile", "--disable-pip-version-check"),
            *pip_options,
            *packages,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and any(reason in done.stderr for reason in _NO_INDEX):
        pytest.skip(f"pip has no index with {', '.join(packages)}")
    assert done.returncode == 0, done.stderr
    return folder / "bin"
