"""What each part of the rule is worth: the tasks of `moments` with one part exchanged at a time, with two seeds.

Loss, and fidelity: the cosine of the updates to those of FP32 moments of the same gradients. The learning rate is the
rule's best of `rates`. What changes the size of the update is run at three more with the first seed, half a decade
apart, two of them lower, then at up to two beyond an end that is best, and compared with the rule, each at its best by
that seed. What becomes of the trust ratio is then run at that rate with all seeds that `rates` gives a best one: other
exponents, and biases and norms in a parameter group of their own, without it and without weight decay.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamb16.lab.study.report import (
    at_an_end,
    beyond,
    difference,
    figure,
    grouped,
    loss_of,
    median_and_range,
    number,
    table,
)
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import Sizes
from lamb16.lab.study.training import OPTIONS, Run, describe, execute

__all__ = ["describe", "execute", "jobs", "more", "plots", "prepare", "tables"]

BASELINE = "the rule"
# What is exchanged: options of the run, and parts of the rule. First what leaves the size of the update ...
STORAGE: dict[str, dict[str, Any]] = {
    "FP32 moments": {"moment_dtype": "float32"},
    "nearest rounding": {"parts": (("rounding", "nearest"),)},
    "independent words": {"parts": (("words", "independent"),)},
    "a scale from the maximum": {"parts": (("scale_from", "maximum"),)},
    "a scale per row": {"parts": (("scope", "row"),)},
    "v may become 0": {"parts": (("never_zero", False),)},
    "no bound C": {"parts": (("bound", False),)},
    "sums in float64": {"parts": (("sums", "float64"),)},
    "norms of this step": {"parts": (("ratio_norms", "this"),)},
}
# ... then what changes it, and is compared at its own best learning rate too.
UPDATE: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "no Nesterov momentum": {"nesterov": False},
    "caution": {"caution": True},
    "trust_scale 0": {"trust_scale": 0.0},
    "trust_scale 0.25": {"trust_scale": 0.25},
    "trust_scale 0.5": {"trust_scale": 0.5},
    "β1 0.5": {"beta1": 0.5},
    "no bias correction": {"bias_correction": False},
    "weights count as they are": {"parts": (("weight_floor", 1e-3),)},
    "biases and norms apart": {"apart": True},
}
ABLATIONS = UPDATE | STORAGE
RATIOS = (BASELINE, "trust_scale 0", "trust_scale 0.25", "trust_scale 0.5", "biases and norms apart")
FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5)  # of the learning rate, for what changes the size of the update

Pair = tuple[Run, Result]


def jobs(sizes: Sizes) -> list[Run]:
    """Every ablation on every task, those of the update with the first seed at four learning rates."""
    return [
        Run(
            task, "variant" if "parts" in options else "lamb16", size.lr * factor, seed, size.steps, size.batch_size,
            sizes.dataset, probed=factor == 1.0, **options,
        )
        for k, seed in enumerate(sizes.ablation_seeds)
        for task, size in sizes.tasks.items()
        for name, options in ABLATIONS.items()
        for factor in (FACTORS if name in UPDATE and k == 0 else (1.0,))
    ]  # fmt: skip


def more(pairs: list[Pair], sizes: Sizes) -> list[Run]:
    """Where a best rate is at an end, the next one beyond it, twice at most; else the trust ratios with more seeds."""
    found, most = [], len(FACTORS) + sizes.beyond
    for key, task in _tasks(pairs).items():
        for name in UPDATE:
            run = task.at_best(name)
            if lr := beyond(run.lr, task.rates(name), most):
                found.append(replace(run, lr=lr, probed=False))
            elif name in RATIOS:
                for seed in sizes.tasks[key].best_seeds:  # the first ones' runs may be known already
                    found.append(replace(run, seed=seed, probed=run.probed and seed in sizes.ablation_seeds))
    return found


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def name_of(run: Run) -> str:
    """The ablation that a run belongs to."""
    default = Run("", "", 0, 0, 0, 0)
    options = {
        key: getattr(run, key)
        for key in (*OPTIONS, "beta1", "trust_scale", "parts", "apart")
        if getattr(run, key) != getattr(default, key)
    }
    return next(name for name, wanted in ABLATIONS.items() if wanted == options)


class Task:
    """The results on one task: losses and cosines by ablation."""

    def __init__(self, pairs: list[Pair]) -> None:
        self._by_name = {
            name: grouped(own, lambda pair: pair[0].lr)
            for name, own in grouped(pairs, lambda pair: name_of(pair[0])).items()
        }
        ((self._lr, runs),) = self._by_name[next(iter(STORAGE))].items()
        self._seeds = len(runs)  # of all ablations

    def _losses(self, name: str, lr: float) -> list[float]:
        """By seed."""
        return [loss_of(result["validation_loss"]) for _, result in self._by_name[name][lr]]

    def same(self, name: str) -> float:
        """The loss to the rule's with the same seed at the same learning rate, in percent; the mean over seeds."""
        mine, rule = (self._losses(key, self._lr)[: self._seeds] for key in (name, BASELINE))
        return statistics.mean(100 * (x / y - 1) for x, y in zip(mine, rule, strict=True))

    def best(self, name: str) -> float | None:
        """The same of the first seed, each at the best of its learning rates; None where there is one only."""
        if name not in UPDATE:
            return None
        mine, rule = (self._losses(key, self._best_rate(key))[0] for key in (name, BASELINE))
        return 100 * (mine / rule - 1)

    def rates(self, name: str) -> list[float]:
        """The learning rates that it was run at."""
        return list(self._by_name[name])

    def _best_rate(self, name: str) -> float:
        return min(self.rates(name), key=lambda lr: self._losses(name, lr)[0])

    def at_best(self, name: str) -> Run:
        """The first seed's run at the best rate."""
        (run, _), *_ = self._by_name[name][self._best_rate(name)]
        assert isinstance(run, Run)
        return run

    def with_all_seeds(self, name: str) -> str:
        """Median and range of the loss at the best rate, and its difference to the rule's."""
        mine, rule = (self._losses(key, self._best_rate(key)) for key in (name, BASELINE))
        found = median_and_range(mine) + self.at_the_end(name)
        return found if name == BASELINE else f"{found}: {difference(mine, rule, '.1f')} %"

    def at_the_end(self, name: str) -> str:
        """An arrow where the best rate is the lowest or the highest."""
        return at_an_end(self._best_rate(name), self.rates(name))

    def cosine(self, name: str) -> float:
        """Of the update to that of FP32 moments, the median over layers."""
        results = [result for _, result in self._by_name[name][self._lr][: self._seeds]]
        cosines = [layer["cosine"] for result in results for layer in result["probes"]["layers"].values()]
        return statistics.median(cosines) if cosines else math.nan


