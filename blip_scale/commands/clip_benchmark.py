"""Evaluate a checkpoint with the package clip_benchmark.

blip-scale clip-benchmark eval --pretrained runs/demo --dataset cifar10 --output figures.json
The arguments are those of clip_benchmark, except --model_type, which is added. --pretrained is a
run's folder, step_N, .pth, or a Hugging Face folder. --model is only a name for the results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blip_scale.commands.command_line import refuse, report_error
from blip_scale.config import exit_codes
from blip_scale.inference.clip_adapter import MODEL_TYPE, register


def main(arguments: Sequence[str] | None = None, prog: str = "blip-scale clip-benchmark") -> int:
    """Run clip_benchmark, and return the exit code: 0, or 2 for refused input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        register()
        from clip_benchmark import cli
    except ImportError as error:
        return refuse(prog, f"{error}: run `pip install clip-benchmark requests`")
    if words[:1] == ["eval"]:
        words += ["--model_type", MODEL_TYPE]
    before = sys.argv
    sys.argv = [prog, *words]  # clip_benchmark takes its arguments only from sys.argv
    try:
        cli.main()
    except (ValueError, OSError) as error:
        return report_error(prog, error)
    finally:
        sys.argv = before
    return exit_codes.DONE
