"""The published demonstration, with this project's, torch's and other low-bit optimizers.

The two-layer CNN on MNIST, batch 1024 / lr 0.02 / 10 epochs and batch 128 / lr 0.01 / 5 epochs, weight decay 0.01, with
a constant and with a linearly falling learning rate. Every optimizer gets the same hyperparameters, as in the
demonstration, but for Adam's kind, whose usual rates are a tenth of these: they get a tenth, AdamW the same too. All
seeds are for what claims are made of: Lamb16, and LAMB and the published rule where they are near it. Then Lamb16 with
one option changed, in two settings of which one asks for larger and one for smaller steps: what helps in one must not
hurt in the other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lamb16.lab import bench, registry, timing
from lamb16.lab.model import TwoLayerCNN
from lamb16.lab.registry import REGISTRY
from lamb16.lab.study import mnist
from lamb16.lab.study.mnist import MnistRun, describe, execute
from lamb16.lab.study.report import COLOURS, band, figure, grouped, median, not_run, table
from lamb16.lab.study.runs import Result, Results, code_of, digest
from lamb16.lab.study.sizes import Sizes

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

TENTH = 0.1
SCHEDULES = ("constant", "linear")
OPTIMIZERS: tuple[tuple[str, float, tuple[str, ...]], ...] = (  # factor of the learning rate, schedules with all seeds
    ("lamb16", 1.0, SCHEDULES), ("lamb", 1.0, ("linear",)), ("published", 1.0, ("constant",)),
    ("lamb-timm-cautious", 1.0, ()), ("adamw", 1.0, ()), ("adamw", TENTH, ()), ("nadam", TENTH, ()),
    ("adamw8bit-bnb", TENTH, ()),
)  # fmt: skip
CHANGES: tuple[dict[str, Any], ...] = (
    {"trust_scale": 0.25}, {"trust_scale": 0.5}, {"trust_clip": 1.0}, {"beta1": 0.8}, {"caution": True},
)  # fmt: skip
CHANGED = ("linear", "constant")  # the schedules in which they are tried, of the first and the second batch size
STEP = ("blocks", "factors", "floats", "update")  # what the times follow from, beside the optimizers' own

Pair = tuple[MnistRun, Result]


def jobs(sizes: Sizes) -> list[MnistRun]:
    """All runs of the optimizers that work here; seeds outermost, so that an interrupted study has whole seeds."""
    return [
        replace(run, seed=seed)
        for k, seed in enumerate(sizes.published_seeds)
        for run, all_seeds in _settings(sizes)
        if all_seeds or k < sizes.fewer_seeds
    ]


def _settings(sizes: Sizes) -> list[tuple[MnistRun, bool]]:
    """A run of everything that is compared, and whether it gets all seeds."""
    found = [
        (MnistRun(name, sizes.dataset, batch, lr * factor, epochs, schedule, 0, quick=sizes.quick), schedule in near)
        for batch, lr, epochs in sizes.published
        for name, factor, near in OPTIMIZERS
        for schedule in SCHEDULES
        if registry.why_unusable(name) is None
    ]
    for (batch, lr, epochs), schedule in zip(sizes.published, CHANGED, strict=False):
        run = MnistRun("lamb16", sizes.dataset, batch, lr, epochs, schedule, 0, quick=sizes.quick)
        found += [(replace(run, **options), False) for options in CHANGES]
    return found


def prepare(results: Results, sizes: Sizes) -> None:
    """Measure step times, unless the file holds them, and note why an optimizer does not work here."""
    names = list(dict.fromkeys(name for name, *_ in OPTIMIZERS))
    results.extra["unusable"] = registry.unusable(names)
    usable = [name for name in names if name not in results.extra["unusable"]]
    timed: dict[str, Any] = {"rounds": sizes.timed_rounds, "threads": torch.get_num_threads()}
    timed["codes"] = {name: code_of(name) for name in usable}
    timed["update"] = [digest(f"lamb16.step.{name}") for name in STEP]
    if results.extra.get("timed") != timed:
        shapes = [tuple(p.shape) for p in TwoLayerCNN().parameters()]
        factories = {REGISTRY[name].label: _factory(name, sizes.quick) for name in usable}
        rows = bench.measure(shapes, torch.float32, torch.device("cpu"), sizes.timed_rounds, factories)
        results.extra["step_times"] = [row for row in rows if row["name"] != bench.COPY]
        results.extra["timed"] = timed
    results.save()


def _factory(name: str, eager: bool) -> timing.Factory:
    def build(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        named = [(str(i), p) for i, p in enumerate(params)]
        return registry.build(name, named, lr=1e-4, weight_decay=0.01, compile=not eager)

    return build


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Accuracies and losses, and step times with state sizes, as Markdown."""
    found = {"in short": _in_short(pairs)}
    for (batch, schedule), group in _by_setting(pairs).items():
        rows = [[what, *mnist.figures([result for _, result in own])] for what, own in grouped(group, _what).items()]
        found[f"batch {batch}, {schedule}"] = table(["optimizer", *mnist.FIGURES], rows)
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
        found |= not_run(extra["unusable"])
    return found


