"""The published demonstration, with this project's, torch's and other low-bit optimizers.

The two-layer CNN on MNIST, batch 1024 / lr 0.02 / 10 epochs and batch 128 / lr 0.01 / 5 epochs, weight decay 0.01, with
a constant and with a linearly falling learning rate. Every optimizer gets the same hyperparameters, as in the
demonstration; Adam's kind, whose usual rates are a tenth of these and less, with two seeds only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lamb16.lab import bench, contenders, timing
from lamb16.lab.contenders import CONTENDERS, label
from lamb16.lab.model import TwoLayerCNN
from lamb16.lab.study import mnist
from lamb16.lab.study.mnist import MnistRun, describe, execute
from lamb16.lab.study.report import COLOURS, band, figure, grouped, median, table
from lamb16.lab.study.runs import Result, Results, code_of, digest
from lamb16.lab.study.sizes import Sizes

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

OPTIMIZERS: tuple[tuple[str, bool], ...] = (  # and whether with caution
    ("lamb16", False), ("lamb16", True), ("lamb", False), ("lamb-timm-cautious", False), ("published", False),
    ("adamw", False), ("nadam", False), ("adamw8bit-bnb", False),
)  # fmt: skip
ADAMS, ADAM_SEEDS = ("adamw", "nadam", "adamw8bit-bnb"), 2
SCHEDULES = ("constant", "linear")
STEP = ("blocks", "floats", "update")  # what the times follow from, beside the optimizers' own

Pair = tuple[MnistRun, Result]


def jobs(sizes: Sizes) -> list[MnistRun]:
    """All runs of the optimizers that work here; seeds outermost, so that an interrupted study has whole seeds."""
    return [
        MnistRun(name, sizes.dataset, batch, lr, epochs, schedule, seed, quick=sizes.quick, caution=caution)
        for seed in sizes.published_seeds
        for batch, lr, epochs in sizes.published
        for name, caution in OPTIMIZERS
        for schedule in SCHEDULES
        if contenders.why_unusable(name) is None and (name not in ADAMS or seed <= ADAM_SEEDS)
    ]


def prepare(results: Results, sizes: Sizes) -> None:
    """Measure step times, unless the file holds them, and note why an optimizer does not work here."""
    names = list(dict(OPTIMIZERS))
    reasons = {name: contenders.why_unusable(name) for name in names}
    results.extra["unusable"] = {name: reason for name, reason in reasons.items() if reason is not None}
    usable = [name for name in names if reasons[name] is None]
    timed: dict[str, Any] = {"rounds": sizes.timed_rounds, "threads": torch.get_num_threads()}
    timed["codes"] = {name: code_of(name) for name in usable}
    timed["update"] = [digest(f"lamb16.step.{name}") for name in STEP]
    if results.extra.get("timed") != timed:
        shapes = [tuple(p.shape) for p in TwoLayerCNN().parameters()]
        rivals = {CONTENDERS[name].label: _factory(name, sizes.quick) for name in usable}
        rows = bench.measure(shapes, torch.float32, torch.device("cpu"), sizes.timed_rounds, rivals)
        results.extra["step_times"] = [row for row in rows if row["name"] != bench.COPY]
        results.extra["timed"] = timed
    results.save()


def _factory(name: str, eager: bool) -> timing.Factory:
    def build(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        named = [(str(i), p) for i, p in enumerate(params)]
        return contenders.build(name, named, lr=1e-4, weight_decay=0.01, compile=not eager)

    return build


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Accuracies and losses, and step times with state sizes, as Markdown."""
    rows = []
    for (batch, lr, schedule, *rival), group in sorted(grouped(pairs, _setting).items(), key=_order):
        figures = mnist.figures([result for _, result in group])
        rows.append([f"{batch}, {lr:g}, {schedule}", label(*rival), *figures])
    found = {"accuracy": table(["batch, lr, schedule", "optimizer", *mnist.FIGURES], rows)}
    if "step_times" in extra:
        own = sum(p.numel() for p in TwoLayerCNN().parameters())
        timed = [
            [row["name"], f"{row['median_s'] * 1e3:.2f}", f"{row['to_adamw']:.1f}", f"{row['state_bytes'] / own:.2f}"]
            for row in extra["step_times"]
        ]
        header = [
            "optimizer",
            f"step, ms ({extra['timed']['threads']} threads)",
            "to AdamW fused",
            "state bytes per parameter",
        ]
        found["step time"] = table(header, timed)
        if extra["unusable"]:
            missing = [[CONTENDERS[name].label, reason] for name, reason in extra["unusable"].items()]
            found["not run"] = table(["optimizer", "why it could not be run"], missing)
    return found


def _setting(pair: Pair) -> tuple[int, float, str, str, bool]:
    run = pair[0]
    return run.batch_size, run.lr, run.schedule, run.optimizer, run.caution


def _order(item: tuple[tuple[int, float, str, str, bool], list[Pair]]) -> tuple[int, str, int]:
    """Large batches first, then by schedule, then in the order in which the optimizers are listed."""
    (batch, _, schedule, *rival), _ = item
    return -batch, schedule, OPTIMIZERS.index((rival[0], rival[1]))


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """One line an optimizer: training loss and test accuracy by epoch, a column a setting."""
    settings = grouped(pairs, lambda pair: _setting(pair)[:3])
    path = folder / "published.svg"
    with figure(path, len(settings), 2) as axes:
        for column, ((batch, lr, schedule), group) in enumerate(settings.items()):
            upper, lower = axes[column], axes[column + len(settings)]
            for rival, own in grouped(group, lambda pair: _setting(pair)[3:]).items():
                results = [result for _, result in own]
                epochs = range(1, own[0][0].epochs + 1)
                text, colour = label(*rival), None if rival[1] else COLOURS[rival[0]]
                band(upper, epochs, [r["train_losses"] for r in results], text, colour)
                band(lower, epochs, [[100 * a for a in r["accuracies"]] for r in results], text, colour)
            upper.set(title=f"batch {batch}, lr {lr:g}, {schedule}", yscale="log", ylabel="training loss")
            best = max(median(100 * r["best_accuracy"] for _, r in own) for own in _by_optimizer(group))
            lower.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(max(0.0, best - 2.5), min(100.0, best + 0.3)))
        max(axes, key=lambda panel: len(panel.get_lines())).legend(fontsize=6)  # where every optimizer has a line
    return [path]


def _by_optimizer(group: list[Pair]) -> list[list[Pair]]:
    return list(grouped(group, lambda pair: _setting(pair)[3:]).values())