def _tasks(pairs: list[Pair]) -> dict[str, Task]:
    return {name: Task(own) for name, own in grouped(pairs, lambda pair: pair[0].task).items()}


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """The loss against the rule's in percent, at the same and at the best rate, and the cosines, as Markdown."""
    tasks = _tasks(pairs)
    update, storage = [], []
    for name in ABLATIONS:
        same = [number(task.same(name), "+.2f") for task in tasks.values()]
        if name in UPDATE and name not in RATIOS[1:]:  # which have a table of their own, with more seeds
            best = [number(task.best(name), "+.2f") + task.at_the_end(name) for task in tasks.values()]
            update.append([name, *itertools.chain(*zip(same, best, strict=True))])
        if name in STORAGE or name == BASELINE:
            storage.append([name, *same, *(f"{task.cosine(name):.4f}" for task in tasks.values())])
    header = ["exchanged", *(text for name in tasks for text in (f"{name}: same lr", "best lr"))]
    other = ["exchanged", *(f"{name}: loss" for name in tasks), *(f"{name}: cosine" for name in tasks)]
    ratios = [[name, *(task.with_all_seeds(name) for task in tasks.values())] for name in RATIOS]
    return {
        "update": table(header, update),
        "trust ratio": table(["loss and its difference to the rule's", *tasks], ratios),
        "storage": table(other, storage),
    }


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """The difference of the loss to the rule's, a bar per ablation, cut at 10 %."""
    tasks = _tasks(pairs)
    names = [name for name in ABLATIONS if name != BASELINE]
    path = folder / "ablations.svg"
    with figure(path, len(tasks)) as axes:
        for panel, (title, task) in zip(axes, tasks.items(), strict=True):
            differences = [task.same(name) if task.best(name) is None else task.best(name) for name in names]
            panel.barh(names, [min(10.0, d) for d in differences if d is not None])
            panel.set(title=title, xlabel="loss to the rule's, %")
            panel.invert_yaxis()
            panel.tick_params(axis="y", labelsize=6)
    return [path]
