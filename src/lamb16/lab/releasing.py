"""`lamb16 bench --release`: what optimizing costs in a training step, with gradients released and without.

The model is that of `--memory`. The cost is the time of a training step less that of the backward pass alone in the
same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lamb16 import Lamb16, release_gradients
from lamb16.lab import timing
from lamb16.lab.memory import COMMON, Chain
from lamb16.lab.shapes import Shape
from lamb16.lab.study import report
from lamb16.lab.timing import Row

ALONE, ORDINARY, RELEASED, EACH = (
    "backward pass alone", "one step for all", "gradients released", "an optimizer per parameter, in hooks",
)  # fmt: skip


def measure(shapes: list[Shape], dtype: torch.dtype, device: torch.device, rounds: int) -> list[Row]:
    """Median milliseconds that optimizing adds to a backward pass, and the median of the ratios to one step for all."""
    calls = {name: _training_step(name, Chain(shapes, dtype, device)) for name in (ALONE, ORDINARY, RELEASED, EACH)}
    times = timing.side_by_side(calls, device, rounds)
    costs = {name: [a - b for a, b in zip(own, times[ALONE], strict=True)] for name, own in times.items()}
    return [
        {
            "name": name,
            "cost_s": statistics.median(costs[name]),
            "to_ordinary": timing.ratio(costs[name], costs[ORDINARY]),
        }
        for name in (ORDINARY, RELEASED, EACH)
    ]


def _training_step(name: str, model: Chain) -> Callable[[], Any]:
    params = list(model.parameters())
    x = torch.ones(1, dtype=params[0].dtype, device=params[0].device)
    if name == EACH:
        for k, p in enumerate(params):
            hook = _stepped_by(Lamb16([(str(k), p)], **COMMON))
            p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    optimizer = Lamb16(list(model.named_parameters()), **COMMON)
    if name == RELEASED:
        release_gradients(model, optimizer)

    def run() -> None:
        model(x).backward()
        if name in (ORDINARY, RELEASED):
            optimizer.step()
        if name in (ORDINARY, ALONE):
            model.zero_grad()

    return run


def _stepped_by(optimizer: Lamb16) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        optimizer.step()
        p.grad = None

    return hook


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    cells = [[row["name"], f"{row['cost_s'] * 1e3:.2f} ms", f"{row['to_ordinary']:.2f}"] for row in rows]
    return report.table(["", "beyond the backward pass, median", "to one step for all"], cells)
