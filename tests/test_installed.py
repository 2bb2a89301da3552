"""Files, metadata and commands of the built wheel, in a fresh environment and an empty folder."""

from __future__ import annotations

import ast
import email
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
import tiny_runs
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from virtual_environments import make_environment

from blip_scale import __version__

REPO = Path(__file__).resolve().parent.parent
PINNED = {"dependencies": "requirements.txt", "demo": "requirements-demo.txt",
          "dev": "requirements-dev.txt", "web": "requirements-web.txt",
          "flash": "requirements-flash.txt"}  # fmt: skip


def requirements(file: str) -> list[Requirement]:
    """Parse a requirements file of the repository."""
    lines = [line.partition("#")[0].strip() for line in (REPO / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, because a build leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("blip_scale", "ds_configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)),
        ],
        check=True,
    )
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"blip_scale/ds_configs/{f.name}" for f in (REPO / "ds_configs").glob("*.json")}
    for kind in ("*.py", "*.yaml", "*.json", "py.typed"):
        files = (REPO / "blip_scale").rglob(kind)
        expected |= {file.relative_to(REPO).as_posix() for file in files}
    assert names == expected


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert metadata["Name"] == "blip-scale" and metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Author"] == "The blip_scale authors"
    extras = {"demo", "web", "wandb", "dev", "flash", "aws", "onnx", "lora", "clip-benchmark"}
    assert set(metadata.get_all("Provides-Extra")) == extras | {"faiss"}
    assert metadata.get_payload().startswith("# blip_scale")
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    always = {requirement.name for requirement in needed if requirement.marker is None}
    assert not always & {"mosaicml-streaming", "fsspec", "boto3"}


@pytest.mark.parametrize("kind", PINNED)
def test_the_tested_pins_lie_in_the_ranges(kind: str) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if kind == "dependencies" else (
        project["optional-dependencies"][kind]
    )  # fmt: skip
    ranges = {r.name: r.specifier for r in map(Requirement, lines)}
    pins = {pin.name: str(pin.specifier).removeprefix("==") for pin in requirements(PINNED[kind])}
    assert {name: pins.get(name) for name, range_ in ranges.items()
            if name not in pins or pins[name] not in range_} == {}  # fmt: skip
    if kind != "web":  # the file also lists gradio's dependencies
        assert pins.keys() == ranges.keys()


def test_the_oldest_pins_are_the_lower_bounds() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    ranges = {r.name: str(r.specifier) for r in map(Requirement, project["dependencies"])}
    for pin in requirements("requirements-oldest.txt"):
        release = str(pin.specifier).removeprefix("==").rpartition(".")[0]
        assert f">={release}" in ranges[pin.name].split(",")


def test_what_is_imported_is_listed() -> None:
    """Each distribution that the package imports is a dependency or part of an extra."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    listed = {canonicalize_name(Requirement(line).name) for line in lines}
    modules = set()
    for file in (REPO / "blip_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    for module in sorted(modules - sys.stdlib_module_names - {"blip_scale"}):
        names = {canonicalize_name(name) for name in distributions.get(module, [module])}
        assert names & listed, f"{module} comes from {names}, which pyproject.toml does not list"


class Installed:
    """Runs the command `blip-scale` of a fresh environment, in a folder that is not a clone."""

    def __init__(self, commands: Path, folder: Path) -> None:
        self.commands = commands
        self.folder = folder

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run the command with these arguments, and return stdout followed by stderr."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.commands / "blip-scale"), *arguments],
            env={**environment, "DS_ACCELERATOR": "cpu"},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def blip_scale(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel, with the dependencies of this environment."""
    commands = make_environment(
        tmp_path_factory.mktemp("installed") / "venv", [str(wheel)], "--no-deps"
    )
    folder = tmp_path_factory.mktemp("empty")
    code = "import blip_scale; print(blip_scale.__file__)"
    command = [str(commands / "python"), "-c", code]
    place = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert place.startswith(str(commands.parent)), "the clone shadows the installed package"
    return Installed(commands, folder)


@pytest.mark.multiprocess
def test_help_and_refusals(blip_scale: Installed) -> None:
    assert blip_scale("--version") == f"blip-scale {__version__}\n"
    listed = blip_scale("--help")
    for name in ("train", "prepare-data", "evaluate", "convert", "predict", "capfilt", "plan"):
        assert f"\n  {name} " in listed
    assert "no command 'trian'" in blip_scale("trian", code=2)
    assert "pool of 1 pair" in blip_scale("train", "train.micro_batch_size=1", code=2)
    assert "usage: blip-scale demo-page" in blip_scale("demo-page", "--help")


@pytest.mark.multiprocess
def test_from_pictures_to_captions(blip_scale: Installed) -> None:
    """Run each command on the output of the one before it."""
    folder = blip_scale.folder
    (folder / "pictures").mkdir()
    for record in tiny_runs.records("drawing"):
        (folder / "pictures" / f"{record.id}.png").write_bytes(record.image)
        (folder / "pictures" / f"{record.id}.txt").write_text(record.caption)
    output = blip_scale("prepare-data", "folder", "pictures", "shards", "--workers", "1")
    assert "64" in output and (folder / "shards" / "index.json").is_file()

    recipe = tiny_runs.make_recipe(folder / "made", train={"max_steps": 2})
    settings = yaml.safe_load(recipe.read_text())
    settings["output_dir"] = "run"
    settings["data"]["streams"][0]["local"] = "shards"
    settings["data"]["heldout"][0]["local"] = "shards"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    blip_scale("train", "--recipe", "tiny.yaml")
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 2
    assert "steps" in blip_scale("summary", "run")

    blip_scale("convert", "run", "exported", "--head", "all")
    for head in ("captioning", "retrieval", "vqa"):
        assert (folder / "exported" / head / "model.safetensors").is_file()
    picture = "pictures/drawing-red-disc-big.png"
    captions = blip_scale("predict", "caption", picture, "--model", "exported/captioning")
    assert json.loads(captions.splitlines()[0])["image"] == picture
    blip_scale("evaluate", "retrieval", "run", "shards", "--json", "figures.json")
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["images"] == 64 and figures["task"] == "retrieval"
    models = ["--captioner", "exported/captioning", "--filter", "exported/retrieval"]
    blip_scale("capfilt", "shards", "clean", *models, "--workers", "1", "--device", "cpu")
    assert (folder / "clean" / "index.json").is_file()
    plan = blip_scale("plan", "tiny.yaml", "--nodes", "1", "--gpus-per-node", "1", "--gpu", "h100")
    assert "memory" in plan
