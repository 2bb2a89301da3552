"""Train a recipe: the command.

`deepspeed blip_scale/train.py`, `python blip_scale/train.py` or `python -m blip_scale.train`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_PACKAGE = Path(__file__).resolve().parent
if not __package__:  # run as a script: replace this folder on the path by the package's parent
    others = [folder for folder in sys.path if os.path.realpath(folder) != str(_PACKAGE)]
    sys.path[:] = [str(_PACKAGE.parent), *others]

from blip_scale import __version__, launcher  # noqa: E402
from blip_scale.commands import dry_run, micro_batch  # noqa: E402
from blip_scale.commands.chosen_recipe import chosen_recipe, warn_of_repeats  # noqa: E402
from blip_scale.commands.command_line import Parser, report_error_of_rank  # noqa: E402
from blip_scale.config import checks, recipe, settings  # noqa: E402
from blip_scale.data.loading.course import CHANGEABLE  # noqa: E402
from blip_scale.engine.watching.loggers import registry  # noqa: E402
from blip_scale.errors import RefusedInput  # noqa: E402
from blip_scale.storage import run_folder  # noqa: E402

logger = logging.getLogger("blip_scale.train")


def command(arguments: Sequence[str] | None = None, prog: str = "train.py") -> NoReturn:
    """Run the command and end the process with its exit code."""
    launcher.stop_at_once_on_signals()
    launcher.end_process(main(arguments, prog))


def main(arguments: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run the command and return its exit code."""
    logs = None
    try:
        launcher.adopt()
        options, overrides = _parser(prog).parse_known_args(arguments)
        if options.print_recipe:
            recipe.check_overrides(overrides)
            warn_of_repeats(overrides)
            sys.stdout.write(recipe.to_yaml(recipe.load(options.recipe, overrides)))
            return 0
        chosen = chosen_recipe(options.recipe, overrides)
        if options.dry_run:
            return dry_run.run(chosen, options)
        world_size = launcher.check_variables()
        registry.check(chosen.log.to)
        checks.check(chosen, world_size)
        ds_config = checks.resolve_deepspeed(chosen, options.deepspeed, world_size)
        _announce(options.recipe, world_size)
        # Import late, so that refused input is reported before torch and DeepSpeed are loaded.
        # Garbage collection would take an eighth of the import time and free almost nothing.
        gc.disable()
        from blip_scale.engine.loop import run
        from blip_scale.tasks.by_name import TASKS

        gc.freeze()
        gc.enable()
        logs = Path(chosen.output_dir) / run_folder.LOGS
        settle = micro_batch.auto(chosen, options.deepspeed)
        allowed = frozenset(options.allow_change)
        return run(TASKS[chosen.task], chosen, ds_config, settle, allowed)
    except argparse.ArgumentError as error:
        return report_error_of_rank(prog, RefusedInput(str(error)), logs)
    except (ValueError, OSError) as error:
        return report_error_of_rank(prog, error, logs)
    except Exception:  # unexpected: show a traceback on the terminal and in the log file
        logger.debug("stopped by", exc_info=True)
        raise


def _announce(name: str, world_size: int) -> None:
    """Write the first line of a start. The imports that follow take up to half a minute."""
    if launcher.rank() == 0:
        start = f"recipe {name}, {world_size} rank{'s' * (world_size > 1)}"
        sys.stderr.write(f"blip_scale {__version__}: {start}; loading torch and DeepSpeed ...\n")


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage="deepspeed blip_scale/train.py [--recipe NAME] [--deepspeed PATH] [SETTING=VALUE]",
        description="Pretrain or fine-tune BLIP with DeepSpeed. Without a launcher, one rank "
        "trains.\nThe same command resumes an interrupted run.",
        epilog="Settings with their defaults. Change one with train.epochs=2 or --train.epochs 2; "
        "values are YAML.\n\n" + settings.help_text(recipe.Recipe),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--recipe", default="demo", metavar="NAME_OR_FILE",
        help=f"one of {', '.join(recipe.names())}, or a YAML file (default: demo)",
    )  # fmt: skip
    parser.add_argument(
        "--deepspeed", default=checks.shipped_deepspeed("zero3"), metavar="PATH",
        help="DeepSpeed's JSON settings (default: ds_configs/zero3.json)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-change", action="append", default=[], choices=CHANGEABLE.values(),
        metavar="SETTING",
        help=f"let a resumed run change {' or '.join(CHANGEABLE.values())}; may be repeated",
    )  # fmt: skip
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe and stop")
    dry_run.add_options(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by DeepSpeed's launcher
    return parser


if __name__ == "__main__":
    command()
