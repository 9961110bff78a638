"""Why Lamb16's final training loss is not the lowest everywhere in `published`: the same runs with one thing changed.

Under the linearly falling learning rate: one that makes up for the trust ratio's growth as it falls, and one twice as
large. Under the constant one: no momentum, since the published rule, which loses most of m, has hardly any, and a
rate half as large.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamb16.lab.study import mnist
from lamb16.lab.study.mnist import MnistRun, describe, execute
from lamb16.lab.study.report import band, figure, grouped, table
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import Sizes

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

CHANGES = (  # schedule, β1, factor of the learning rate
    ("linear-step", MnistRun.beta1, 1.0),
    ("linear", MnistRun.beta1, 2.0),
    ("constant", 0.0, 1.0),
    ("constant", MnistRun.beta1, 0.5),
)

Pair = tuple[MnistRun, Result]


def jobs(sizes: Sizes) -> list[MnistRun]:
    """Every change in both settings; seeds outermost, so that an interrupted study has whole seeds."""
    return [
        MnistRun("lamb16", sizes.dataset, batch, lr * factor, epochs, schedule, seed, beta1=beta1, quick=sizes.quick)
        for seed in sizes.reasons_seeds
        for batch, lr, epochs in sizes.published
        for schedule, beta1, factor in CHANGES
    ]


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Accuracies and losses as in `published`, as Markdown."""
    rows = []
    for (batch, lr, schedule, beta1), group in grouped(pairs, _setting).items():
        figures = mnist.figures([result for _, result in group])
        rows.append([f"{batch}, {lr:g}, {schedule}", f"{beta1:g}", *figures])
    header = ["batch, lr, schedule", "β1", *mnist.FIGURES]
    return {"accuracy": table(header, rows)}


def _setting(pair: Pair) -> tuple[int, float, str, float]:
    run = pair[0]
    return run.batch_size, run.lr, run.schedule, run.beta1


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Training loss by epoch, one panel per setting."""
    settings = grouped(pairs, lambda pair: pair[0].batch_size)
    path = folder / "reasons.svg"
    with figure(path, len(settings)) as axes:
        for panel, (batch, group) in zip(axes, settings.items(), strict=True):
            for (_, lr, schedule, beta1), own in grouped(group, _setting).items():
                losses = [result["train_losses"] for _, result in own]
                band(panel, range(1, own[0][0].epochs + 1), losses, f"{schedule}, lr {lr:g}, β1 {beta1:g}", None)
            panel.set(title=f"batch {batch}", xlabel="epoch", yscale="log")
            panel.legend(fontsize=7)
        axes[0].set_ylabel("training loss")
    return [path]
