"""`lamb16 bench --host`, `--sizes` and `--ranks`: the step of Lamb16 beside that of fused AdamW alone.

Both take turns; ratios are medians of those in the same round.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.optim import AdamW, Optimizer

from lamb16 import Lamb16
from lamb16.lab import timing
from lamb16.lab.errors import CommandError
from lamb16.lab.memory import COMMON, Chain
from lamb16.lab.shapes import SETS, Shape
from lamb16.lab.study import report
from lamb16.lab.timing import Factory, Row
from lamb16.step import native
from lamb16.step.examples import flatten
from lamb16.step.kinds import Graph, Kind
from lamb16.step.recording import Launches, Mark, Place, Program

CPU = torch.device("cpu")
COUNTS, MOST_ELEMENTS = (1, 10, 60, 400), 64_000_000  # of --sizes: tensors, and what several have at most in all
CHANGING = (60, 400)  # those of COUNTS that are also stepped with another set of gradients at every step
SHARDED: list[list[Shape]] = [[(64, 64)] * 48, [(512, 512)] * 48, [(64, 64)] * 288]  # of --ranks
COLUMNS = {
    "name": ("shapes", "{}"),
    "tensors": ("tensors", "{}"),
    "parameters": ("parameters", "{:,}"),
    "median_ms": ("Lamb16, median", "{:.3f} ms"),
    "adamw_median_ms": ("AdamW fused, median", "{:.3f} ms"),
    "to_adamw": ("ratio", "{:.2f}"),
}


def lamb16(params: list[nn.Parameter], **options: Any) -> Lamb16:
    """The optimizer that is measured."""
    return Lamb16(params, **COMMON, **options)


def adamw(params: list[nn.Parameter]) -> AdamW:
    """The one beside it."""
    return AdamW(params, **COMMON, fused=True)


def steps(**optimizers: Optimizer) -> dict[str, Callable[[], Any]]:
    """Their steps by these names."""
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def compared(times: dict[str, list[float]], shapes: list[Shape]) -> Row:
    """What is stepped, the median milliseconds of "own" and "adamw", given in seconds, and that of their ratios."""
    own, other = times["own"], times["adamw"]
    return {
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes)),
        "median_ms": statistics.median(own) * 1e3,
        "adamw_median_ms": statistics.median(other) * 1e3,
        "to_adamw": timing.ratio(own, other),
    }


def table(rows: list[Row]) -> str:
    """The rows of :func:`host` or :func:`ranks` as Markdown."""
    columns = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    cells = [[form.format(row[key]) for key, (_, form) in columns.items()] for row in rows]
    return report.table([title for title, _ in columns.values()], cells)


# -- the host's work -------------------------------------------------------------------------------------------------


class _Nothing:
    """An executor whose graphs are each one kernel of Triton's that does nothing with all of their arguments."""

    launchers = (lambda *arguments, stream: None,)

    def prepare(self, *_: Any) -> None:
        """Compile nothing of the step."""
        native.library()

    def run(self, *_: Any) -> None:
        """Launch nothing."""

    copy = run

    def record(
        self, program: Program, part: str, graph: Graph, kind: Kind, arguments: tuple[Any, ...], guard: int
    ) -> bool:
        """One launch."""
        inputs = [x for x in flatten(arguments) if isinstance(x, (Place, torch.Tensor))]
        marks = [Mark(False, k, 1) for k in range(len(inputs))]
        program.add(part, Launches([(self, marks)], []), inputs, guard)
        return True


@contextlib.contextmanager
def without_kernels() -> Iterator[Factory]:
    """Yield what makes a Lamb16 whose steps, in this context, do the host's work for CUDA and launch no kernel."""
    grouped = Kind(torch.device("cuda"))
    with (
        mock.patch.object(Kind, "group", grouped.group),
        mock.patch.object(Kind, "reading_group", grouped.reading_group),
        mock.patch("torch._C._cuda_getCurrentRawStream", return_value=0),
    ):
        yield lambda params: lamb16(params, compile=_Nothing())


def host(names: list[str], dtype: torch.dtype, device: torch.device, rounds: int) -> list[Row]:
    """For each set of shapes the step with its kernels left out, and AdamW's over as many tensors of one element.

    On the host's clock.
    """
    rows = []
    for name in names:
        print(f"  {name} ...", file=sys.stderr)
        shapes = SETS[name]()
        with without_kernels() as factory:
            own = factory(timing.make_params(shapes, dtype, device))
            other = adamw(timing.make_params([(1,)] * len(shapes), dtype, device))
            times = timing.side_by_side(steps(own=own, adamw=other), CPU, rounds)
        rows.append({"name": name} | compared(times, shapes))
    return rows


# -- equal tensors ---------------------------------------------------------------------------------------------------


