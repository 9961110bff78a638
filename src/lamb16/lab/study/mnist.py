"""Trainings of the published demonstration's network, as `lamb16 train` makes them: one job per run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamb16.lab.data import ImageData, load
from lamb16.lab.study.report import median_and_range
from lamb16.lab.study.runs import Result
from lamb16.lab.training import TrainConfig, train

QUICK_TRAIN, QUICK_TEST = 600, 300  # images
OPTIONS = ("beta1", "caution", "trust_scale", "trust_clip")
FIGURES = ("best epoch, %", "last epoch, %", "training loss, last epoch", "seeds")


@dataclass(frozen=True)
class MnistRun:
    """The settings of one training; ``quick`` takes the first 600 training and 300 test images."""

    optimizer: str
    dataset: str
    batch_size: int
    lr: float
    epochs: int
    schedule: str
    seed: int
    beta1: float = 0.9
    weight_decay: float = 0.01
    quick: bool = False
    caution: bool = False
    trust_scale: float | None = None
    trust_clip: float | None = None


def describe(job: MnistRun) -> str:
    """The settings in a few words."""
    more = "".join(f" {key} {value}" for key, value in changed(job).items())
    return f"{job.optimizer} batch {job.batch_size} lr {job.lr:g} {job.schedule}{more} seed {job.seed}"


def changed(job: MnistRun) -> dict[str, Any]:
    """Those of the optimizer's options that do not have their default."""
    return {key: value for key in OPTIONS if (value := getattr(job, key)) != getattr(MnistRun, key)}


def execute(job: MnistRun, folder: str | None) -> Result:
    """Train once on one thread; accuracies are fractions, ``train_loss`` is the mean over the last epoch."""
    data = _data(job.dataset, folder, job.quick)
    config = TrainConfig(
        dataset=job.dataset,
        optimizer=job.optimizer,
        batch_size=job.batch_size,
        lr=job.lr,
        schedule=job.schedule,
        weight_decay=job.weight_decay,
        betas=(job.beta1, 0.999),
        caution=job.caution or None,
        trust_scale=job.trust_scale,
        trust_clip=job.trust_clip,
        epochs=job.epochs,
        seed=job.seed,
        eager=job.quick,
        device="cpu",
        threads=1,
    )
    result = train(config, data)
    return {
        "train_losses": [epoch["train_loss"] for epoch in result["epochs"]],
        "accuracies": [epoch["test_accuracy"] for epoch in result["epochs"]],
        "train_loss": result["epochs"][-1]["train_loss"],
        "last_accuracy": result["final_accuracy"],
        "best_accuracy": result["best_accuracy"],
        "state_bytes_per_parameter": result["state_bytes_per_parameter"],
        "skipped": result["skipped"],
        "seconds": result["seconds"],
    }


def figures(results: Sequence[Result]) -> list[str]:
    """What tables show of runs that differ by their seed, under the header FIGURES."""
    best, last = ([100 * result[f"{name}_accuracy"] for result in results] for name in ("best", "last"))
    losses = [result["train_loss"] for result in results]
    return [
        median_and_range(best, ".2f"),
        median_and_range(last, ".2f"),
        median_and_range(losses, ".2g"),
        str(len(results)),
    ]


@functools.cache
def _data(dataset: str, folder: str | None, quick: bool) -> ImageData:
    data = load(dataset, folder)
    return data.head(QUICK_TRAIN, QUICK_TEST) if quick else data
