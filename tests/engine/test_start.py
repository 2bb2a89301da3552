"""Ranks on a CPU compile no operations at the start. Later ones go to a folder per environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from blip_scale import launcher
from blip_scale.engine.zero import engine

START = """
import os, sys
from pathlib import Path
from blip_scale import launcher, logs
logs.set_up(Path(sys.argv[1]), int(os.environ["RANK"]))
from blip_scale.engine.zero.engine import start
start(300)
print(os.environ["TORCH_EXTENSIONS_DIR"], os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
launcher.end_process(0)
"""


@pytest.mark.multiprocess
def test_ranks_compile_nothing_and_make_no_buffers(tmp_path: Path) -> None:
    """Ranks skip two steps of DeepSpeed's start.

    DeepSpeed would compile a collective that training never calls, and allocate 64 MB of shared
    memory for each rank.
    """
    port = str(launcher.free_port())
    processes = []
    for rank in range(2):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }  # fmt: skip
        variables["TORCHINDUCTOR_CACHE_DIR"] = default_cache_dir()  # importing torch also sets it
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", START, str(tmp_path / "run")],
                env=os.environ | variables, cwd=tiny_runs.REPO,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    ((operations, blocks),) = {tuple(map(Path, out.split())) for out, _ in outputs}
    assert operations.parent == tmp_path / "cache" / "blip_scale" / "compiled"
    assert blocks == operations / "inductor" and blocks.is_dir()
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


def test_a_folder_that_the_user_names_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/of_the_user")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of_the_user/too")
    engine._set_up_compiling()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/of_the_user"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/of_the_user/too"


def test_a_home_that_cannot_be_written_keeps_the_default_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    engine._set_up_compiling()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
