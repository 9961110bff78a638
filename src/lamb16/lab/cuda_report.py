"""`lamb16 cuda-report`: what the compiled step is on a GPU, found out without one, and how long it would take.

Inductor generates the step's code for fake CUDA tensors, Triton and ptxas compile it for the architecture, and a step
over the shapes is made on paper. "Moved" is what the kernels' arguments hold, each read or written once. "Slots" are
the instructions of all threads that the machine code executes, per parameter. Times are what the busiest resource of a
GPU needs by its published figures: lower bounds. Nothing runs. docs/gpu-model.md says more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict
from typing import Any

from lamb16.lab.errors import CommandError
from lamb16.lab.shapes import SETS
from lamb16.lab.study.report import table

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")


def add_parser(subparsers: Any) -> None:
    """Add `cuda-report` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cuda-report",
        help="launches, bytes, registers and instructions of the step on a GPU, and its time by them, without one",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["sm_90"], help="default: sm_90")
    parser.add_argument("--shapes", nargs="+", choices=SETS, default=["resnet50"], help="default: resnet50")
    parser.add_argument(
        "--check",
        action="store_true",
        help="in place of the report, the model's time of kernels of torchao whose time on an H100 is published",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables; a list of several")


def run(args: argparse.Namespace) -> int:
    """Generate, compile and count, then print."""
    if importlib.util.find_spec("triton") is None:
        raise CommandError("cuda-report needs Triton, which comes with torch for CUDA on Linux; install that torch")
    if args.check:
        if importlib.util.find_spec("torchao") is None:
            raise CommandError("--check needs torchao; install it with: pip install 'lamb16[peers]'")
        print(checks())
        return 0
    from lamb16.lab.cuda.report import Code, report

    found = []
    for arch in args.arch:
        code = Code(int(arch.removeprefix("sm_")))
        found += [asdict(report(code, name, SETS[name]())) for name in args.shapes]
    for row in found:
        row["gpus"] = predictions(row, found)
    if args.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        print(summary(found))
        for row in found:
            print(f"\n{row['arch']}, {row['shapes']}\n\n{kernels(row)}\n\n{slots(row)}")
        for name in args.shapes:
            rows = next(row["gpus"] for row in found if row["shapes"] == name)
            print(f"\n{name}, ps per parameter\n\n{times(rows)}")
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


def slots(found: dict[str, Any]) -> str:
    """What the kernels of one report execute, in issue slots per parameter of the step, as a Markdown table."""
    from lamb16.lab.cuda.gpus import columns

    used = [pipe for pipe in columns() if any(kernel["slots"][pipe] for kernel in found["kernels"]) or pipe == "fp64"]
    rows = []
    for kernel in found["kernels"]:
        mark = "" if kernel["exact"] else "at most "
        each = [x / found["params"] for x in (sum(kernel["slots"].values()), *(kernel["slots"][k] for k in used))]
        rows.append([kernel["graph"], f"{mark}{each[0]:.2f}", *(f"{x:.2f}" for x in each[1:])])
    total = [sum(kernel["slots"][pipe] for kernel in found["kernels"]) / found["params"] for pipe in used]
    rows.append(["**step**", f"**{found['slots_per_param']:.2f}**", *(f"**{x:.2f}**" for x in total)])
    return table(["graph", "slots", *used], rows)


def predictions(found: dict[str, Any], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step's time on every GPU, seconds per parameter, by the code for its architecture where there is a report."""
    from lamb16.lab.cuda.gpus import ADAMW_BYTES, GPUS, LAMB16_BYTES, predict
    from lamb16.lab.cuda.report import work

    rows = []
    for gpu in GPUS:
        same = [row for row in others if row["arch"] == f"sm_{gpu.capability}" and row["shapes"] == found["shapes"]]
        code = (same or [found])[0]
        prediction = predict(work(code), gpu)
        graphs = {row["graph"]: bound for row, bound in zip(code["kernels"], prediction.bounds, strict=False)}
        pipe = prediction.pipe
        rows.append({
            "gpu": gpu.name, "code": code["arch"],
            "bytes": prediction.resources["bytes"], "issue": prediction.resources["issue"],
            "pipe": pipe, "busiest": prediction.resources[pipe], "time": prediction.time,
            "bounds": {name: bound for name, bound in graphs.items() if name in ("inspect", "update")},
            "to_20_bytes": prediction.time * gpu.bandwidth / LAMB16_BYTES,
            "to_28_bytes": prediction.time * gpu.bandwidth / ADAMW_BYTES,
        })  # fmt: skip
    return rows


def times(rows: list[dict[str, Any]]) -> str:
    """The times of :func:`predictions` as a Markdown table."""
    header = [
        "GPU", "code", "bytes", "issue", "busiest pipe", "predicted", "bound of inspect, update", "to 20 bytes",
        "to 28 bytes (AdamW)",
    ]  # fmt: skip
    cells = [
        [
            row["gpu"], row["code"], f"{row['bytes'] * 1e12:.2f}", f"{row['issue'] * 1e12:.2f}",
            f"{row['busiest'] * 1e12:.2f} ({row['pipe']})", f"{row['time'] * 1e12:.2f}",
            ", ".join(row["bounds"].values()), f"{row['to_20_bytes']:.2f}", f"{row['to_28_bytes']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, cells)


def checks() -> str:
    """The model's time of published kernels beside the published one, as a Markdown table."""
    from lamb16.lab.cuda.published import check, ratio

    rows = []
    for found in check():
        item, scale = found.published, found.published.elements * 1e6
        rows.append([
            f"`{item.name}`", f"{item.rows}x{item.columns}", found.options, f"{found.work.total:.1f}",
            f"{found.prediction.resources['bytes'] * scale:.1f}", f"{found.prediction.resources['issue'] * scale:.1f}",
            f"{found.prediction.resources[found.prediction.pipe] * scale:.1f} ({found.prediction.pipe})",
            f"{found.prediction.time * scale:.1f}", f"{item.seconds * 1e6:.1f}", f"{ratio(found):.2f}",
        ])  # fmt: skip
    header = [
        "kernel", "shape", "configuration", "slots per element", "bytes, µs", "issue, µs", "busiest pipe, µs",
        "predicted, µs", "published, µs", "published to predicted",
    ]  # fmt: skip
    return table(header, rows)
