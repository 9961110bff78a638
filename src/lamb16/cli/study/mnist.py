"""Trainings of the published demonstration's network, as `lamb16 train` makes them: one job a run."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lamb16.cli.data import ImageData, load
from lamb16.cli.study.runs import Result
from lamb16.cli.training import TrainConfig, train

QUICK_TRAIN, QUICK_TEST = 600, 300  # images


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
    weight_decay: float = 0.01
    quick: bool = False


def describe(job: MnistRun) -> str:
    """The settings in a few words."""
    return f"{job.optimizer} batch {job.batch_size} lr {job.lr:g} {job.schedule} seed {job.seed}"


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


@functools.cache
def _data(dataset: str, folder: str | None, quick: bool) -> ImageData:
    data = load(dataset, folder)
    return data.head(QUICK_TRAIN, QUICK_TEST) if quick else data
