"""`lamb16 bench`: the time of an optimizer step, side by side.

All optimizers step the same parameters with the same gradients, in turn, round after round; the table gives medians
and ratios within this one run. `copy` is a memory copy that moves as many bytes as lamb16's two passes, 26 a
parameter: the floor that the memory bus sets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lamb16 import Lamb, Lamb16, PublishedLamb16
from lamb16.cli import CommandError
from lamb16.cli.shapes import SETS
from lamb16.cli.training import state_bytes

BYTES = 26  # what the two passes move for a float32 parameter
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
YARDSTICK = "AdamW fused"
COPY = "copy"

Factory = Callable[[list[nn.Parameter]], Optimizer]
COMMON: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
CONTENDERS: dict[str, Factory] = {
    "Lamb16 compiled": lambda params: Lamb16(params, **COMMON),
    "Lamb16 eager": lambda params: Lamb16(params, **COMMON, compile=False),
    YARDSTICK: lambda params: AdamW(params, **COMMON, fused=True),
    "AdamW foreach": lambda params: AdamW(params, **COMMON, foreach=True),
    "Lamb (FP32, loop)": lambda params: Lamb(params, **COMMON),
    "PublishedLamb16": lambda params: PublishedLamb16(params, **COMMON),
}


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Normal random parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(device, dtype))
        p.grad = (torch.randn(shape, generator=generator) * 0.01).to(device, dtype)
        params.append(p)
    return params


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, on the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def copy_of(numel: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads and writes BYTES / 2 a parameter, split so that its two buffers stay small."""
    chunk = min(numel * BYTES // 2, 256 << 20)
    source = torch.ones(chunk, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> Tensor:
        left = numel * BYTES // 2
        while left > 0:
            target[: min(left, chunk)].copy_(source[: min(left, chunk)])
            left -= chunk
        return target

    return run


def measure(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    contenders: dict[str, Factory] | None = None,
) -> list[dict[str, Any]]:
    """One row a contender (default: :data:`CONTENDERS`): first step, median and range of a step, ratios, state.

    The yardstick takes part whether it is named or not.
    """
    contenders = CONTENDERS if contenders is None else {YARDSTICK: CONTENDERS[YARDSTICK]} | contenders
    params = make_params(shapes, dtype, device)
    numel = sum(p.numel() for p in params)
    calls: dict[str, Callable[[], Any]] = {COPY: copy_of(numel, device)}
    rows: dict[str, dict[str, Any]] = {COPY: {"name": COPY}}
    for name, factory in contenders.items():
        optimizer = factory(params)
        print(f"  {name}: first step ...", file=sys.stderr)
        first = timed(optimizer.step, device)
        rows[name] = {"name": name, "first_step_s": first, "state_bytes": state_bytes(optimizer)}
        calls[name] = optimizer.step
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 2):  # two rounds of warm-up
        for name, call in calls.items():
            seconds = timed(call, device)
            if k >= 2:
                times[name].append(seconds)
    for name, row in rows.items():
        row["median_s"], row["min_s"], row["max_s"] = statistics.median(times[name]), min(times[name]), max(times[name])
        row["ns_per_param"] = row["median_s"] / numel * 1e9
        for key, other in (("to_adamw", YARDSTICK), ("to_copy", COPY)):
            row[key] = statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
    return list(rows.values())


def add_parser(subparsers: Any) -> None:
    """Add `bench` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="time the step, compiled, eager and against others",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SETS, default=["mlp", "tiny-tensors"], help="parameter shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of parameters and gradients")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed steps of each optimizer")
    parser.add_argument("--json", metavar="FILE", help="write settings and results")


def run(args: argparse.Namespace) -> int:
    """Measure and print a table for every set of shapes."""
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        raise CommandError(f"--rounds and --threads must be at least 1, not {args.rounds} and {args.threads}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"cannot use --device {args.device}: {str(error).splitlines()[0]}") from error
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {}
    for name in args.shapes:
        shapes = SETS[name]()
        numel = sum(torch.Size(s).numel() for s in shapes)
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"\n{name}: {len(shapes)} tensors, {numel:,} parameters, {args.dtype}, {device}{threads}")
        results[name] = measure(shapes, DTYPES[args.dtype], device, args.rounds)
        print(table(results[name]))
    if args.json:
        settings = {
            "device": str(device),
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "rounds": args.rounds,
            "torch": torch.__version__,
        }
        Path(args.json).write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, in the order they were run."""
    lines = [
        "| | step, median | range | ns a parameter | to AdamW fused | to copy | first step | state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = f"{row['first_step_s']:.2f} s" if "first_step_s" in row else ""
        state = f"{row['state_bytes'] / 1e6:.2f} MB" if "state_bytes" in row else ""
        lines.append(
            f"| {row['name']} | {row['median_s'] * 1e3:.2f} ms | {row['min_s'] * 1e3:.2f}–{row['max_s'] * 1e3:.2f} "
            f"| {row['ns_per_param']:.2f} | {row['to_adamw']:.2f} | {row['to_copy']:.2f} | {first} | {state} |"
        )
    return "\n".join(lines)
