"""What each part of the rule is worth: the tasks of `moments` with one part exchanged at a time.

Loss, and fidelity: the cosine of the updates to those of FP32 moments of the same gradients under the same part.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lamb16.cli.study.report import figure, grouped, number, table
from lamb16.cli.study.runs import Result, Results
from lamb16.cli.study.sizes import Sizes
from lamb16.cli.study.training import Run, describe, execute

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

BASELINE = "the rule"
# What is exchanged: options of the run, and parts of the rule.
ABLATIONS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "FP32 moments": {"moment_dtype": "float32"},
    "nearest rounding": {"parts": (("rounding", "nearest"),)},
    "independent words": {"parts": (("words", "independent"),)},
    "exact max-norm": {"parts": (("norm", "exact"),)},
    "a scale a row": {"parts": (("scope", "row"),)},
    "v may become 0": {"parts": (("never_zero", False),)},
    "no bound C": {"parts": (("bound", False),)},
    "v may become 0, no bound C": {"parts": (("never_zero", False), ("bound", False))},
    "trust_scale 0": {"trust_scale": 0.0},
    "trust_scale 0.25": {"trust_scale": 0.25},
    "trust_scale 0.5": {"trust_scale": 0.5},
    "no bias correction": {"bias_correction": False},
    "weights count as they are": {"parts": (("vector_floor", 1e-3), ("matrix_floor", 1e-3))},
    "the same, no bias correction": {
        "bias_correction": False,
        "parts": (("vector_floor", 1e-3), ("matrix_floor", 1e-3)),
    },
    "only vectors count with 0.1 at least": {"parts": (("matrix_floor", 1e-3),)},
    "vectors outside the trust ratio": {"parts": (("vectors", "outside"),)},
}

Pair = tuple[Run, Result]


def jobs(sizes: Sizes) -> list[Run]:
    """Every ablation on every task, the learning rate of the rule."""
    return [
        Run(task, "variant", size.lr, seed, size.steps, size.batch_size, sizes.dataset, probed=True, **options)
        for seed in sizes.ablation_seeds
        for task, size in sizes.tasks.items()
        for options in ABLATIONS.values()
    ]


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def name_of(run: Run) -> str:
    """The ablation that a run belongs to."""
    default = Run("", "", 0, 0, 0, 0)
    options = {
        key: getattr(run, key)
        for key in ("moment_dtype", "trust_scale", "bias_correction", "parts")
        if getattr(run, key) != getattr(default, key)
    }
    return next(name for name, wanted in ABLATIONS.items() if wanted == options)


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """The loss against the rule's, a column a task, and the cosine of the updates, as Markdown."""
    tasks = grouped(pairs, lambda pair: pair[0].task)
    found = {
        task: {
            name: [result for _, result in own]
            for name, own in grouped(group, lambda pair: name_of(pair[0])).items()
        }
        for task, group in tasks.items()
    }
    rows = []
    for name in ABLATIONS:
        row = [name]
        for results in found.values():
            loss, rule = (_loss(results[key]) for key in (name, BASELINE))
            row += [number(loss, ".4g"), f"{100 * (loss / rule - 1):+.2f}" if loss < float("inf") else ""]
        for results in found.values():
            row.append(f"{statistics.median(_cosines(results[name])):.4f}")
        rows.append(row)
    header = ["exchanged"]
    header += [text for task in found for text in (f"{task}: loss", "%")]
    header += [f"{task}: cosine" for task in found]
    return {"ablation": table(header, rows)}


def _loss(results: list[Result]) -> float:
    losses = [result["validation_loss"] for result in results]
    return statistics.mean(float("inf") if loss is None else loss for loss in losses)


def _cosines(results: list[Result]) -> list[float]:
    return [layer["cosine"] for result in results for layer in result["probes"]["layers"].values()] or [float("nan")]


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """The difference of the loss to the rule's, a bar an ablation, cut at 10 %."""
    tasks = grouped(pairs, lambda pair: pair[0].task)
    path = folder / "ablations.svg"
    with figure(path, len(tasks)) as axes:
        for panel, (task, group) in zip(axes, tasks.items(), strict=True):
            own = {name: [r for _, r in g] for name, g in grouped(group, lambda pair: name_of(pair[0])).items()}
            names = [name for name in ABLATIONS if name != BASELINE]
            rule = _loss(own[BASELINE])
            panel.barh(names, [min(10.0, 100 * (_loss(own[name]) / rule - 1)) for name in names])
            panel.set(title=task, xlabel="loss to the rule's, %")
            panel.invert_yaxis()
            panel.tick_params(axis="y", labelsize=6)
    return [path]
