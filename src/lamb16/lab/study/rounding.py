"""Weights with 16 bits end to end: bfloat16 weights, rounded in every way, beside float32 ones.

The language model: stochastic rounding and weights that are kept exactly, against rounding to nearest, float32 weights
without and with autocast, and torchao's 8-bit AdamW with its stochastic rounding, at the best rate that `rates` found
for AdamW. An MLP at small constant rates, where rounding to nearest loses most; there Kahan summation is compared with,
too. The optimizers see the same batches and first weights. The stall: how far steps too small for bfloat16 move a
weight of 1.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamb16 import Lamb16
from lamb16.lab import registry
from lamb16.lab.registry import REGISTRY
from lamb16.lab.study.report import band, figure, grouped, not_run, number, table
from lamb16.lab.study.runs import Result, Results, code_of
from lamb16.lab.study.sizes import Sizes
from lamb16.lab.study.tasks import Task
from lamb16.lab.study.training import Run, describe, execute

__all__ = ["describe", "execute", "jobs", "plots", "prepare", "tables"]

TASK = "lm"
RATES = {"lamb16": 0.01, "adamw": 10**-2.5, "adamw8bit": 10**-2.5}
# What the weights are, and how they are rounded; float32 ones are not.
FORMS = (
    ("lamb16", "float32", None), ("lamb16", "autocast", None),
    *(("lamb16", "bfloat16", rounding) for rounding in ("exact", "stochastic", "nearest")),
    ("adamw", "float32", None), ("adamw8bit", "bfloat16", "stochastic"),
)  # fmt: skip
MLP = "mlp"
MLP_FORMS = (
    ("lamb16", "float32", None),
    *(("lamb16", "bfloat16", rounding) for rounding in ("exact", "stochastic", "nearest")),
    ("adamw", "float32", None), ("adamw", "bfloat16", None), ("adamw8bit", "bfloat16", "stochastic"),
    ("adamw-kahan", "bfloat16", None),
)  # fmt: skip
COLOURS = ("#000000", "#7f7f7f", "#2ca02c", "#d62728", "#ff9896", "#1f77b4", "#ff7f0e")
STALL_RATES = (1e-5, 1e-4, 1e-3, 1e-2)

Pair = tuple[Run, Result]


@dataclass(frozen=True)
class Form(Run):
    """A training with weights of one form."""

    weights: str = "float32"
    rounding: str | None = None

    def model(self, task: Task) -> nn.Module:
        """The network with these weights."""
        model = super().model(task)
        return model.bfloat16() if self.weights == "bfloat16" else model

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast for float32 weights that are used as bfloat16."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.weights == "autocast")

    def options(self) -> dict[str, Any]:
        """How the optimizer is to round."""
        if self.optimizer == "adamw8bit":
            return {"bf16_stochastic_round": self.rounding == "stochastic"}
        return {} if self.rounding is None else {"param_rounding": self.rounding}


def jobs(sizes: Sizes) -> list[Run]:
    """Every form with every seed of `published`: where a claim is made."""
    size, mlp = sizes.tasks[TASK], sizes.mlp
    seeds = sizes.published_seeds
    found = [
        Form(TASK, name, RATES[name], seed, size.steps, size.batch_size, sizes.dataset, weights=w, rounding=rounding)
        for name, w, rounding in FORMS
        for seed in seeds
    ] + [
        Form(MLP, name, lr, seed, mlp.steps, mlp.batch_size, "digits", schedule="constant", weights=w, rounding=how)
        for name, w, how in MLP_FORMS
        for lr in mlp.rates
        for seed in seeds
    ]
    return [form for form in found if registry.why_unusable(form.optimizer) is None]


def prepare(results: Results, sizes: Sizes) -> None:
    """The table of stalled weights, unless the file holds it, and why an optimizer does not work here."""
    results.extra["unusable"] = registry.unusable(name for name, *_ in (*FORMS, *MLP_FORMS))
    made_by = f"{code_of('lamb16')}, {sizes.stall_steps} steps"
    if results.extra.get("stall code") != made_by:
        results.extra["stall code"] = made_by
        results.extra["stall"] = [
            [lr, *(moved(lr, dtype, rounding, sizes.stall_steps) for dtype, rounding in STALLED)] for lr in STALL_RATES
        ]
    results.save()


STALLED = (
    (torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "exact"),
)  # fmt: skip


def moved(lr: float, dtype: torch.dtype, rounding: str, steps: int) -> float:
    """How far the mean of 4,096 weights of 1 moves in ``steps`` with the gradient 1, in float32's terms."""
    p = nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = Lamb16([("p", p)], lr=lr, param_rounding=rounding, compile=False)
    p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    return 1 - float(optimizer.float32_weights()["p"].double().mean())


