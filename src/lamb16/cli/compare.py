"""`lamb16 compare`: studies of the rule against its FP32 form and other rules, a module a study."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

STUDIES = ("fidelity",)


def add_parser(subparsers: Any) -> None:
    """Add `compare` and its studies to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare", help="compare optimizers", description="Reproducible comparisons behind the figures in the docs."
    )
    studies = parser.add_subparsers(title="studies", dest="study", required=True, metavar="STUDY")
    for study in STUDIES:
        importlib.import_module(f"lamb16.cli.{study}").add_parser(studies)


def run(args: argparse.Namespace) -> int:
    """Run the chosen study."""
    return int(importlib.import_module(f"lamb16.cli.{args.study}").run(args))