def _in_short(pairs: list[Pair]) -> str:
    """Of every setting the median best accuracy, then the training loss at the end, in one row per optimizer."""
    cells: dict[str, dict[tuple[int, str], str]] = {}
    for setting, group in _by_setting(pairs).items():
        rate = max(run.lr for run, _ in group)
        for what, own in grouped(group, lambda pair: _name(pair[0])).items():
            for lr, same in grouped(own, lambda pair: pair[0].lr).items():
                name = what if lr == rate else f"{what}, a tenth of the rate"
                accuracy, _, loss, _ = mnist.figures([result for _, result in same])
                cells.setdefault(name, {})[setting] = f"{accuracy.split()[0]} %, {loss}"
    settings = list(_by_setting(pairs))
    rows = [[name, *(own.get(setting, "") for setting in settings)] for name, own in cells.items()]
    return table(["optimizer", *(f"batch {batch}, {schedule}" for batch, schedule in settings)], rows)


def _by_setting(pairs: list[Pair]) -> dict[tuple[int, str], list[Pair]]:
    return grouped(pairs, lambda pair: (pair[0].batch_size, pair[0].schedule))


def _what(pair: Pair) -> str:
    """The optimizer, what was changed of Lamb16, and the learning rate."""
    return f"{_name(pair[0])}, lr {pair[0].lr:g}"


def _name(run: MnistRun) -> str:
    options = [f"{name} {value}" for name, value in mnist.changed(run).items()]
    text = ", ".join([REGISTRY[run.optimizer].label, *options])
    return text.replace("beta1", "β1").replace("caution True", "caution")


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Training loss and test accuracy by epoch, a column per setting and a line per optimizer."""
    settings = _by_setting([pair for pair in pairs if not mnist.changed(pair[0])])
    path = folder / "published.svg"
    with figure(path, len(settings), 2) as axes:
        for column, ((batch, schedule), group) in enumerate(settings.items()):
            upper, lower = axes[column], axes[column + len(settings)]
            lines = grouped(group, _what)
            for text, own in lines.items():
                results = [result for _, result in own]
                epochs, style = range(1, own[0][0].epochs + 1), {"label": text, "colour": COLOURS[own[0][0].optimizer]}
                band(upper, epochs, [r["train_losses"] for r in results], **style)
                band(lower, epochs, [[100 * a for a in r["accuracies"]] for r in results], **style)
            upper.set(title=f"batch {batch}, {schedule}", yscale="log", ylabel="training loss")
            best = max(median(100 * r["best_accuracy"] for _, r in own) for own in lines.values())
            lower.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(max(0.0, best - 2.5), min(100.0, best + 0.3)))
        axes[0].legend(fontsize=6)
    return [path]
