"""What all commands share: the parser, and the one line that tells about refused input."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from blip_scale.config import exit_codes


class Parser(argparse.ArgumentParser):
    """An argparse parser that refuses wrong arguments in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """End the process with the exit code of refused input."""
        sys.exit(refuse(self.prog, f"{message} (see {self.prog} --help)"))


def refuse(command: str, problem: object) -> int:
    """Write `command: problem` as one line to stderr; returns the exit code of refused input."""
    sys.stderr.write(f"{command}: {' '.join(str(problem).split())}\n")
    return exit_codes.REFUSED
