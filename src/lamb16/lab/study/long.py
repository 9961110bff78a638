"""Trainings ten times as long, and a wider model: what holds after 500 steps need not hold after 5,000.

The language model of `rates` and a wider one of 4 million parameters. Every optimizer at three rates, half a decade
apart, around its best of `rates`, and beyond where the best is at an end; the small model's best with more seeds.
Lamb16 also with FP32 moments and, on the small model, with more and less momentum, at its middle rate; with caution
there alone on the wider model. Its stored moments are compared with FP32 ones over the whole training.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamb16.lab.registry import label
from lamb16.lab.study.rates import Optimizer, Pair, by_rate, optimizer_of
from lamb16.lab.study.report import (
    COLOURS,
    at_an_end,
    band,
    beyond,
    figure,
    grouped,
    loss_of,
    median,
    median_and_range,
    number,
    table,
)
from lamb16.lab.study.runs import Results
from lamb16.lab.study.sizes import HALF_DECADE, Sizes
from lamb16.lab.study.training import Run, describe, execute, steps_of

__all__ = ["describe", "execute", "jobs", "more", "plots", "prepare", "tables"]

OPTIMIZERS: tuple[tuple[str, bool, float], ...] = (  # with caution or without, middle rate
    ("lamb16", False, 10**-2), ("lamb16", True, 10**-2), ("lamb", False, 10**-2), ("adamw", False, 10**-2.5),
    ("nadam", False, 10**-2.5),
)  # fmt: skip
FP32: dict[str, Any] = {"moment_dtype": "float32"}
TWINS: tuple[dict[str, Any], ...] = (FP32, {"beta1": 0.95}, {"beta1": 0.8}, {"beta1": 0.5})


def jobs(sizes: Sizes) -> list[Run]:
    """Every optimizer at its three rates, and the twins of Lamb16 at the middle one; the small model first."""
    found = []
    for task, (steps, batch) in sizes.long.items():
        for name, caution, middle in OPTIMIZERS:
            run = Run(task, name, middle, 1, steps, batch, caution=caution, probed=name == "lamb16")
            rates = (middle,) if caution and task != "lm" else (middle, middle / HALF_DECADE, middle * HALF_DECADE)
            found += [replace(run, lr=lr) for lr in rates]
            if name == "lamb16" and not caution:
                found += [replace(run, **twin) for twin in (TWINS if task == "lm" else (FP32,))]
    return found


def more(pairs: list[Pair], sizes: Sizes) -> list[Run]:
    """Where the best rate is at an end, the next one beyond it, twice at most; else the small model's other seeds."""
    found: list[Run] = []
    for own in grouped([pair for pair in pairs if not _is_twin(pair)], lambda p: (p[0].task, _optimizer(p))).values():
        first = [pair for pair in own if pair[0].seed == 1]
        rates = [run.lr for run, _ in first]
        best = min(first, key=lambda pair: loss_of(pair[1]["validation_loss"]))[0]
        if lr := beyond(best.lr, rates, most=5):
            found.append(replace(best, lr=lr))
        elif best.task == "lm":
            found += [replace(best, seed=seed, probed=False) for seed in sizes.long_seeds if seed != 1]
    return found


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def _optimizer(pair: Pair) -> Optimizer:
    return optimizer_of(pair[0])


def _is_twin(pair: Pair) -> bool:
    return (pair[0].beta1, pair[0].moment_dtype) != (Run.beta1, Run.moment_dtype)


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Losses at every rate and the best beside AdamW's or NAdam's; the twins; what storage does over the training."""
    rows, twins, drift = [], [], []
    for task, group in grouped(pairs, lambda pair: pair[0].task).items():
        curves = by_rate([pair for pair in group if not _is_twin(pair)])[task]
        best = {optimizer: min(curve, key=lambda lr: median(curve[lr][:1])) for optimizer, curve in curves.items()}
        adams = [Optimizer(name) for name in ("adamw", "nadam")]
        least = min(median(curves[adam][best[adam]]) for adam in adams)
        for optimizer, curve in curves.items():
            rates, at = sorted(curve), best[optimizer]
            rows.append([
                task, label(*optimizer), median_and_range(curve[at], ".5g"), f"{at:.2g}{at_an_end(at, rates)}",
                f"{100 * (median(curve[at]) / least - 1):+.2f}",
                ", ".join(f"{lr:.2g}: {number(curve[lr][0])}" for lr in rates),
            ])  # fmt: skip
        own = [pair for pair in group if _optimizer(pair) == Optimizer("lamb16") and pair[0].seed == 1]
        rule = next(pair for pair in own if pair[0] == replace(own[0][0], lr=OPTIMIZERS[0][2]))
        for run, result in [rule, *filter(_is_twin, own)]:
            loss, base = (loss_of(r["validation_loss"]) for r in (result, rule[1]))
            moments = {"float8": "8-bit moments", "float32": "FP32 moments"}[run.moment_dtype]
            to_rule = f"{100 * (loss / base - 1):+.2f}"
            twins.append([task, f"β1 {run.beta1:g}, {moments}", number(result["validation_loss"], ".5g"), to_rule])
        drift.append([task, *_drift(rule[1]["probes"]["layers"])])
    header = ["task", "optimizer", "best loss (seeds)", "at lr", "to the better of AdamW and NAdam, %"]
    header += ["first seed at each lr"]
    drifts = ["task", "cosine of u over the training, median layer", "lowest layer", "m at its largest", "m zero"]
    return {
        "loss": table(header, rows),
        "momentum": table(["task", "Lamb16 at its middle rate", "loss", "to the rule, %"], twins),
        "drift": table([*drifts, "v zero", "v at its smallest"], drift),
    }


def _drift(layers: dict[str, dict[str, Any]]) -> list[str]:
    """The cosines at every probe of the median and of the lowest layer, then the mean shares of special codes."""
    by_probe = list(zip(*(layer["cosines"] for layer in layers.values()), strict=True))
    lines = [", ".join(f"{of(probe):.3f}" for probe in by_probe) for of in (statistics.median, min)]
    keys = ("m_saturated", "m_zero", "v_zero", "v_smallest")
    return lines + [f"{statistics.mean(layer[key] for layer in layers.values()):.3%}" for key in keys]


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """The training losses of every optimizer at its best rate."""
    path = folder / "long.svg"
    tasks = grouped([pair for pair in pairs if not _is_twin(pair)], lambda pair: pair[0].task)
    with figure(path, len(tasks)) as axes:
        for panel, (task, group) in zip(axes, tasks.items(), strict=True):
            for optimizer, own in grouped(group, _optimizer).items():
                best = min(
                    (pair for pair in own if pair[0].seed == 1), key=lambda pair: loss_of(pair[1]["validation_loss"])
                )[0]
                curves = [result["curve"] for run, result in own if run.lr == best.lr]
                colour = None if optimizer.caution else COLOURS[optimizer.name]
                band(panel, steps_of(best, curves[0]), curves, f"{label(*optimizer)}, lr {best.lr:.2g}", colour)
            panel.set(title=task, xlabel="step", yscale="log")
            panel.legend(fontsize=6)
        axes[0].set_ylabel("training loss")
    return [path]
