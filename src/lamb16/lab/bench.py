"""`lamb16 bench`: the time of an optimizer step, side by side.

All optimizers step the same parameters with the same gradients, in turn, round after round; the table gives medians,
also of the ratios that two have in the same round. `copy` is a memory copy that moves as many bytes as lamb16's step,
20 per parameter: about what the memory bus allows. "Beyond state" is the most memory that the first step,
compilation included, takes beyond parameters, gradients and state, in percent of the parameters' bytes.

With `--memory` no times are taken: the table says where the bytes of a training step go, for float32 and bfloat16
weights, and the peak that was measured.

With `--host` the table has only the host's part of the step: its time with all kernels left out, beside that of fused
AdamW's step over as many tensors of one element.

With `--ranks` it has only the step of parameters that FSDP2 splits over ranks on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from lamb16 import Lamb, Lamb16, PublishedLamb16
from lamb16.lab import beside_adamw, memory, registry, releasing, timing
from lamb16.lab.errors import CommandError
from lamb16.lab.shapes import SETS, Shape
from lamb16.lab.study import report
from lamb16.lab.timing import Factory, Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "AdamW fused"
COPY = "copy"
COMMON: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
COMPILED = "Lamb16 compiled"
OWN: dict[str, Factory] = {
    COMPILED: lambda params: Lamb16(params, **COMMON),
    "Lamb16 eager": lambda params: Lamb16(params, **COMMON, compile=False),
    BASELINE: lambda params: AdamW(params, **COMMON, fused=True),
    "AdamW foreach": lambda params: AdamW(params, **COMMON, foreach=True),
    "Lamb (FP32, loop)": lambda params: Lamb(params, **COMMON),
    "PublishedLamb16": lambda params: PublishedLamb16(params, **COMMON),
}
PEERS = ("adamwfp8", "adamw8bit", "adamw4bit", "adamw8bit-bnb", "lamb-timm", "lamb-po")
# The options, with their defaults, that mean nothing where memory is measured.
TIMES_ONLY: dict[str, Any] = {
    "dtype": "float32", "rounds": 20, "peers": False, "compile_time": False, "passes": False, "release": False,
    "sizes": None, "host": False, "ranks": None, "plot": None, "size_plot": None,
}  # fmt: skip
# What stands alone: why, and which of these options it goes with.
ALONE: dict[str, tuple[str, tuple[str, ...]]] = {
    "memory": ("takes no times", ()),
    "host": ("has a table of its own", ("host", "dtype", "rounds")),
    "ranks": ("has a table of its own", ("ranks", "dtype", "rounds")),
}
SHAPES, HOST_SHAPES = ["mlp", "tiny-tensors"], ["resnet50", "bert-base", "tiny-tensors", "mlp"]
COMPILE_LAYERS, COMPILE_WIDTH = [2, 25], 256  # 37 and 405 tensors with the shapes of BERT-large, scaled down


def _peer(name: str) -> Factory:
    return lambda params: registry.build(name, [(str(i), p) for i, p in enumerate(params)], **COMMON)


def measure(
    shapes: list[Shape],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    factories: dict[str, Factory] | None = None,
) -> list[Row]:
    """:func:`timing.measure` with the baseline and the copy; the factories default to :data:`OWN`."""
    factories = OWN if factories is None else {BASELINE: OWN[BASELINE]} | factories
    return timing.measure(shapes, dtype, device, rounds, factories, BASELINE, COPY, COMPILED)


def add_parser(subparsers: Any) -> None:
    """Add `bench` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="time the step, compiled, eager and against others",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SETS,
        help=f"parameter shapes (default: {' '.join(SHAPES)}; of --host: {' '.join(HOST_SHAPES)})",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default=TIMES_ONLY["dtype"], help="of parameters and gradients")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--rounds", type=int, default=TIMES_ONLY["rounds"], metavar="N", help="timed steps of each optimizer"
    )
    parser.add_argument("--peers", action="store_true", help="with the installed optimizers of other libraries")
    parser.add_argument(
        "--compile-time",
        action="store_true",
        help="also the first step of 37 and of 405 tensors in fresh processes (CPU)",
    )
    parser.add_argument("--passes", action="store_true", help="also the parts of the compiled step, one by one")
    parser.add_argument(
        "--release", action="store_true", help="also training steps with gradients released and without"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, metavar="N",
        help="also 1, 10, 60 and 400 tensors of N elements each, and new sets of 60 and 400 at every step",
    )  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="bytes per parameter of a training step, and no times")
    parser.add_argument("--host", action="store_true", help="the step without its kernels, and nothing else")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="the step on N ranks of FSDP2 (CPU, one thread each), and nothing else"
    )
    parser.add_argument("--json", metavar="FILE", help="write settings and results")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart (SVG)")
    parser.add_argument("--size-plot", metavar="FILE", help="write a chart of one tensor's time against --sizes (SVG)")


