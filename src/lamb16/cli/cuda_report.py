"""`lamb16 cuda-report`: what the compiled step is on a GPU, found out without one.

Inductor generates the step's code for fake CUDA tensors, Triton and ptxas compile it for the architecture, and a step
over the shapes is made on paper. "Moved" is what the kernels' arguments hold, each read or written once. Nothing runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict
from typing import Any

from lamb16.cli import CommandError
from lamb16.cli.shapes import SETS
from lamb16.cli.study.report import table

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")


def add_parser(subparsers: Any) -> None:
    """Add `cuda-report` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cuda-report",
        help="launches, bytes and registers of the step on a GPU, without one",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["sm_90"], help="default: sm_90")
    parser.add_argument("--shapes", nargs="+", choices=SETS, default=["resnet50"], help="default: resnet50")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables; a list of several")


def run(args: argparse.Namespace) -> int:
    """Generate, compile and count, then print."""
    if importlib.util.find_spec("triton") is None:
        raise CommandError("cuda-report needs Triton, which comes with torch for CUDA on Linux; install that torch")
    from lamb16.cuda.report import Code, report

    found = []
    for arch in args.arch:
        code = Code(int(arch.removeprefix("sm_")))
        found += [asdict(report(code, name, SETS[name]())) for name in args.shapes]
    if args.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        print(summary(found), *(f"\n{row['arch']}, {row['shapes']}\n\n{kernels(row)}" for row in found), sep="\n")
    return 0


def summary(found: list[dict[str, Any]]) -> str:
    """A line per report, as a Markdown table."""
    header = [
        "architecture",
        "shapes",
        "tensors",
        "parameters",
        "launches",
        "bytes per parameter",
        "spills",
        "falls back",
    ]
    forms = {
        "arch": "", "shapes": "", "tensors": "", "params": ",", "launches": "", "bytes_per_param": ".2f", "spills": "",
    }  # fmt: skip
    cells = [[format(row[key], form) for key, form in forms.items()] for row in found]
    falls_back = [", ".join(row["fallbacks"]) or "nothing" for row in found]
    return table(header, [[*row, last] for row, last in zip(cells, falls_back, strict=True)])


def kernels(found: dict[str, Any]) -> str:
    """The kernels of one report, as a Markdown table."""
    header = ["graph", "kernel", "launches", "MB read", "MB written", "registers", "spills", "shared bytes"]
    rows = []
    for kernel in found["kernels"]:
        moved = [f"{kernel[key] / 1e6:.3f}" for key in ("read", "written")]
        needs = [str(kernel[key]) for key in ("registers", "spills", "shared")]
        rows.append([kernel["graph"], f"`{kernel['kernel'][:40]}`", str(kernel["launches"]), *moved, *needs])
    for operation in found["eager"]:
        moved = [f"{operation['bytes_moved'] / 1e6:.3f}"]
        rows.append(["eager", f"`{operation['name']}`", str(operation["launches"]), *moved, "", "", "", ""])
    return table(header, rows)
