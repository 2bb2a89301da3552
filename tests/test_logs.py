"""Logging: lines on the terminal, lines in the file, and the output of third parties."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip_scale import logs

ours = logging.getLogger("blip_scale.somewhere")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Restore logging after each test, because it is global."""
    root, package = logging.getLogger(), logging.getLogger("blip_scale")
    handlers, levels = list(root.handlers), (root.level, package.level)
    thread_hook = threading.excepthook
    filters = {name: logging.getLogger(name).filters[:] for name in ("DeepSpeed", "py.warnings")}
    environment = dict(os.environ)
    yield
    for handler in [added for added in root.handlers if added not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(levels[0])
    package.setLevel(levels[1])
    threading.excepthook = thread_hook
    for name, before in filters.items():
        logging.getLogger(name).filters[:] = before
    logging.captureWarnings(False)
    os.environ.clear()
    os.environ.update(environment)


def fail() -> None:
    raise ValueError("two\nlines")


def test_rank_0_shows_info_on_one_line_and_keeps_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = logs.set_up(tmp_path, 0)
    assert file == tmp_path / "logs" / "rank_0.log"
    ours.debug("detail")
    ours.info("hello %d", 1)
    try:
        fail()
    except ValueError:
        ours.exception("it broke")
    shown = capsys.readouterr()
    assert shown.out == ""
    hello, broke = shown.err.splitlines()
    assert hello.endswith(" hello 1")
    assert "INFO" not in hello
    assert broke.endswith(f"ERROR it broke - ValueError: two lines (traceback in {file})")
    written = file.read_text()
    assert "DEBUG blip_scale.somewhere" in written
    assert "Traceback (most recent call last)" in written
    assert "in fail" in written


def test_other_ranks_show_errors_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = logs.set_up(tmp_path, 3)
    ours.info("calm")
    ours.warning("careful")
    ours.error("broken")
    assert capsys.readouterr().err.splitlines()[0].endswith("rank 3 ERROR broken")
    assert file.name == "rank_3.log"
    assert all(word in file.read_text() for word in ("calm", "careful", "broken"))


def test_third_parties_go_to_the_file_and_their_errors_to_the_terminal_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("some_library")
    library.propagate = False
    library.addHandler(logging.StreamHandler(sys.stderr))  # like transformers, torch and others
    file = logs.set_up(tmp_path, 0)
    library.warning("noise")
    logging.getLogger("some_library.part").info("chatter")
    for _ in range(3):
        logging.getLogger("py.warnings").warning(
            "old fashioned"
        )  # captured warnings use this logger
    with logs.prints_to_log("some_library"):
        print("built successfully")
    library.error("really broken")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[0].endswith("ERROR really broken")
    assert len(shown.err.splitlines()) == 1
    written = file.read_text()
    for word in ("noise", "chatter", "old fashioned", "built successfully", "really broken"):
        assert written.count(word) == 1


def test_deepspeed_is_diverted_before_it_makes_its_own_handler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.hold_third_party_noise()
    deepspeed = logging.getLogger("DeepSpeed")
    propagate, handlers = deepspeed.propagate, list(deepspeed.handlers)
    try:
        deepspeed.propagate = False  # like importing deepspeed.utils.logging
        deepspeed.addHandler(logging.StreamHandler(sys.stdout))
        deepspeed.warning("Setting accelerator to CPU")
        file = logs.set_up(tmp_path, 0)
        deepspeed.warning("later")
    finally:
        deepspeed.propagate, deepspeed.handlers[:] = propagate, handlers
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""
    written = file.read_text()
    assert written.count("Setting accelerator to CPU") == written.count("later") == 1


def test_set_up_again_moves_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = logs.set_up(tmp_path / "a", 0)
    second = logs.set_up(tmp_path / "b", 0)
    ours.info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert "once" not in first.read_text()
    assert "once" in second.read_text()


def test_a_restart_appends(tmp_path: Path) -> None:
    logs.set_up(tmp_path, 0)
    ours.info("before")
    file = logs.set_up(tmp_path, 0)
    ours.info("after")
    assert "before" in file.read_text()
    assert "after" in file.read_text()


def test_a_full_disk_costs_lines_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").symlink_to("/dev/full")
    logs.set_up(tmp_path, 0)
    for number in range(3):
        ours.info("line %d", number)
    shown = capsys.readouterr().err
    assert shown.count("log lines are being lost") == 1
    assert "Traceback" not in shown
    assert "line 2" in shown


def test_a_thread_that_ends_badly_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = logs.set_up(tmp_path, 0)
    thread = threading.Thread(target=fail, name="writer")
    thread.start()
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert "thread writer ended - ValueError: two lines" in line
    assert "in fail" in file.read_text()


RANK = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.environ["REPOSITORY"])
from blip_scale import logs
logs.hold_third_party_noise()
import deepspeed, timm, torch, transformers
from torch.utils.tensorboard import SummaryWriter
config = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
logs.set_up(Path(os.environ["RUN"]), int(os.environ["RANK"]))
from blip_scale.engine.zero.engine import start
start(300.0)
with deepspeed.zero.Init(config_dict_or_path=config):
    network = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
for _ in range(3):
    data = torch.randn(2, 64, dtype=engine.module[0].weight.dtype, device=engine.device)
    engine.backward(engine(data).float().square().mean())
    engine.step()
engine.save_checkpoint(os.environ["RUN"])
"""


@pytest.mark.multiprocess
def test_a_zero3_run_prints_nothing_of_its_own(tmp_path: Path) -> None:
    """Messages of DeepSpeed, torch and others in a real run of two ranks go to the files."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = os.environ | {
        "RUN": str(tmp_path / "run"),
        "REPOSITORY": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["torchrun", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    for rank in (0, 1):
        written = (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text()
        assert "Warning" in written or "WARNING" in written