def run(args: argparse.Namespace) -> int:
    """Measure and print a table for every set of shapes."""
    most = os.cpu_count() or 1
    if args.rounds < 1:
        raise CommandError(f"--rounds must be at least 1, not {args.rounds}")
    if args.threads is not None and not 1 <= args.threads <= most:
        raise CommandError(f"--threads must be from 1 to {most}, the processors there are, not {args.threads}")
    device = _device(args.device)
    for alone, (why, fitting) in ALONE.items():
        unused = [name for name, default in TIMES_ONLY.items() if getattr(args, name) != default]
        unused = [name for name in unused if name not in fitting]
        if getattr(args, alone) and unused:
            raise CommandError(f"--{alone} {why}; leave --{unused[0].replace('_', '-')} out")
    if args.ranks is not None:
        _check_ranks(args, most, device)
    if args.sizes and min(args.sizes) < 1:
        raise CommandError(f"--sizes must be at least 1, not {min(args.sizes)}")
    if args.size_plot and not args.sizes:
        raise CommandError("--size-plot needs --sizes")
    for file in (args.json, args.plot, args.size_plot):  # said now, not after minutes
        if file and not Path(file).resolve().parent.is_dir():
            raise CommandError(f"cannot write {file}: {Path(file).resolve().parent} is no folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.shapes = args.shapes or (HOST_SHAPES if args.host else SHAPES)
    measured = _memory if args.memory else _host if args.host else _ranks if args.ranks else _times
    written = {"settings": _settings(args, device)} | measured(args, device)
    if args.json:
        Path(args.json).write_text(json.dumps(written, indent=1) + "\n")
    if args.plot:
        plot(written["results"], Path(args.plot))
    if args.size_plot:
        beside_adamw.plot_sizes(written["sizes"], Path(args.size_plot))
    return 0


def _check_ranks(args: argparse.Namespace, most: int, device: torch.device) -> None:
    if not 2 <= args.ranks <= most:
        raise CommandError(f"--ranks must be from 2 to {most}, the processors there are, not {args.ranks}")
    if device.type != "cpu":
        raise CommandError(f"--ranks runs on the CPU, not on {device}; add --device cpu")
    for name in ("shapes", "threads"):
        if getattr(args, name):
            raise CommandError(f"--ranks has tensors of its own, and one thread per rank; leave --{name} out")
    args.threads = 1


def _times(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What is written of the optimizers' tables, and of the others that are taken with them."""
    factories = OWN | ({registry.REGISTRY[name].label: _peer(name) for name in PEERS} if args.peers else {})
    dtype, threads = DTYPES[args.dtype], torch.get_num_threads()
    written: dict[str, Any] = {"results": {}}
    for name in args.shapes:
        shapes, numel, told = _set(name)
        print(f"\n{told}, {args.dtype}, {_where(device)}\n")
        written["results"][name] = measure(shapes, dtype, device, args.rounds, factories)
        print(table(written["results"][name]), flush=True)
        if args.passes:
            passes = timing.pass_times(shapes, dtype, device, args.rounds)
            written.setdefault("passes", {})[name] = {key: seconds / numel * 1e9 for key, seconds in passes.items()}
            print("\n" + pass_table(written["passes"][name]))
        if args.release:
            written.setdefault("release", {})[name] = releasing.measure(shapes, dtype, device, args.rounds)
            print("\n" + releasing.table(written["release"][name]))
    if args.sizes:
        written |= _sizes(args, device)
    if args.compile_time:
        written["compile_time"] = timing.compile_times(COMPILE_LAYERS, COMPILE_WIDTH, args.dtype, threads)
        print("\nfirst step on the CPU, in a process of its own\n\n" + compile_table(written["compile_time"]))
    return written


def _sizes(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One tensor of every size, and several."""
    rows = beside_adamw.sizes(args.sizes, DTYPES[args.dtype], device, args.rounds)
    one, several = ([row for row in rows if (row["tensors"] == 1) == alone] for alone in (True, False))
    print("\none tensor\n\n" + beside_adamw.size_table(one))
    print(f"\nratio to {BASELINE}; left out is what has more than {beside_adamw.MOST_ELEMENTS:,} elements in all\n")
    print(beside_adamw.ratio_table(rows, "to_adamw", beside_adamw.COUNTS))
    print("\na new set at every step, nine tenths of the tensors, to the same set at every step\n")
    print(beside_adamw.ratio_table(rows, "new_to_same", beside_adamw.CHANGING))
    return {"sizes": one, "several": several}


def _memory(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    results: dict[str, list[Row]] = {}
    for name in args.shapes:
        shapes, _, told = _set(name)
        print(f"\n{told}, {device}\n")
        results[name] = memory.measure(shapes, device)
        print(memory.table(results[name]), flush=True)
    return {"results": results}


def _host(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rows = beside_adamw.host(args.shapes, DTYPES[args.dtype], device, args.rounds)
    print(f"\nthe host's work alone: no kernels, AdamW with tensors of one element; {args.dtype}, {_where(device)}\n")
    print(beside_adamw.table(rows))
    return {"host": rows}


def _ranks(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rows = beside_adamw.ranks(beside_adamw.SHARDED, args.ranks, DTYPES[args.dtype], args.rounds)
    print(f"\nFSDP2 over {args.ranks} ranks, gloo, {device}, one thread each, {args.dtype}\n")
    print(beside_adamw.table(rows))
    return {"ranks": {"count": args.ranks, "rows": rows}}


def _where(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return f"{device}, {threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _set(name: str) -> tuple[list[Shape], int, str]:
    """The shapes of this name, their number of elements, and the line that says so."""
    shapes = SETS[name]()
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    return shapes, numel, f"{name}: {len(shapes)} tensors, {numel:,} parameters"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"cannot use --device {name}: times are taken on cpu and cuda")
    return device


def _settings(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor and its vector instructions, as far as they are known."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


HEADER = [
    "",
    "step, median",
    "range",
    "ns per parameter",
    "to AdamW fused",
    "to copy",
    "first step",
    "state",
    "beyond state",
]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, in the order they were run."""
    return report.table(HEADER, [[row["name"], *_cells(row)] for row in rows])


def _cells(row: Row) -> list[str]:
    if "error" in row:
        return [f"could not run: {row['error']}"] + [""] * (len(HEADER) - 2)
    return [
        f"{row['median_s'] * 1e3:.2f} ms",
        f"{row['min_s'] * 1e3:.2f}–{row['max_s'] * 1e3:.2f}",
        f"{row['ns_per_param']:.2f}",
        f"{row['to_adamw']:.2f}",
        f"{row['to_copy']:.2f}",
        f"{row['first_step_s']:.2f} s" if "first_step_s" in row else "",
        f"{row['state_bytes'] / 1e6:.2f} MB" if "state_bytes" in row else "",
        f"{row['extra_memory']:.1%}" if "extra_memory" in row else "",
    ]


def pass_table(passes: dict[str, float]) -> str:
    """ns per parameter of the parts of the step, as Markdown."""
    return report.table(["ns per parameter", *passes], [[COMPILED, *(f"{ns:.3f}" for ns in passes.values())]])


def compile_table(rows: list[Row]) -> str:
    """Seconds of the first step with an empty and with a full cache, as Markdown."""
    forms = {"tensors": "{}", "parameters": "{:,}", "cold_s": "{:.1f} s", "warm_s": "{:.1f} s"}
    cells = [[form.format(row[key]) for key, form in forms.items()] for row in rows]
    return report.table(["tensors", "parameters", "empty cache", "full cache"], cells)


def plot(results: dict[str, list[Row]], path: Path) -> None:
    """Bars of ns per parameter, one panel per set of shapes; the copy is a line."""
    with report.figure(path, len(results)) as panels:
        for axes, (name, rows) in zip(panels, results.items(), strict=True):
            bars = [row for row in rows if "median_s" in row and row["name"] != COPY]
            colours = [report.COLOURS["lamb16" if row["name"].startswith(COMPILED) else "lamb"] for row in bars]
            axes.barh([row["name"] for row in bars], [row["ns_per_param"] for row in bars], color=colours)
            axes.axvline(next(row["ns_per_param"] for row in rows if row["name"] == COPY), color="0.3", linestyle=":")
            axes.invert_yaxis()
            axes.set(title=name, xlabel="ns per parameter; dotted: memory copy", xscale="log")
    print(f"\nwrote {path}")
