"""How large the studies are: the full form, and the quick one that the tests run."""

from __future__ import annotations

from dataclasses import dataclass

TaskSize = tuple[int, int, float]  # steps, batch size, learning rate of Lamb16


@dataclass(frozen=True)
class Sizes:
    """The trainings that a study consists of."""

    tasks: dict[str, TaskSize]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    rate_seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    batch_epochs: int
    dataset: str
    published: tuple[tuple[int, float, int], ...]  # batch size, learning rate, epochs
    published_seeds: tuple[int, ...]
    timed_rounds: int
    quick: bool


FULL = Sizes(
    tasks={"lm": (500, 12, 0.003), "cnn": (400, 256, 0.01), "autoencoder": (400, 256, 0.01)},
    seeds=(1, 2, 3),
    rates=tuple(10 ** (k / 2) for k in range(-8, 1)),
    rate_seeds=(1,),
    ablation_seeds=(1, 2),
    batch_sizes=(64, 128, 256, 512, 1024, 2048, 4096, 8192),
    batch_epochs=3,
    dataset="mnist",
    published=((1024, 0.02, 10), (128, 0.01, 5)),
    published_seeds=(1, 2, 3, 4, 5),
    timed_rounds=30,
    quick=False,
)
QUICK = Sizes(
    tasks={"cnn": (12, 32, 0.01), "autoencoder": (12, 32, 0.01)},
    seeds=(1,),
    rates=(0.001, 0.01, 0.1),
    rate_seeds=(1,),
    ablation_seeds=(1,),
    batch_sizes=(64, 256),
    batch_epochs=1,
    dataset="digits",
    published=((128, 0.01, 2),),
    published_seeds=(1, 2),
    timed_rounds=3,
    quick=True,
)
