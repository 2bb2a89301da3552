"""Measure everything that needs a GPU, in ten minutes: `python tools/benchmarks/gpu_report.py OUT`.

Each part runs in its own process with a time limit. Rows are written to disk as soon as they are
measured, and OUT/report.json and OUT/report.md are rewritten after each part. Nothing is lost if a
part fails or the command is killed. OUT/log.txt holds the output of the parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tools.benchmarks import gpu_parts, gpu_rows, gpu_tables  # noqa: E402

REPORT, TABLES, LOG = "report.json", "report.md", "log.txt"
_TRIAL_FACTOR = 4
"""Factor on the time limits with --tiny, which is for slower machines."""
_LEFT_OUT_S = 5.0
"""Seconds of the budget that are reserved for writing the report."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or one of them in this process. Returns the exit code."""
    options = _parser().parse_args(arguments)
    settings = gpu_parts.Settings(
        options.out.resolve(), options.device, options.tiny, options.demo_data.resolve()
    )
    parts = gpu_parts.all_parts()
    if options.run_part:
        part = parts[options.run_part]
        part.run(settings, gpu_rows.Rows(settings.out, part.name))
        return 0
    unknown = sorted(set(options.parts) - set(parts))
    if unknown:
        print(f"error: --parts: unknown {unknown}; expected some of {[*parts]}", file=sys.stderr)
        return 2
    chosen = [parts[name] for name in parts if name in options.parts or not options.parts]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # also ends the running part
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in (gpu_rows.NAME, REPORT, TABLES, LOG):
        (settings.out / name).unlink(missing_ok=True)
    with _wheels(options.wheels) as path:
        if path is not None:
            folders = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(folders)
            sys.path.insert(1, str(path))
        states = _run_all(chosen, settings, options.minutes * 60, arguments or sys.argv[1:])
    print((settings.out / TABLES).read_text(encoding="utf-8"))
    print(f"{settings.out / REPORT}\n{settings.out / TABLES}")
    return 0 if all(state["state"] in ("done", "left out") for state in states) else 1


@contextlib.contextmanager
def _wheels(folder: Path | None) -> Iterator[Path | None]:
    """Context manager that installs the wheels of a folder into a new folder, which it yields."""
    if folder is None:
        yield None
        return
    wheels = [str(file) for file in sorted(folder.glob("*.whl"))]
    if not wheels:
        raise SystemExit(f"error: --wheels {folder}: there is no *.whl in it")
    with tempfile.TemporaryDirectory(prefix="gpu-report-wheels-") as site:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--target", site, *wheels]
        subprocess.run(command, check=True)
        yield Path(site)


def _run_all(
    parts: list[gpu_parts.Part],
    settings: gpu_parts.Settings,
    budget_s: float,
    arguments: Sequence[str],
) -> list[dict[str, Any]]:
    """Run the parts one after another while time is left. Returns the state of each part."""
    until = time.monotonic() + budget_s - _LEFT_OUT_S
    states: list[dict[str, Any]] = []
    for part in parts:
        began = time.monotonic()
        left_s = until - began
        lacking = gpu_parts.missing(part)
        outcome: tuple[str, str | None]
        if lacking:
            outcome = "left out", f"not installed: {', '.join(lacking)}; see --wheels"
        elif left_s < part.least_s:
            outcome = "left out", f"out of time: {max(0, left_s):.0f} s left"
        else:
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            limit_s = part.limit_s * (_TRIAL_FACTOR if settings.tiny else 1)
            outcome = _run_part(part, settings, min(limit_s, left_s), arguments)
        seconds = round(time.monotonic() - began, 1)
        state, reason = outcome
        states.append({"part": part.name, "state": state, "reason": reason, "seconds": seconds})
        print(f"{part.name}: {state} {reason or ''} ({seconds} s)", file=sys.stderr, flush=True)
        _write(settings.out, states)
    return states


def _run_part(
    part: gpu_parts.Part, settings: gpu_parts.Settings, limit_s: float, arguments: Sequence[str]
) -> tuple[str, str | None]:
    """Run one part in a new process group, and end the group. Returns state and reason."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run-part", part.name, *arguments]
    with (settings.out / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n===== {part.name}\n")
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return "stopped", f"after its limit of {limit_s:.0f} s; its rows so far are kept"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        return "failed", _last_line(settings.out / LOG) or f"exit code {code}"
    return "done", None


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _write(out: Path, states: list[dict[str, Any]]) -> None:
    """Write both files, replacing each atomically."""
    rows = gpu_rows.read(out)
    texts = {
        REPORT: json.dumps({"parts": states, "rows": rows}, indent=1),
        TABLES: gpu_tables.markdown(states, rows),
    }
    for name, text in texts.items():
        partial = out / f"{name}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""Packages: a part is skipped if its packages are not installed; the report says so.
For a machine without a network, download wheels and pass their folder:
    pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 -d wheels simplejpeg obstore pydantic pydantic-core ...
    DS_BUILD_OPS=0 pip wheel --no-deps -w wheels deepspeed==0.19.8   # source only on PyPI
    python tools/benchmarks/gpu_report.py OUT --wheels wheels --demo-data data/demo
The wheels are installed into a folder that takes precedence over installed packages. For unpacked
packages, use PYTHONPATH. `python tools/prepare_data.py demo data/demo` makes the demo's data. It
needs the packages of requirements-demo.txt; alternatively, copy that folder.""",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the command")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts (default: 10)")
    parser.add_argument(
        "--parts", nargs="+", default=[], metavar="PART",
        help=f"run only these (default: all, in this order): {', '.join(gpu_parts.all_parts())}",
    )  # fmt: skip
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install its *.whl first")
    parser.add_argument(
        "--demo-data", type=Path, default=ROOT / "data" / "demo", metavar="FOLDER",
        help="the demo's shards (default: data/demo); made there if they are missing",
    )  # fmt: skip
    parser.add_argument("--run-part", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
