"""The `lamb16` command: one subcommand per module of `lab`, each with `add_parser(subparsers)` and `run(args) -> int`.

Nothing of `lab` is imported before the command line is read.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

COMMANDS = ("train", "compare", "bench", "cuda-report", "scale", "export", "check")


class _Parser(argparse.ArgumentParser):
    """Argparse prints the whole usage before an error; one line that names the mistake is easier to read."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from lamb16 import __version__

    parser = _Parser(prog="lamb16", description="LAMB with 8-bit optimizer state.")
    parser.add_argument("--version", action="version", version=f"lamb16 {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        _module(command).add_parser(subparsers)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"lamb16.lab.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit status."""
    from lamb16.lab.errors import CommandError

    args = build_parser().parse_args(argv)
    try:
        return int(_module(args.command).run(args))
    except CommandError as error:
        print(f"lamb16 {args.command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"lamb16 {args.command}: interrupted", file=sys.stderr)
        return 130
