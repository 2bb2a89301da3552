"""The command `blip-scale NAME ...`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from blip_scale import __version__
from blip_scale.commands.signals import stop_at_once_on_signals
from blip_scale.config import exit_codes

COMMANDS = {
    "train": ("blip_scale.train", "train a recipe, on one rank or under a launcher"),
    "prepare-data": ("blip_scale.commands.prepare_data", "turn a data set into MDS shards"),
    "index-tars": ("blip_scale.commands.index_tars", "index tars that training reads in place"),
    "overlay": ("blip_scale.commands.overlay", "join new captions to shards of images"),
    "show": ("blip_scale.commands.show_shards", "show samples of MDS shards"),
    "evaluate": ("blip_scale.commands.evaluate", "evaluate a checkpoint on held-out data"),
    "clip-benchmark": (
        "blip_scale.commands.clip_benchmark",
        "evaluate a checkpoint with the package clip_benchmark",
    ),
    "convert": ("blip_scale.commands.convert_checkpoint", "convert a checkpoint"),
    "predict": ("blip_scale.commands.predict", "ask a checkpoint about images"),
    "embed": ("blip_scale.commands.embed", "write the features of a data set to parquet files"),
    "capfilt": ("blip_scale.commands.capfilt", "caption and filter web images"),
    "plan": ("blip_scale.commands.plan", "plan memory, time and storage of a run"),
    "demo-page": ("blip_scale.commands.demo_page", "serve checkpoints on a web page"),
    "summary": ("blip_scale.commands.show_summary", "show the figures of a finished run"),
}
"""Name of a command -> (module with `main(arguments, prog)`, help text)."""


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    """Run one command, and return its exit code. Only that command's module is imported.

    Args:
        arguments: name of the command, then its arguments; None: the arguments of the process.
        script: name of the command in messages; None: `blip-scale NAME`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return exit_codes.DONE if words else exit_codes.REFUSED
    if words[0] == "--version":
        sys.stdout.write(f"blip-scale {__version__}\n")
        return exit_codes.DONE
    if words[0] not in COMMANDS:
        from blip_scale.commands.command_line import refuse

        names = ", ".join(COMMANDS)
        return refuse("blip-scale", f"no command {words[0]!r}; give one of {names}")
    module = importlib.import_module(COMMANDS[words[0]][0])
    code: int = module.main(words[1:], script or f"blip-scale {words[0]}")
    return code


def command(name: str | None = None) -> None:
    """Run a command with the arguments of the process, then end the process with its exit code.

    Args:
        name: command to run, for a script with only one command; None: the first argument.
    """
    stop_at_once_on_signals()
    script = Path(sys.argv[0]).name if name else None
    words = [name, *sys.argv[1:]] if name else sys.argv[1:]
    if words and words[0] in ("train", "evaluate"):  # these end their process groups themselves
        module = importlib.import_module(COMMANDS[words[0]][0])
        module.command(words[1:], script or f"blip-scale {words[0]}")
    try:
        code = main(words, script)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in: blip-scale summary RUN | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = exit_codes.FAILED
    sys.exit(code)


def _help() -> str:
    """Return the text of `blip-scale --help`."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: blip-scale COMMAND [ARGUMENT ...]",
            "",
            "Pretrain, fine-tune, evaluate and use BLIP.",
            "",
            "commands:",
            *rows,
            "",
            "`blip-scale COMMAND --help` shows the arguments of a command.",
            "",
        ]
    )


if __name__ == "__main__":
    command()
