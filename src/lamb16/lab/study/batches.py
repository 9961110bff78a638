"""Batch sizes from 64 to 8,192: images at a fixed number of epochs, and words at a fixed number of them.

The published network on MNIST, and the language model of `rates`, whose batches are counted in words. The learning rate
grows with the square root of the batch size from each optimizer's own, as in the LAMB paper, and falls linearly; AdamW
is tuned: it takes the best of three rates at every size, half a decade apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamb16.lab.registry import REGISTRY
from lamb16.lab.study import mnist, training
from lamb16.lab.study.mnist import MnistRun
from lamb16.lab.study.report import COLOURS, figure, grouped, loss_of, number, table
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import HALF_DECADE, Sizes
from lamb16.lab.study.tasks import CONTEXT
from lamb16.lab.study.training import Run

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

FACTORS = {
    "lamb16": (1.0,),
    "lamb": (1.0,),
    "adamw": (1 / HALF_DECADE, 1.0, HALF_DECADE),
}  # of the rate that the rule gives
IMAGES, WORDS = 128, 768  # the batch sizes from which the rule starts
WORD_RATES = {"lamb16": 10**-2, "lamb": 10**-2, "adamw": 10**-2.5}  # the best of `rates`

Pair = tuple[Any, Result]  # of a MnistRun or of a Run


def jobs(sizes: Sizes) -> list[Any]:
    """Every optimizer at every batch size on both tasks."""
    images = [
        MnistRun(
            name, sizes.dataset, batch, rate(name, batch) * factor, sizes.batch_epochs, "linear", 1, quick=sizes.quick
        )
        for batch in sizes.batch_sizes
        for name, factors in FACTORS.items()
        for factor in factors
    ]
    words = [
        Run(
            "lm", name, WORD_RATES[name] * (size / WORDS) ** 0.5 * factor, 1, sizes.batch_words // size, size // CONTEXT
        )
        for size in sizes.word_sizes
        for name, factors in FACTORS.items()
        for factor in factors
    ]
    return [*images, *words]


def rate(optimizer: str, batch: int) -> float:
    """The learning rate for so many images."""
    return float(REGISTRY[optimizer].default_lr * (batch / IMAGES) ** 0.5)


def describe(job: Any) -> str:
    """The settings in a few words."""
    return mnist.describe(job) if isinstance(job, MnistRun) else training.describe(job)


def execute(job: Any, folder: str | None) -> Result:
    """Train once."""
    return mnist.execute(job, folder) if isinstance(job, MnistRun) else training.execute(job, folder)


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def _best(pairs: list[Pair], size: Any, worse: Any) -> dict[str, dict[int, Pair]]:
    """The pair with the best of an optimizer's rates by its name and size."""
    return {
        name: {key: min(same, key=lambda pair: worse(pair[1])) for key, same in grouped(own, size).items()}
        for name, own in grouped(pairs, lambda pair: pair[0].optimizer).items()
    }


def _images(pairs: list[Pair]) -> dict[str, dict[int, Pair]]:
    own = [pair for pair in pairs if isinstance(pair[0], MnistRun)]
    return _best(own, lambda pair: pair[0].batch_size, lambda result: -result["best_accuracy"])


def _words(pairs: list[Pair]) -> dict[str, dict[int, Pair]]:
    own = [pair for pair in pairs if isinstance(pair[0], Run)]
    return _best(own, lambda pair: pair[0].batch_size * CONTEXT, lambda result: loss_of(result["validation_loss"]))


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Best test accuracy and final training loss by images, validation loss by words, as Markdown."""
    images, words = _images(pairs), _words(pairs)
    return {
        "words": _table(words, "validation_loss", ".4g"),
        "images": _table(images, "best_accuracy", ".2%"),
        "training loss of the images, at the rate of the best accuracy": _table(images, "train_loss", ".2g"),
    }


def _table(best: dict[str, dict[int, Pair]], key: str, form: str) -> str:
    rows = [[_label(name), *(number(result[key], form) for _, result in own.values())] for name, own in best.items()]
    return table(["optimizer", *map(str, next(iter(best.values())))], rows)


def _label(name: str) -> str:
    return REGISTRY[name].label + (", tuned" if len(FACTORS[name]) > 1 else "")


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Test accuracy and validation loss against batch size."""
    path = folder / "batches.svg"
    with figure(path, 2) as (left, right):
        for name, found in _images(pairs).items():
            points = [(size, 100 * result["best_accuracy"]) for size, (_, result) in found.items()]
            left.plot(*zip(*points, strict=True), "o-", markersize=3, label=_label(name), color=COLOURS[name])
        for name, found in _words(pairs).items():
            points = [(size, result["validation_loss"]) for size, (_, result) in found.items()]
            right.plot(*zip(*points, strict=True), "o-", markersize=3, label=_label(name), color=COLOURS[name])
        left.set(xscale="log", xlabel="images per step", ylabel="best test accuracy, %")
        right.set(xscale="log", xlabel="words per step", ylabel="validation loss")
        left.legend(fontsize=7)
    return [path]
