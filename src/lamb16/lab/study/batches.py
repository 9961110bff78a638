"""Batch sizes from 64 to 8,192 at a fixed number of epochs: the two-layer CNN on MNIST.

The learning rate grows with the square root of the batch size from each optimizer's own at 128, as in the LAMB paper,
and falls linearly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamb16.lab.registry import REGISTRY
from lamb16.lab.study.mnist import MnistRun, describe, execute
from lamb16.lab.study.report import COLOURS, figure, grouped, number, table
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import Sizes

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

OPTIMIZERS = ("lamb16", "lamb", "adamw")
BASE = 128

Pair = tuple[MnistRun, Result]


def jobs(sizes: Sizes) -> list[MnistRun]:
    """One run for each optimizer and batch size."""
    return [
        MnistRun(name, sizes.dataset, batch, rate(name, batch), sizes.batch_epochs, "linear", 1, quick=sizes.quick)
        for batch in sizes.batch_sizes
        for name in OPTIMIZERS
    ]


def rate(optimizer: str, batch: int) -> float:
    """The learning rate at a batch size."""
    return float(REGISTRY[optimizer].default_lr * (batch / BASE) ** 0.5)


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Best test accuracy and final training loss by batch size, as Markdown."""
    sizes = sorted({run.batch_size for run, _ in pairs})
    rows = []
    for name, group in grouped(pairs, lambda pair: pair[0].optimizer).items():
        results = {run.batch_size: result for run, result in group}
        for figure_name, form in (("best_accuracy", ".2%"), ("train_loss", ".2g")):
            label = "best test accuracy" if figure_name == "best_accuracy" else "training loss, last epoch"
            values = [number(results[size][figure_name], form) for size in sizes]
            rows.append([REGISTRY[name].label, label, *values])
    return {"batch size": table(["optimizer", "", *map(str, sizes)], rows)}


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Test accuracy against batch size."""
    path = folder / "batches.svg"
    with figure(path, 1) as (axes,):
        for name, group in grouped(pairs, lambda pair: pair[0].optimizer).items():
            points = sorted((run.batch_size, 100 * result["best_accuracy"]) for run, result in group)
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=REGISTRY[name].label, color=COLOURS[name])
        axes.set(xscale="log", xlabel="batch size", ylabel="best test accuracy, %")
        axes.legend(fontsize=7)
    return [path]
