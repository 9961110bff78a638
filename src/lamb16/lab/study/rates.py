"""Loss against the learning rate: every optimizer at its own best rate, and how wide the basin around it is.

The three tasks of `moments`, two and a half decades of learning rates, up to two rates more beyond an end that is best,
warm-up over a tenth of the steps, a linear fall. The two best rates are run with more seeds, most where a claim is
made; the better of them is the optimizer's best. The basin is the range of rates, in decades, that reach a loss within
10 % of the optimizer's own best or of the best of AdamW and NAdam. These and Lamb16 are also run with biases and norms
in a parameter group of their own: without weight decay and, of Lamb16, without trust ratio.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lamb16.lab import registry
from lamb16.lab.study.report import (
    COLOURS,
    at_an_end,
    beyond,
    difference,
    figure,
    grouped,
    loss_of,
    median,
    median_and_range,
    not_run,
    number,
    table,
)
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import Sizes
from lamb16.lab.study.training import Run, describe, execute

__all__ = ["describe", "execute", "jobs", "more", "plots", "prepare", "tables"]


class Optimizer(NamedTuple):
    """What is compared, by name; ``apart``: with a parameter group for biases and norms (see `training.Run`)."""

    name: str
    caution: bool = False
    apart: bool = False


ADAMS = (  # the best of which all are compared with
    Optimizer("adamw"), Optimizer("adamw", apart=True), Optimizer("nadam"), Optimizer("nadam", apart=True),
)  # fmt: skip
CLAIMED = (Optimizer("lamb16"), Optimizer("lamb16", apart=True), *ADAMS)  # what claims are made of
OPTIMIZERS = (
    CLAIMED[0], Optimizer("lamb16", caution=True), CLAIMED[1], Optimizer("lamb"), Optimizer("lamb-timm-cautious"),
    *ADAMS, Optimizer("adamw8bit-bnb"), Optimizer("published"),
)  # fmt: skip
BASIN = 1.1  # the basin is where the loss is at most 10 % above a best one: the optimizer's own, or the Adams'

Pair = tuple[Run, Result]


def jobs(sizes: Sizes) -> list[Run]:
    """Every optimizer at every rate on every task."""
    return [
        Run(task, name, lr, seed, size.steps, size.batch_size, sizes.dataset, caution=caution, apart=apart)
        for task, size in sizes.tasks.items()
        for seed in size.rate_seeds
        for lr in size.rates
        for name, caution, apart in OPTIMIZERS
        if registry.why_unusable(name) is None
    ]


def more(pairs: list[Pair], sizes: Sizes) -> list[Run]:
    """A rate beyond an end that is best; the two best of each optimizer with the other seeds, until they stay best."""
    found = []
    for task, curves in losses(pairs).items():
        for optimizer, curve in curves.items():
            seeds = sizes.tasks[task].best_seeds if optimizer in CLAIMED else sizes.seeds
            run = next(run for run, _ in pairs if run.task == task and optimizer_of(run) == optimizer)
            best = sorted(curve, key=curve.__getitem__)[:2]
            found += [replace(run, lr=lr, seed=seed) for lr in best for seed in seeds]
            if lr := beyond(best[0], list(curve), len(sizes.tasks[task].rates) + sizes.beyond):
                found += [replace(run, lr=lr, seed=seed) for seed in sizes.tasks[task].rate_seeds]
    return found


def prepare(results: Results, sizes: Sizes) -> None:
    """Note why an optimizer does not work here."""
    results.extra["unusable"] = registry.unusable(optimizer.name for optimizer in OPTIMIZERS)
    results.save()


def optimizer_of(run: Run) -> Optimizer:
    """The optimizer of a run."""
    return Optimizer(run.optimizer, run.caution, run.apart)


def by_rate(pairs: list[Pair]) -> dict[str, dict[Optimizer, dict[float, list[float | None]]]]:
    """The losses of the seeds by task, optimizer and rate; None where the training diverged."""
    return {
        task: {
            optimizer: {
                lr: [result["validation_loss"] for _, result in sorted(same, key=lambda pair: pair[0].seed)]
                for lr, same in grouped(own, lambda pair: pair[0].lr).items()
            }
            for optimizer, own in grouped(group, lambda pair: optimizer_of(pair[0])).items()
        }
        for task, group in grouped(pairs, lambda pair: pair[0].task).items()
    }


def losses(pairs: list[Pair]) -> dict[str, dict[Optimizer, dict[float, float]]]:
    """The median loss by task, optimizer and rate; infinite where half of the seeds diverged."""
    return {
        task: {optimizer: {lr: median(seeds) for lr, seeds in curve.items()} for optimizer, curve in curves.items()}
        for task, curves in by_rate(pairs).items()
    }


def best_rate(curve: dict[float, list[float | None]]) -> float:
    """The rate with the lowest median loss, of those with the most seeds."""
    most = max(map(len, curve.values()))
    return min((lr for lr, seeds in curve.items() if len(seeds) == most), key=lambda lr: median(curve[lr]))


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
    """The best loss with the width of the basin, both in short, and the losses at every rate, as Markdown."""
    medians, seeds = losses(pairs), by_rate(pairs)
    summary, found = [], {}
    short: dict[str, list[str]] = {}
    for task, curves in medians.items():
        best = {optimizer: best_rate(seeds[task][optimizer]) for optimizer in curves}
        adam = min(
            (optimizer for optimizer in ADAMS if optimizer in curves),
            key=lambda optimizer: curves[optimizer][best[optimizer]],
        )
        least = curves[adam][best[adam]]
        rates = sorted({lr for curve in curves.values() for lr in curve})
        found[f"{task}: loss"] = table(
            ["optimizer", *(f"{lr:.2g}" for lr in rates)],
            [
                [registry.label(*optimizer), *(number(curve[lr]) if lr in curve else "" for lr in rates)]
                for optimizer, curve in curves.items()
            ],
        )
        for optimizer, curve in curves.items():
            at = best[optimizer]
            own = curve[at]
            widths = [_width(curve, BASIN * limit) for limit in (own, least)]
            rate, to_least = f"{at:.2g}{at_an_end(at, list(curve))}", 100 * (own / least - 1)
            losses_of = [[*map(loss_of, seeds[task][key][best[key]])] for key in (optimizer, adam)]
            both = min(map(len, losses_of))  # seeds, which are the first of all
            by_seed = difference(losses_of[0][:both], losses_of[1][:both], ".2f")
            shown = median_and_range(seeds[task][optimizer][at])
            name = registry.label(*optimizer)
            summary.append([task, name, shown, rate, f"{to_least:+.2f}", by_seed, *widths])
            short.setdefault(name, [name]).extend([f"{to_least:+.1f}", widths[1]])
    header = ["task", "optimizer", "best loss (seeds)", "at lr", "to the best of AdamW and NAdam, %", "seed by seed, %"]
    header += ["decades within 10 % of its own best", "of AdamW's or NAdam's"]
    found |= not_run(extra.get("unusable", {}))
    columns = [text for task in medians for text in (f"{task}: loss, %", "decades")]
    return {"basin": table(header, summary), "in short": table(["optimizer", *columns], short.values())} | found


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Loss against learning rate, one panel per task."""
    found = losses(pairs)
    path = folder / "rates.svg"
    with figure(path, len(found)) as axes:
        for panel, (task, curves) in zip(axes, found.items(), strict=True):
            for optimizer, curve in curves.items():
                points = sorted((lr, loss) for lr, loss in curve.items() if math.isfinite(loss))
                style = "o:" if optimizer.caution else "o--" if optimizer.apart else "o-"
                panel.plot(
                    *zip(*points, strict=True),
                    style,
                    markersize=3,
                    label=registry.label(*optimizer),
                    color=COLOURS[optimizer.name],
                )
            least = min(min(curve.values()) for curve in curves.values())
            panel.set(title=task, xscale="log", xlabel="learning rate", ylim=(0.98 * least, 1.5 * least))
        axes[0].set_ylabel("validation loss")
        axes[0].legend(fontsize=6)
    return [path]
