"""The command `prepare-data`, and the array job that runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import jpeg
from odd_files import write_img2dataset_tars

from blip_scale.commands import prepare_data
from blip_scale.data.conversion.lists import in_chunks
from blip_scale.data.conversion.pairs import Chunk, RawPair, Source
from blip_scale.data.shards import read_index
from blip_scale.data.sources.readers import READERS, SourceReader

REPO = Path(__file__).resolve().parent.parent.parent
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def prepare() -> Main:
    """Run `prepare-data` in this process."""
    return prepare_data.main


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    write_img2dataset_tars(tmp_path / "tars", 4, 25)
    return tmp_path / "tars"


def test_converting_imports_nothing_heavy() -> None:
    """Where the output is remote, each worker starts as a new interpreter."""
    code = (
        "import sys; import blip_scale.commands.prepare_data, blip_scale.data.sources.img2dataset\n"
        "sys.exit(str({'torch', 'deepspeed', 'timm', 'transformers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stderr.strip() == ""


def test_every_reader_is_offered(prepare: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare(["--help"])
    output = capsys.readouterr().out
    assert all(f"\n    {name}" in output for name in [*READERS, "demo"])
    with pytest.raises(SystemExit):
        prepare(["laion", "--help"])
    output = capsys.readouterr().out
    assert "--jpeg-quality JPEG_QUALITY" in output and "(95)" in output


def stripes(source: Source, colour: str = "") -> Iterator[Chunk]:
    """A reader outside the package, which draws one image per line of a text file."""
    lines = Path(source.location).read_text().splitlines()
    pairs = [RawPair(str(i), jpeg(i, (80, 60)), f"{colour} {line}") for i, line in enumerate(lines)]
    return in_chunks(list(pairs), source.pairs_per_chunk)


def test_an_entry_is_enough_to_add_a_reader(
    prepare: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = SourceReader(stripes, "lines of stripes", {"colour": "name of the colour"}, 3)
    monkeypatch.setitem(READERS, "stripes", reader)
    for arguments, shown in (
        (["--help"], "lines of stripes"),
        (["stripes", "--help"], "--colour COLOUR"),
    ):
        with pytest.raises(SystemExit):
            prepare(arguments)
        assert shown in capsys.readouterr().out
    (tmp_path / "lines.txt").write_text("one two three\nfour\n")
    places = [str(tmp_path / "lines.txt"), str(tmp_path / "out")]
    assert prepare(["stripes", *places, "--colour", "red", "--workers", "1"]) == 0
    (shard,) = read_index(tmp_path / "out")
    samples = [shard.read(number) for number in range(shard.samples)]
    assert [sample["captions"] for sample in samples] == [["red one two"], ["red four"]]
    assert {sample["source"] for sample in samples} == {"stripes"}
    with pytest.raises(SystemExit, match="2"):
        prepare(["laion", *places, "--colour", "red"])
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


def test_wrong_arguments_are_one_line(prepare: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        prepare(["laion", "in", "out", "--min-side", "small"])
    line = "prepare_data.py laion: argument --min-side: invalid int value: 'small'"
    assert capsys.readouterr().err == f"{line} (see prepare_data.py laion --help)\n"


def test_a_folder_of_ones_own(
    prepare: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(i, (80, 60)))
        if i:
            (tmp_path / "in" / f"{i}.txt").write_text(f"Number {i}.")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"<html>")
    (tmp_path / "in" / "broken.txt").write_text("a dog")
    arguments = ["folder", str(tmp_path / "in"), str(tmp_path / "out")]
    more = ["--label", "mine", "--max-side", "50", "--workers", "1", "--pairs-per-chunk", "4"]
    assert prepare([*arguments, *more]) == 0
    printed = capsys.readouterr()
    assert "pairs: 6 read = 4 written + 2 rejected" in printed.out
    assert "captions: 5 read = 4 written + 1 rejected" in printed.out
    assert "  missing caption: 1\n" in printed.out and "  undecodable: 1\n" in printed.out
    assert "33.3% rejected, chunk 2/2" in printed.err, "the progress bar"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["reencoded_images"] == 4
    assert summary["made_by"]["rules"]["source"] == "mine"


@pytest.mark.parametrize("out", ["", "shards"])
def test_an_output_among_the_pictures_is_refused(
    prepare: Main, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "a.txt").write_text("a caption")
    assert prepare(["folder", str(tmp_path), str(tmp_path / out)]) == 2
    assert "the input" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.txt"]


def test_a_full_disk_is_one_line(
    prepare: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, pictures = tmp_path / "disk", tmp_path / "pictures"
    disk.mkdir()
    pictures.mkdir()
    for number in range(40):
        (pictures / f"{number}.jpg").write_bytes(jpeg(number, (200, 200)))
        (pictures / f"{number}.txt").write_text("a caption")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        assert prepare(["folder", str(pictures), str(disk / "out"), "--workers", "1"]) == 1
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot write {disk / 'out'}: the disk is full; free some space" in message


def test_a_dry_run_writes_nothing(
    prepare: Main, tars: Path, capsys: pytest.CaptureFixture[str], vocabulary: Path
) -> None:
    before = sorted(tars.parent.rglob("*"))
    arguments = ["laion", str(tars), "--dry-run", "--sample", "40"]
    assert prepare([*arguments, "--tokenizer", str(vocabulary)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sample: 40 pairs, 40 of them would be written"
    table = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    assert table["width"] == ["80"] * 5 and table["height"] == ["60"] * 5
    assert table["words"] == ["9"] * 5 and int(table["tokens"][0]) > 9
    assert lines[-1].startswith("whole: about ") and "of shards" in lines[-1]
    shown = [line.removeprefix("caption: ") for line in lines if line.startswith("caption: ")]
    assert len(shown) == 5 == len(set(shown)) and all(
        "a cat 😺 with a" in caption for caption in shown
    )
    (share,) = [line for line in lines if "[UNK]" in line]
    assert float(share.partition("%")[0]) > 50 and share.endswith("another tokenizer is needed")
    whole = int(lines[-1].split()[2])
    assert 90 <= whole <= 120, "of 100"
    assert sorted(tars.parent.rglob("*")) == before
    assert prepare([*arguments, "--tokenizer", "/nowhere"]) == 0
    printed = capsys.readouterr()
    assert "token counts are left out: " in printed.err and "[UNK]" not in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["laion", "/nowhere", "OUT"], "/nowhere: there is no such file or folder"),
        (["laion", "TARS"], "OUT is missing"),
        (["laion", "TARS", "OUT", "--shard", "2/2"], "parts are counted from 0 to 1"),
        (["laion", "TARS", "OUT", "--shard", "two"], "give i/n"),
        (["laion", "TARS", "OUT", "--merge"], "no conversion was started here"),
        (["laion", "TARS", "OUT", "--max-pixels", "999999999"], "expected 1 to 178956970"),
        (["laion", "TARS", "ftp://host/set"], "ftp://host/set can't be opened: expected a path"),
        (["laion", "TARS", "OUT", "--shard-size", "many"], "many"),
        (["laion", "nosuch://bucket/set", "OUT"], "nosuch://bucket/set can't be opened"),
        (["coco", "TARS", "OUT"], "tars/dataset_coco.json"),
        (["folder", "TARS", "OUT"], "there is no image"),
    ],
)
def test_a_mistake_is_one_line(
    prepare: Main,
    arguments: list[str],
    message: str,
    tars: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"TARS": str(tars), "OUT": str(tars.parent / "out")}
    assert prepare([places.get(argument, argument) for argument in arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("prepare_data.py: ") and message in last


def test_the_wrong_parquet_is_one_line(
    prepare: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pyarrow.Table.from_pylist([{"URL": "https://host.example/1.jpg", "TEXT": "a dog"}])
    pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
    for more in ([str(tmp_path / "out")], ["--dry-run"]):
        assert prepare(["laion", str(tmp_path / "list.parquet"), *more]) == 2
        assert "has no column with images" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_once(
    number: signal.Signals, prepare: Main, repo: Path, tmp_path: Path
) -> None:
    write_img2dataset_tars(tmp_path / "tars", 20, 250)
    arguments = ["laion", str(tmp_path / "tars"), str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, str(repo / "tools" / "prepare_data.py"), *arguments],
        stderr=subprocess.PIPE, text=True,
        # A process started in the background, as in CI, ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list((tmp_path / "out").glob("chunks/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert (
        message.splitlines()[-1]
        == "stopped; finished chunks are kept, run the same command to resume"
    )
    assert "Traceback" not in message
    assert 1 <= len(list((tmp_path / "out").glob("chunks/*"))) < 20
    assert prepare(arguments) == 0


@pytest.mark.multiprocess
def test_the_array_job(tars: Path, repo: Path, tmp_path: Path) -> None:
    """Run the script with SLURM's variables, one task after the other."""
    script = repo / "slurm" / "prepare_data.sh"
    out = tmp_path / "out"
    for task in (5, 4):
        array = {"ID": task, "MIN": 4, "COUNT": 2}
        environment = os.environ | {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in array.items()}
        environment |= {"SLURM_CPUS_PER_TASK": "1", "REPO": str(repo), "PYTHON": sys.executable}
        run = subprocess.run(
            [str(script), "laion", str(tars), str(out), "--min-side", "20"],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    assert "pairs: 100 read = 100 written + 0 rejected" in run.stdout
    assert (out / "index.json").is_file()
    assert subprocess.run([str(script), "laion"], check=False, capture_output=True).returncode == 2
