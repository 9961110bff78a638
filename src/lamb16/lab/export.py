"""`lamb16 export`: one optimizer step over given shapes as a package that C and C++ programs can run.

Writes step.pt2 (an AOTInductor package) and manifest.json into a folder. docs/c-api.md says how to use them.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from lamb16.capi.manifest import DTYPES, MANIFEST, MAX_DIMS, PACKAGE, Shape, Spec, wrong_rounding
from lamb16.hyper import FLAGS, NAMES, ROUNDINGS, Hyper, check_hyperparameters
from lamb16.lab.errors import CommandError
from lamb16.lab.shapes import SETS

OPTIONS = [name for name in NAMES if name != "moment_dtype"]  # which is always float8


def add_parser(subparsers: Any) -> None:
    """Add `export` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export", help="write the step as a package for C programs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", required=True, metavar="SHAPE",
        help=f"of the parameters, in order: words like 300x70, or the sets {', '.join(SETS)}",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    parser.add_argument(
        "--param-dtype", default="float32", choices=list(DTYPES), help="of weights and gradients (default: float32)"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="that the step runs on (default: torch's)")
    hyper = parser.add_argument_group("hyperparameters, constants of the step", "as of lamb16.Lamb16")
    for name in OPTIONS:
        add_option(hyper, name)


def add_option(group: Any, name: str) -> None:
    """The option of a hyperparameter: a number, two (betas), a word or a flag with its --no- form."""
    option, default = f"--{name.replace('_', '-')}", getattr(Hyper, name)
    if name in FLAGS:
        group.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
    elif name == "betas":
        group.add_argument(option, type=float, nargs=2, default=default, metavar=("BETA1", "BETA2"))
    elif name == "param_rounding":
        group.add_argument(option, default=default, choices=ROUNDINGS, help="of weights with 16 bits")
    else:
        said = "an input of the step; this one goes into the manifest" if name == "lr" else None
        group.add_argument(option, type=float, default=default, metavar="X", help=said)


def run(args: argparse.Namespace) -> int:
    """Check everything, then compile and write."""
    shapes = parse_shapes(args.shapes)
    spec = Spec(shapes, hyperparameters(args), DTYPES[args.param_dtype])
    if wrong_rounding(spec):
        raise CommandError(
            f"--param-dtype float16 --param-rounding exact: {wrong_rounding(spec)}; use another of either"
        )
    threads = torch.get_num_threads() if args.threads is None else args.threads
    if threads < 1:
        raise CommandError(f"--threads must be at least 1, not {threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("cannot use --device cuda: torch finds no GPU here; export on a machine with one")
    check_folder(args.out)
    from lamb16.capi.export import export  # Inductor takes a second to import

    begin = time.perf_counter()
    try:
        written = export(spec, args.out, torch.device(args.device), threads)
    except OSError as error:
        raise CommandError(f"cannot write ({error})", status=1) from error
    except Exception as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise CommandError(f"cannot compile the step: it needs a working C++ compiler ({cause})", status=1) from error
    seconds = time.perf_counter() - begin
    numel = sum(entry["numel"] for entry in written["tensors"])
    size = (args.out / PACKAGE).stat().st_size
    print(f"{args.out / PACKAGE}: {len(shapes)} tensors, {numel:,} parameters, {size / 1e6:.1f} MB, {seconds:.0f} s")
    return 0


def parse_shapes(words: list[str]) -> list[Shape]:
    """The shapes that words like 300x70 and names of sets stand for; raises `CommandError`."""
    shapes: list[Shape] = []
    for word in words:
        if word in SETS:
            shapes += SETS[word]()
        elif re.fullmatch(r"[0-9]+(x[0-9]+)*", word):
            shapes.append(tuple(int(n) for n in word.split("x")))
        else:
            raise CommandError(f"--shapes {word} is neither a shape like 300x70 nor one of {', '.join(SETS)}")
        if len(shapes[-1]) > MAX_DIMS or math.prod(shapes[-1]) >= 1 << 31:
            raise CommandError(f"--shapes {word}: at most {MAX_DIMS} dimensions and 2^31 - 1 elements are possible")
    if not any(math.prod(shape) for shape in shapes):
        raise CommandError("--shapes: no tensor has an element, there is nothing to step")
    return shapes


def hyperparameters(args: argparse.Namespace) -> Hyper:
    """The hyperparameters of the command line, checked; raises `CommandError`."""
    values = {name: getattr(args, name) for name in OPTIONS}
    values["betas"] = tuple(values["betas"])
    try:
        check_hyperparameters(values)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return Hyper(**values)


def check_folder(folder: Path) -> None:
    """Raise `CommandError` unless the folder is missing, empty or of an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"-o {folder} is a file; name a folder")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CommandError(f"-o {folder}: {parent} is no folder that can be written to; name another")
    others = sorted(x.name for x in folder.iterdir() if x.name not in (PACKAGE, MANIFEST)) if folder.exists() else []
    if others:
        raise CommandError(f"-o {folder} holds other things ({others[0]}); name a new or empty folder")