def label(form: tuple[str, str, str | None]) -> str:
    """In tables and plots."""
    name, weights, rounding = form
    words = {"autocast": "float32 weights, autocast", "float32": "float32 weights"}.get(weights, "bfloat16")
    return f"{REGISTRY[name].label}, {words}" + (f", {rounding}" if rounding else "")


def _form(pair: Pair) -> tuple[str, str, str | None]:
    run = pair[0]
    assert isinstance(run, Form)
    return run.optimizer, run.weights, run.rounding


def tables(pairs: list[Pair], extra: dict[str, Any]) -> dict[str, str]:
    """Losses of every form beside those of the same optimizer with float32 weights; the stalled weights."""
    losses = {
        form: [result["validation_loss"] for _, result in sorted(group, key=lambda pair: pair[0].seed)]
        for form, group in grouped(_of(TASK, pairs), _form).items()
    }
    rows = []
    for form, own in losses.items():
        base = losses["lamb16" if form[0] == "lamb16" else "adamw", "float32", None]
        to_float32 = [100 * (a / b - 1) for a, b in zip(own, base, strict=True)]
        rows.append([
            label(form), number(statistics.mean(own), ".5g"), f"{min(own):.5g} to {max(own):.5g}",
            f"{statistics.mean(to_float32):+.2f}", f"{min(to_float32):+.2f} to {max(to_float32):+.2f}",
        ])  # fmt: skip
    header = ["weights", "mean loss", "seeds", "to float32 weights of the same seed, %", "seeds"]
    stall = [[f"{lr:g}", *(number(x, ".4f") for x in moves)] for lr, *moves in extra["stall"]]
    names = ["float32", *(f"bfloat16, {rounding}" for _, rounding in STALLED[1:])]
    found = {"losses": table(header, rows), "small rates": _small_rates(pairs), "stall": table(["lr", *names], stall)}
    return found | not_run(extra["unusable"])


def _of(task: str, pairs: list[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair[0].task == task]


def _small_rates(pairs: list[Pair]) -> str:
    """The MLP's training loss at the end, mean and range of the seeds, by form and rate."""
    own = _of(MLP, pairs)
    rates = sorted({run.lr for run, _ in own}, reverse=True)
    rows = []
    for form, group in grouped(own, _form).items():
        by_rate = grouped(group, lambda pair: pair[0].lr)
        losses = [[result["train_loss"] for _, result in by_rate[lr]] for lr in rates]
        cells = [f"{statistics.mean(x):.3g} ({min(x):.3g} to {max(x):.3g})" for x in losses]
        rows.append([label(form), *cells])
    return table(["weights", *(f"lr {lr:g}" for lr in rates)], rows)


def plots(pairs: list[Pair], folder: Path) -> list[Path]:
    """The loss curves."""
    path = folder / "rounding.svg"
    with figure(path, 1) as (axes,):
        for (form, group), colour in zip(grouped(_of(TASK, pairs), _form).items(), COLOURS, strict=False):
            lines = [result["curve"] for _, result in group]
            band(axes, list(range(len(lines[0]))), lines, label(form), colour)
        axes.set(xlabel="fortieth of the training", ylabel="training loss", yscale="log")
        axes.legend(fontsize=5)
    return [path]
