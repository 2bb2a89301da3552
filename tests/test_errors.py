"""Exit code 2 stands for refused input alone, because SLURM jobs are requeued on other codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from blip_scale import train
from blip_scale.commands.command_line import check_least, report_error, run_command
from blip_scale.config import exit_codes
from blip_scale.config.recipe import load
from blip_scale.data.tokenizer import resolve_checkpoint
from blip_scale.errors import MissingInput, RefusedInput, is_refused, refusing
from blip_scale.storage.objects import RemoteError
from blip_scale.storage.output_files import naming_full_disk

REPO = Path(__file__).resolve().parent.parent


def caught(action: object) -> Exception:
    """Error that an action raises."""
    try:
        action()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


INPUT = {
    "a recipe's setting": lambda: load("demo", ["train.epochs=many"]),
    "a recipe that is not there": lambda: load("no_such_recipe"),
    "a file that is not there": lambda: Path("/no/such/file").read_text(),
    "a folder for a file": lambda: Path("/").read_text(),
    "a text checkpoint": lambda: resolve_checkpoint("./nowhere"),
}
FAILURES = {
    "torch": lambda: torch.utils.data.DataLoader([], batch_size=0),
    "numpy": lambda: np.zeros(2).reshape(3),
    "a full disk": lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    "a remote": lambda: (_ for _ in ()).throw(RemoteError("s3://bucket is out of reach")),
    "a bug": lambda: {}["key"],
}


@pytest.mark.parametrize("name", INPUT)
def test_input_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = caught(INPUT[name])
    assert is_refused(error)
    assert report_error("tool", error) == exit_codes.REFUSED
    assert capsys.readouterr().err.startswith("tool: ")
    with pytest.raises(RefusedInput), refusing():
        raise error


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = caught(FAILURES[name])
    assert not is_refused(error)
    assert report_error("tool", error) == exit_codes.FAILED
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("", "stopped\n"),
        ("shards", "stopped; shards are kept, run the same command to resume\n"),
    ],
)
def test_a_signal_ends_a_command_in_one_line(
    kept: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal does not end the work")

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_command("command", work, kept) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == message


def test_a_full_disk_is_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_error("tool", OSError(28, "No space left on device"))
    assert "the disk is full; free some space" in capsys.readouterr().err
    for error in (OSError(28, "No space left"), RuntimeError(f"rust: {os.strerror(28)}")):
        message = f"cannot write {tmp_path}/new: the disk is full"
        with pytest.raises(OSError, match=message), naming_full_disk(tmp_path / "new"):
            raise error
    with pytest.raises(RuntimeError, match=r"^a bug$"), naming_full_disk(tmp_path / "new"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("folder", ["out", "out/deeper"])
def test_a_file_where_a_folder_is_needed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "out").touch()
    error = caught(lambda: (tmp_path / folder).mkdir(parents=True, exist_ok=True))
    assert report_error("tool", error) == exit_codes.REFUSED
    words = f"tool: {tmp_path}/out is a file, but a folder is needed: remove it or give another"
    assert capsys.readouterr().err.startswith(words)


def test_numbers_below_the_least_are_refused() -> None:
    check_least(Namespace(count=1, other=None), {"count": 1, "other": 5, "not_there": 1})
    with pytest.raises(ValueError, match="--max-words 0: expected 1 or more"):
        check_least(Namespace(max_words=0), {"max_words": 1})


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "blip_scale.commands.main", "--version"]
    assert subprocess.check_output(command, text=True).startswith("blip-scale ")


SCRIPTS = ["capfilt", "evaluate", "plan", "predict", "prepare_data", "show_shards"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_during_imports_ends_a_script_in_one_line(script: str) -> None:
    """Signals are handled before the imports that take long."""
    program = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('numpy', 'pydantic', 'torch', 'yaml'):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, str(REPO / "tools" / f"{script}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (exit_codes.of_signal(signal.SIGINT), "stopped\n")


def test_what_is_missing_can_be_caught_as_such() -> None:
    with pytest.raises(FileNotFoundError, match=r"^gone$"), refusing():
        raise FileNotFoundError("gone")
    assert issubclass(MissingInput, FileNotFoundError)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0"}, "LOCAL_RANK, WORLD_SIZE not set, though RANK is"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK not set, though RANK, WORLD_SIZE is"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK='x': expected a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='': expected a number"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, "RANK 0 of WORLD_SIZE 0"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is not set"),
        (
            {"RANK": "0", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK 2 of LOCAL_WORLD_SIZE 2, with WORLD_SIZE 4: they contradict",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "MASTER_ADDR is not set: 2 ranks cannot find each other",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"},
            "MASTER_PORT 70000 is not a port",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_NODEID is not set"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE is 2: MPI started several processes, but"),
    ],
)  # fmt: skip
def test_variables_of_launchers_are_refused_in_a_line(
    variables: dict[str, str], expected: str
) -> None:
    """The training command itself refuses them, so the dry run does as well."""
    names = ("RANK", "WORLD_SIZE", "LOCAL", "MASTER_", "SLURM", "OMPI", "PMI", "MPI")
    plain = {name: v for name, v in os.environ.items() if not name.startswith(names)}
    done = subprocess.run(
        [sys.executable, train.__file__, "--print-recipe"],
        env=plain | variables, capture_output=True, text=True, timeout=120, check=False, cwd=REPO,
    )  # fmt: skip
    assert done.returncode == exit_codes.REFUSED
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
