"""Loss against the learning rate, for Lamb16, LAMB, AdamW and the published rule: how wide the basin is.

Lamb16 and AdamW with less momentum too: the published rule, which loses most of m, has hardly any.

The basin is the range of rates, in decades, that reach a loss within 10 % of the optimizer's own best or of AdamW's.
The three tasks of `moments`, three decades of learning rates around the best, warm-up over a tenth of the steps, a
linear fall.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from lamb16.lab.registry import REGISTRY
from lamb16.lab.study.report import COLOURS, at_an_end, figure, grouped, median, number, table
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import Sizes
from lamb16.lab.study.training import Run, describe, execute

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

OPTIMIZERS = (  # optimizer, β1
    *((name, Run.beta1) for name in ("lamb16", "lamb", "adamw", "published")),
    ("lamb16", 0.5),
    ("adamw", 0.5),
)
ADAMW = ("adamw", Run.beta1)  # what all are compared with
BASIN = 1.1  # the basin is where the loss is at most 10 % above a best one: the optimizer's own, or AdamW's

Pair = tuple[Run, Result]
Optimizer = tuple[str, float]  # one of OPTIMIZERS


def jobs(sizes: Sizes) -> list[Run]:
    """Every optimizer at every rate on every task."""
    return [
        Run(task, name, lr, seed, size.steps, size.batch_size, sizes.dataset, beta1=beta1)
        for task, size in sizes.tasks.items()
        for seed in size.rate_seeds
        for lr in size.rates
        for name, beta1 in OPTIMIZERS
    ]


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def losses(pairs: list[Pair]) -> dict[str, dict[Optimizer, dict[float, float]]]:
    """The median loss by task, optimizer and rate; infinite where half of the seeds diverged."""
    return {
        task: {
            optimizer: {
                lr: median(result["validation_loss"] for _, result in same)
                for lr, same in grouped(own, lambda pair: pair[0].lr).items()
            }
            for optimizer, own in grouped(group, lambda pair: (pair[0].optimizer, pair[0].beta1)).items()
        }
        for task, group in grouped(pairs, lambda pair: pair[0].task).items()
    }


def label(optimizer: Optimizer) -> str:
    """Its name in tables and plots."""
    name, beta1 = optimizer
    return REGISTRY[name].label + ("" if beta1 == Run.beta1 else f", β1 {beta1:g}")


def basin(curve: dict[float, float], limit: float) -> tuple[float, bool]:
    """The decades of learning rate around the minimum in which the loss, linear in log(lr), is below ``limit``.

    Also whether the range that was measured ends inside the basin, so that it is at least as wide.
    """
    points = [(math.log10(lr), loss if math.isfinite(loss) else 1e9) for lr, loss in sorted(curve.items())]
    best = min(range(len(points)), key=lambda k: points[k][1])
    if points[best][1] > limit:
        return 0.0, False
    sides = [_reach(side, limit) for side in (points[best:], points[best::-1])]
    return sum(width for width, _ in sides), any(cut for _, cut in sides)


def _reach(points: list[tuple[float, float]], limit: float) -> tuple[float, bool]:
    """How far from the first point the curve stays below the limit, and whether it does so to the last point."""
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if next_y > limit:
            return abs(x - points[0][0]) + abs(next_x - x) * (limit - y) / (next_y - y), False
    return abs(points[-1][0] - points[0][0]), True


def _width(curve: dict[float, float], limit: float) -> str:
    width, cut = basin(curve, limit)
    return f"{'≥ ' if cut else ''}{width:.2f}"


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """The losses at every rate, and the best loss with the width of the basin, as Markdown."""
    found = losses(pairs)
    summary, by_rate = [], {}
    for task, curves in found.items():
        best = {optimizer: min(curve.values()) for optimizer, curve in curves.items()}
        rates = sorted(next(iter(curves.values())))
        by_rate[f"{task}: loss"] = table(
            ["optimizer", *(f"{lr:.2g}" for lr in rates)],
            [[label(optimizer), *(number(curve[lr]) for lr in rates)] for optimizer, curve in curves.items()],
        )
        for optimizer, curve in curves.items():
            at = min(curve, key=curve.__getitem__)
            to_adamw = f"{100 * (best[optimizer] / best[ADAMW] - 1):+.2f}"
            widths = [_width(curve, BASIN * best[which]) for which in (optimizer, ADAMW)]
            rate = f"{at:.2g}{at_an_end(at, rates)}"
            summary.append([task, label(optimizer), number(best[optimizer], ".5g"), rate, to_adamw, *widths])
    header = ["task", "optimizer", "best loss", "at lr", "to AdamW's best, %"]
    header += ["decades within 10 % of its own best", "of AdamW's best"]
    return {"basin": table(header, summary)} | by_rate


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Loss against learning rate, one panel per task."""
    found = losses(pairs)
    path = folder / "rates.svg"
    with figure(path, len(found)) as axes:
        for panel, (task, curves) in zip(axes, found.items(), strict=True):
            for optimizer, curve in curves.items():
                points = sorted((lr, loss) for lr, loss in curve.items() if math.isfinite(loss))
                style = "o-" if optimizer[1] == Run.beta1 else "o:"
                panel.plot(
                    *zip(*points, strict=True), style, markersize=3, label=label(optimizer), color=COLOURS[optimizer[0]]
                )
            least = min(min(curve.values()) for curve in curves.values())
            panel.set(title=task, xscale="log", xlabel="learning rate", ylim=(0.98 * least, 1.5 * least))
        axes[0].set_ylabel("validation loss")
        axes[0].legend(fontsize=7)
    return [path]