def sizes(numels: list[int], dtype: torch.dtype, device: torch.device, rounds: int) -> list[Row]:
    """For 1, 10, 60 and 400 tensors of every size nanoseconds per parameter, and the ratio.

    For 60 and 400 also :func:`new_to_same`. Several tensors of more than ``MOST_ELEMENTS`` in all are left out.
    """
    rows = []
    for numel, tensors in itertools.product(sorted({*numels}), COUNTS):
        if tensors > 1 and tensors * numel > MOST_ELEMENTS:
            continue
        print(f"  {tensors} tensors of {numel:,} ...", file=sys.stderr)
        shapes: list[Shape] = [(numel,)] * tensors
        params = timing.make_params(shapes, dtype, device)
        calls = steps(own=lamb16(params), adamw=adamw(params))
        row = compared(timing.side_by_side(calls, device, rounds), shapes) | {"numel": numel}
        for key, other in (("ns_per_param", "median_ms"), ("adamw_ns_per_param", "adamw_median_ms")):
            row[key] = row[other] / (tensors * numel) * 1e6
        if tensors in CHANGING:
            row["new_to_same"] = new_to_same(params, device, rounds)
        rows.append(row)
    return rows


def new_to_same(params: list[nn.Parameter], device: torch.device, rounds: int) -> float:
    """The time of a step where nine tenths of the tensors have gradients, others at every step, to that of the same.

    No step is that of all tensors.
    """
    grads, chosen = [p.grad for p in params], random.Random(0)

    def hand_over(kept: Sequence[int]) -> None:
        for p in params:
            p.grad = None
        for k in kept:
            params[k].grad = grads[k]

    everywhere, most = range(len(params)), len(params) * 9 // 10
    same = chosen.sample(everywhere, most)
    before = {"new": lambda: hand_over(chosen.sample(everywhere, most)), "same": lambda: hand_over(same)}
    calls = steps(new=lamb16(params), same=lamb16(params))
    times = timing.side_by_side(calls, device, rounds, before)
    return timing.ratio(times["new"], times["same"])


def size_table(rows: list[Row]) -> str:
    """Rows of :func:`sizes` with the same number of tensors as Markdown."""
    forms = {"numel": "{:,}", "ns_per_param": "{:.2f}", "adamw_ns_per_param": "{:.2f}", "to_adamw": "{:.2f}"}
    cells = [[form.format(row[key]) for key, form in forms.items()] for row in rows]
    return report.table(["elements", "ns per parameter", "AdamW fused, ns per parameter", "ratio"], cells)


def ratio_table(rows: list[Row], key: str, counts: Sequence[int]) -> str:
    """A ratio of the rows of :func:`sizes` as Markdown, by size and by these numbers of tensors."""
    found = {(row["numel"], row["tensors"]): f"{row[key]:.2f}" for row in rows if key in row}
    numels = sorted({row["numel"] for row in rows})
    cells = [[f"{numel:,}", *(found.get((numel, tensors), "left out") for tensors in counts)] for numel in numels]
    return report.table(["elements of each", *(f"{tensors} tensors" for tensors in counts)], cells)


def plot_sizes(rows: list[Row], path: Path) -> None:
    """Nanoseconds per parameter against the size of the one tensor."""
    with report.figure(path, 1) as (axes,):
        for key, label, colour in (
            ("ns_per_param", "Lamb16 compiled", "lamb16"),
            ("adamw_ns_per_param", "AdamW fused", "adamw"),
        ):
            lines = [row["numel"] for row in rows], [row[key] for row in rows]
            axes.plot(*lines, marker="o", markersize=3, label=label, color=report.COLOURS[colour])
        axes.set(xlabel="elements of the tensor", ylabel="ns per parameter", xscale="log", yscale="log")
        axes.legend()
    print(f"\nwrote {path}")


# -- ranks -----------------------------------------------------------------------------------------------------------


def ranks(sets: list[list[Shape]], count: int, dtype: torch.dtype, rounds: int) -> list[Row]:
    """For each set of shapes the step of parameters that FSDP2 splits over processes with one thread each.

    They meet over gloo, on the CPU. No model is run: the gradients are copies of the weights. All begin a step
    together, and it ends when the slowest rank's does.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, (count, folder, sets, dtype, rounds), count)  # type: ignore[no-untyped-call]
        except ProcessException as error:
            raise CommandError(f"a rank failed: {str(error).strip().splitlines()[-1]}") from error
        rows: list[Row] = json.loads(Path(folder, "rows").read_text())
    return rows


def _rank(rank: int, count: int, folder: str, sets: list[list[Shape]], dtype: torch.dtype, rounds: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    rows = [_sharded_row(shapes, dtype, rounds) for shapes in sets]
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def _sharded_row(shapes: list[Shape], dtype: torch.dtype, rounds: int) -> Row:
    model = Chain(shapes, dtype, CPU)
    fully_shard(model)
    params = list(model.parameters())
    for p in params:
        p.grad = p.detach().clone()
    calls = steps(own=lamb16(params), adamw=adamw(params))
    times = timing.side_by_side(calls, CPU, rounds, dict.fromkeys(calls, distributed.barrier))
    for name, seconds in times.items():
        slowest = torch.tensor(seconds, dtype=torch.float64)
        distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
        times[name] = slowest.tolist()
    return compared(times, shapes)
