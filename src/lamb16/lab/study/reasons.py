"""Why Lamb16's final training loss is not the lowest everywhere in `published`: the same runs with one thing changed.

The two settings in which it is not, and the options that could change it: how strongly the trust ratio counters the
learning rate, the momentum, caution, and the rate itself. What helps in one must not hurt in the other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lamb16.lab.study import mnist
from lamb16.lab.study.mnist import OPTIONS, MnistRun, describe, execute
from lamb16.lab.study.report import band, figure, grouped, table
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import Sizes

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

SCHEDULES = ("linear", "constant")  # of the first and the second batch size of `published`
CHANGES: tuple[tuple[float, dict[str, Any]], ...] = (  # factor of the learning rate, options
    (1.0, {}), (0.5, {}), (2.0, {}), (1.0, {"trust_scale": 0.25}), (1.0, {"trust_scale": 0.5}), (1.0, {"beta1": 0.8}),
    (1.0, {"caution": True}),
)  # fmt: skip

Pair = tuple[MnistRun, Result]


def jobs(sizes: Sizes) -> list[MnistRun]:
    """Every change in both settings; seeds outermost, so that an interrupted study has whole seeds."""
    return [
        replace(
            MnistRun("lamb16", sizes.dataset, batch, lr * factor, epochs, schedule, seed, quick=sizes.quick), **options
        )
        for seed in sizes.reasons_seeds
        for (batch, lr, epochs), schedule in zip(sizes.published, SCHEDULES, strict=False)
        for factor, options in CHANGES
    ]


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Accuracies and losses as in `published`, as Markdown."""
    rows = []
    for (batch, lr, schedule, change), group in grouped(pairs, _setting).items():
        figures = mnist.figures([result for _, result in group])
        rows.append([f"{batch}, {lr:g}, {schedule}", change, *figures])
    header = ["batch, lr, schedule", "changed", *mnist.FIGURES]
    return {"accuracy": table(header, rows)}


def _setting(pair: Pair) -> tuple[int, float, str, str]:
    run = pair[0]
    changed = {key: getattr(run, key) for key in OPTIONS if getattr(run, key) != getattr(MnistRun, key)}
    text = ", ".join(f"{key} {value}" for key, value in changed.items())
    return run.batch_size, run.lr, run.schedule, text.replace("beta1", "β1").replace("caution True", "caution")


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Training loss by epoch, one panel per setting."""
    settings = grouped(pairs, lambda pair: pair[0].batch_size)
    path = folder / "reasons.svg"
    with figure(path, len(settings)) as axes:
        for panel, (batch, group) in zip(axes, settings.items(), strict=True):
            for (_, lr, _, change), own in grouped(group, _setting).items():
                losses = [result["train_losses"] for _, result in own]
                band(panel, range(1, own[0][0].epochs + 1), losses, f"lr {lr:g} {change}", None)
            panel.set(title=f"batch {batch}, {group[0][0].schedule}", xlabel="epoch", yscale="log")
            panel.legend(fontsize=6)
        axes[0].set_ylabel("training loss")
    return [path]
