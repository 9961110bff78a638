"""The `lamb16` command: one subcommand a module, each with `add_parser(subparsers)` and `run(args) -> int`.

At their top, command modules import only what a bare installation has; what an extra brings goes through
`require`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

COMMANDS = ("train", "compare", "bench", "cuda-report", "scale", "export", "check")


class CommandError(Exception):
    """What the user can put right: shown as one line, without a traceback; the command ends with `status`."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def require(module: str) -> Any:
    """Import `module`, which the extra `train` brings, or raise a `CommandError` that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = "install it with: pip install 'lamb16[train]'"
        raise CommandError(f"this needs '{module}' ({error}); {hint}") from error


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
    return importlib.import_module(f"lamb16.cli.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        return int(_module(args.command).run(args))
    except CommandError as error:
        print(f"lamb16 {args.command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"lamb16 {args.command}: interrupted", file=sys.stderr)
        return 130
