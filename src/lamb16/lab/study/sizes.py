"""How large the studies are: the full form, and the quick one that the tests run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

HALF_DECADE = 10**0.5
MANY = tuple(range(1, 25))


class TaskSize(NamedTuple):
    """How a task is trained: ``rates`` are tried where it is varied; elsewhere ``lr``, in FULL Lamb16's best of them.

    ``rate_seeds`` are the seeds for those; the two best of each optimizer get ``seeds``, or ``best_seeds``.
    """

    steps: int
    batch_size: int
    lr: float
    rates: tuple[float, ...]
    rate_seeds: tuple[int, ...] = (1,)
    best_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)


def half_decades(first: float, last: float) -> tuple[float, ...]:
    """10^first, 10^(first + 1/2), ..., 10^last."""
    return tuple(10 ** (first + k / 2) for k in range(round(2 * (last - first)) + 1))


@dataclass(frozen=True)
class Sizes:
    """The trainings that a study consists of."""

    tasks: dict[str, TaskSize]
    mlp: TaskSize
    seeds: tuple[int, ...]
    many_seeds: tuple[int, ...]
    constant_steps: int
    ablation_seeds: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    batch_epochs: int
    word_sizes: tuple[int, ...]
    batch_words: int  # of a training
    dataset: str
    published: tuple[tuple[int, float, int], ...]  # batch size, learning rate, epochs
    published_seeds: tuple[int, ...]
    fewer_seeds: int  # of published_seeds, where no claim is made
    timed_rounds: int
    stall_steps: int
    beyond: int  # learning rates at most beyond an end that is best
    quick: bool
    long: dict[str, tuple[int, int]]  # steps and batch size by task
    long_seeds: tuple[int, ...]


FULL = Sizes(
    tasks={
        "lm": TaskSize(500, 12, 0.01, half_decades(-3.5, -1)),
        "cnn": TaskSize(400, 256, 1.0, half_decades(-2, 0.5), (1, 2), MANY),  # the noisiest
        "autoencoder": TaskSize(400, 256, 0.1, half_decades(-3, -0.5)),
    },
    mlp=TaskSize(1000, 128, 1e-3, (1e-3, 1e-4)),
    seeds=(1, 2, 3, 4, 5),
    many_seeds=MANY,
    constant_steps=703,  # three epochs of 256 images
    ablation_seeds=(1, 2),
    batch_sizes=(64, 256, 1024, 4096, 8192),
    batch_epochs=2,
    word_sizes=(64, 256, 1024, 4096, 8192),
    batch_words=384_000,
    dataset="mnist",
    published=((1024, 0.02, 10), (128, 0.01, 5)),
    published_seeds=(1, 2, 3, 4, 5),
    fewer_seeds=1,
    timed_rounds=30,
    stall_steps=300,
    beyond=2,
    quick=False,
    long={"lm": (5000, 12), "lm-wide": (1000, 12)},
    long_seeds=(1, 2),
)
QUICK = Sizes(
    tasks={
        "lm": TaskSize(2, 2, 0.01, (0.001, 0.01), best_seeds=(1, 2)),
        "cnn": TaskSize(4, 32, 0.1, (0.01, 0.1), best_seeds=(1, 2)),
        "autoencoder": TaskSize(4, 32, 0.03, (0.003, 0.03), best_seeds=(1, 2)),
    },
    mlp=TaskSize(4, 32, 1e-3, (1e-3,)),
    seeds=(1,),
    many_seeds=(1, 2),
    constant_steps=4,
    ablation_seeds=(1,),
    batch_sizes=(64, 256),
    batch_epochs=1,
    word_sizes=(64, 128),
    batch_words=256,
    dataset="digits",
    published=((128, 0.01, 2),),
    published_seeds=(1, 2),
    fewer_seeds=1,
    timed_rounds=3,
    stall_steps=10,
    beyond=0,
    quick=True,
    long={"lm": (4, 2), "lm-wide": (2, 2)},
    long_seeds=(1, 2),
)
