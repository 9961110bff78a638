"""How large the studies are: the full form, and the quick one that the tests run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class TaskSize(NamedTuple):
    """How a task is trained: ``lr`` is Lamb16's where it is not varied, ``rates`` are those where it is.

    ``rate_seeds`` are the seeds for those.
    """

    steps: int
    batch_size: int
    lr: float
    rates: tuple[float, ...]
    rate_seeds: tuple[int, ...] = (1,)


def half_decades(first: float, last: float) -> tuple[float, ...]:
    """10^first, 10^(first + 1/2), ..., 10^last."""
    return tuple(10 ** (first + k / 2) for k in range(round(2 * (last - first)) + 1))


@dataclass(frozen=True)
class Sizes:
    """The trainings that a study consists of."""

    tasks: dict[str, TaskSize]
    mlp: TaskSize
    seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    batch_epochs: int
    dataset: str
    published: tuple[tuple[int, float, int], ...]  # batch size, learning rate, epochs
    published_seeds: tuple[int, ...]
    reasons_seeds: tuple[int, ...]
    timed_rounds: int
    quick: bool


FULL = Sizes(
    tasks={
        "lm": TaskSize(500, 12, 0.01, half_decades(-4, -1)),
        "cnn": TaskSize(400, 256, 0.1, half_decades(-2.5, 0.5), rate_seeds=(1, 2, 3, 4, 5)),  # the noisiest
        "autoencoder": TaskSize(400, 256, 0.03, half_decades(-3.5, -0.5)),
    },
    mlp=TaskSize(1000, 128, 1e-3, (1e-3, 1e-4)),
    seeds=(1, 2, 3),
    ablation_seeds=(1,),
    batch_sizes=(64, 128, 256, 512, 1024, 2048, 4096, 8192),
    batch_epochs=2,
    dataset="mnist",
    published=((1024, 0.02, 10), (128, 0.01, 5)),
    published_seeds=(1, 2, 3, 4, 5),
    reasons_seeds=(1, 2, 3),
    timed_rounds=30,
    quick=False,
)
QUICK = Sizes(
    tasks={
        "lm": TaskSize(2, 2, 0.01, (0.001, 0.01)),
        "cnn": TaskSize(12, 32, 0.1, (0.01, 0.1)),
        "autoencoder": TaskSize(12, 32, 0.03, (0.003, 0.03)),
    },
    mlp=TaskSize(12, 32, 1e-3, (1e-3,)),
    seeds=(1,),
    ablation_seeds=(1,),
    batch_sizes=(64, 256),
    batch_epochs=1,
    dataset="digits",
    published=((128, 0.01, 2),),
    published_seeds=(1, 2),
    reasons_seeds=(1,),
    timed_rounds=3,
    quick=True,
)
