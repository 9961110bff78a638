"""Lamb16 with 8-bit moments against the same rule with FP32 moments, on real trainings.

A language model, a convolutional network and an autoencoder; the same seeds, batches and first weights for both. Four
values of β2, and gradients a million times smaller and larger. Warm-up over a tenth of the steps, then a linear fall;
the convolutional network also at rates that do not fall, for three epochs. The cheap ones with many seeds, so that
a difference shows that is smaller than what one seed differs from another.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamb16.lab.study.report import deviation, difference, figure, grouped, loss_of, number, table
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import Sizes
from lamb16.lab.study.training import Run, describe, execute, steps_of

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

BETA2 = (0.95, 0.99, 0.999, 0.9999)
GRADIENT_SCALES = (1e-6, 1e6)
MOMENTS = ("float8", "float32")
CONSTANT_RATES = (0.02, 0.1)
CHEAP = ("autoencoder", "cnn")

Pair = tuple[Run, Result]


def jobs(sizes: Sizes) -> list[Run]:
    """Pairs of runs: several seeds with the defaults, at constant rates and for scaled gradients, the first per β2.

    Of the seeds that every task has, those of 8 bits are probed.
    """
    runs = [_pair(sizes, task, seed) for seed in sizes.seeds for task in sizes.tasks]
    runs += [_pair(sizes, task, seed) for task in CHEAP for seed in sizes.many_seeds if seed not in sizes.seeds]
    constant = {"steps": sizes.constant_steps, "schedule": "constant"}
    runs += [_pair(sizes, "cnn", seed, lr=lr, **constant) for lr in CONSTANT_RATES for seed in sizes.many_seeds]
    for task in sizes.tasks:
        runs += [_pair(sizes, task, sizes.seeds[0], beta2=beta2) for beta2 in BETA2 if beta2 != 0.999]
        runs += [_pair(sizes, task, seed, gradient_scale=scale) for scale in GRADIENT_SCALES for seed in sizes.seeds]
    return [run for pair in runs for run in pair]


def _pair(sizes: Sizes, task: str, seed: int, **settings: Any) -> list[Run]:
    size = sizes.tasks[task]
    run = Run(task, "lamb16", size.lr, seed, size.steps, size.batch_size, sizes.dataset)
    probed = seed in sizes.seeds and "schedule" not in settings
    return [
        replace(run, moment_dtype=moments, probed=probed and moments == "float8", **settings) for moments in MOMENTS
    ]


def prepare(results: Results, sizes: Sizes) -> None:
    """Nothing beside the runs."""


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Losses with both kinds of moments, and what was seen layer by layer, as Markdown."""
    defaults: list[list[str]] = []
    others: list[list[str]] = []
    for (task, schedule, lr, beta2, scale), group in grouped(pairs, _setting).items():
        losses = {
            kind: [loss_of(r["validation_loss"]) for run, r in group if run.moment_dtype == kind] for kind in MOMENTS
        }
        cosines = [layer["cosine"] for _, r in group if "probes" in r for layer in r["probes"]["layers"].values()]
        mean, count = statistics.mean(losses["float32"]), len(losses["float32"])
        rows = defaults if (beta2, scale) == (Run.beta2, Run.gradient_scale) else others
        rows.append([
            task, f"{schedule}, {lr:.2g}", f"{beta2:g}", f"{scale:g}", str(count),
            number(statistics.mean(losses["float8"]), ".5g"), number(mean, ".5g"),
            difference(losses["float8"], losses["float32"], ".2f"),
            number(100 * deviation(losses["float32"]) / mean, ".2f") if count > 1 else "",
            f"{statistics.median(cosines):.4f}" if cosines else "", f"{min(cosines):.3f}" if cosines else "",
        ])  # fmt: skip
    header = [
        "task", "schedule, lr", "β2", "gradients ×", "seeds", "loss, 8 bits", "loss, FP32",
        "difference, % (mean of logarithms ± standard error)", "deviation of seeds, %",
        "cosine of u, median layer", "lowest layer",
    ]  # fmt: skip
    found = {"loss": table(header, defaults), "other β2, and gradients scaled": table(header, others)}
    return found | {"layers": _layers(pairs)}


def _setting(pair: Pair) -> tuple[str, str, float, float, float]:
    run = pair[0]
    return run.task, run.schedule, run.lr, run.beta2, run.gradient_scale


def _layers(pairs: list[Pair]) -> str:
    """The means over the probes of the first seed's runs with the defaults."""
    header = ["task", "layer", "cosine", "lowest", "error of m", "log-error of v"]
    header += ["m at its largest", "m zero", "v zero", "v at its smallest"]
    rows, seen = [], set()
    for run, result in pairs:
        if "probes" not in result or run.task in seen:
            continue
        seen.add(run.task)
        for name, layer in result["probes"]["layers"].items():
            shares = [f"{layer[key]:.3%}" for key in ("m_saturated", "m_zero", "v_zero", "v_smallest")]
            figures = [f"{layer['cosine']:.4f}", f"{min(layer['cosines']):.4f}"]
            figures += [f"{layer['m_error']:.3f}", f"{layer['v_log_error']:.3f}"]
            rows.append([run.task, f"`{name}`", *figures, *shares])
    return table(header, rows)


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """Loss curves with both kinds of moments, and each layer's cosine of the updates over training."""
    default = [pair for pair in pairs if _setting(pair)[1::2] == ("linear", 0.999) and pair[0].gradient_scale == 1]
    tasks = grouped(default, lambda pair: pair[0].task)
    path = folder / "moments.svg"
    with figure(path, len(tasks), 2) as axes:
        for column, (task, group) in enumerate(tasks.items()):
            upper, lower = axes[column], axes[column + len(tasks)]
            for kind, style in zip(MOMENTS, ("-", ":"), strict=True):
                run, result = next(pair for pair in group if pair[0].moment_dtype == kind)
                upper.plot(steps_of(run, result["curve"]), result["curve"], style, label=kind)
            upper.set(title=task, ylabel="training loss")
            run, result = next(pair for pair in group if "probes" in pair[1])
            _plot_layers(lower, run, {name: layer["cosines"] for name, layer in result["probes"]["layers"].items()})
        axes[0].legend(fontsize=7)
    return [path]


def _plot_layers(axes: Any, run: Run, cosines: dict[str, list[float]]) -> None:
    """A line per layer; the three that fall lowest have a colour and their name."""
    worst = sorted(cosines, key=lambda name: min(cosines[name]))[:3]
    for name, line in sorted(cosines.items(), key=lambda item: item[0] in worst):  # these above the grey ones
        style = {"label": name} if name in worst else {"color": "0.75"}
        axes.plot(steps_of(run, line), line, linewidth=1, **style)
    axes.set(xlabel="step", ylabel=f"cosine of u by layer, seed {run.seed}")
    axes.legend(fontsize=6)
