"""Operations that ranks compile on a CPU: several ranks compile once and announce it, one rank
compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs

from blip_scale import launcher

pytestmark = pytest.mark.multiprocess

START = """
import os, sys
from pathlib import Path
from blip_scale import launcher, logs
logs.set_up(Path(sys.argv[1]), int(os.environ.get("RANK", "0")))
from blip_scale.engine.zero.engine import start
start(300)
print(os.environ["TORCH_EXTENSIONS_DIR"], flush=True)
launcher.end_process(0)
"""
LINE = "building DeepSpeed's shared-memory operation, once per environment: about a minute"


def started(folder: Path, ranks: int, **more: str) -> list[tuple[str, str]]:
    """stdout and stderr of ranks that start and end."""
    port = str(launcher.free_port())
    processes = []
    for rank in range(ranks):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", START, str(folder / "run")],
                env=os.environ | variables | more, cwd=tiny_runs.REPO,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, outputs
    return outputs


@pytest.mark.timeout(600)
def test_two_ranks_compile_once_and_say_so(tmp_path: Path) -> None:
    folder = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "of_the_user")}
    (out, first), (_, second) = started(tmp_path, 2, **folder)
    assert out.split() == [folder["TORCH_EXTENSIONS_DIR"]]
    assert first.count(LINE) == 1 and LINE not in second
    (log,) = (tmp_path / "of_the_user").glob("*/.ninja_log")
    compiled = [line.split("\t")[3] for line in log.read_text().splitlines()[1:]]
    assert len(compiled) >= 2 and len(compiled) == len(set(compiled)), "each output once"
    (_, first), (_, second) = started(tmp_path, 2, **folder)
    assert LINE not in first and LINE not in second
    assert [line.split("\t")[3] for line in log.read_text().splitlines()[1:]] == compiled


def test_one_rank_compiles_nothing(tmp_path: Path) -> None:
    """The default folder of compiled operations, one for each environment, stays empty."""
    ((out, errors),) = started(tmp_path, 1, XDG_CACHE_HOME=str(tmp_path / "cache"))
    place = Path(out.strip())
    assert place.parent == tmp_path / "cache" / "blip_scale" / "compiled"
    assert LINE not in errors
    assert not list((tmp_path / "cache").rglob("*.so"))
