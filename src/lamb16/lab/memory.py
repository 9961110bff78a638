"""`lamb16 bench --memory`: where the bytes of a training step go, side by side.

A model with parameters of the given shapes, a chain of linear layers, takes training steps on one vector: activations
are next to nothing. Weights, gradients and state are counted; work buffers are what else stays allocated between two
steps; the peak is the most that is allocated while a step runs (zero_grad, forward, backward, step), compilation aside.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

import lamb16
from lamb16.lab import registry, timing
from lamb16.lab.shapes import Shape
from lamb16.lab.study import report
from lamb16.lab.timing import Row
from lamb16.lab.training import state_bytes

COMMON: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
PARTS = ("weights", "gradients", "state", "buffers")
HEADER = ["bytes per parameter", "weights", "gradients", "state", "work buffers", "total", "measured peak"]
Named = list[tuple[str, nn.Parameter]]


class Chain(nn.Module):
    """A linear layer for each tensor with rows, an addition for each without; vectors are repeated or cut to fit."""

    def __init__(self, shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(shape, generator=generator) / math.sqrt(max(1, math.prod(shape[1:]))) for shape in shapes
        ]
        self.weights = nn.ParameterList([nn.Parameter(w.to(device, dtype)) for w in weights])

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what comes out, 0-d; ``x`` [any number] of the weights' dtype."""
        for w in self.weights:
            if w.dim() > 1:
                w = w.flatten(1)
                x = F.linear(_fitted(x, w.shape[1]), w)
            else:
                x = _fitted(x, w.numel()) + w.view(-1)
        return x.sum()


def _fitted(x: Tensor, count: int) -> Tensor:
    return x.repeat(-(-count // x.numel()))[:count]


class Measured(NamedTuple):
    """An optimizer over weights of a dtype; with ``released`` gradients are freed at once."""

    name: str
    dtype: torch.dtype
    build: Callable[[Named], Optimizer]
    released: bool = False
    module: str = "torch"


def _lamb16(**options: Any) -> Callable[[Named], Optimizer]:
    return lambda named: lamb16.Lamb16(named, **COMMON, **options)


def _peer(name: str, **options: Any) -> Callable[[Named], Optimizer]:
    return lambda named: registry.build(name, named, **COMMON, **options)


def _adamw(named: Named) -> Optimizer:
    return AdamW([p for _, p in named], **COMMON, fused=True)


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
OWN = [
    Measured(f"Lamb16, {what}{', gradients released' * released}", dtype, _lamb16(**options), released)
    for what, dtype, options in (
        ("float32", FLOAT32, {}),
        ("bfloat16 exact", BFLOAT16, {"param_rounding": "exact"}),
        ("bfloat16 stochastic", BFLOAT16, {"param_rounding": "stochastic"}),
    )
    for released in (False, True)
]
OTHERS = [
    Measured("AdamW, float32", FLOAT32, _adamw),
    Measured("AdamW, bfloat16", BFLOAT16, _adamw),
    Measured("AdamW8bit (torchao), float32", FLOAT32, _peer("adamw8bit"), module="torchao"),
    Measured(
        "AdamW8bit (torchao), bfloat16 stochastic",
        BFLOAT16,
        _peer("adamw8bit", bf16_stochastic_round=True),
        module="torchao",
    ),
    Measured("AdamW8bit (bitsandbytes), float32", FLOAT32, _peer("adamw8bit-bnb"), module="bitsandbytes"),
    Measured("AdamW8bit (bitsandbytes), bfloat16", BFLOAT16, _peer("adamw8bit-bnb"), module="bitsandbytes"),
]


def measure(shapes: list[Shape], device: torch.device, measured: list[Measured] | None = None) -> list[Row]:
    """One row for each optimizer that is installed, or the reason why it cannot take a step as its ``error``."""
    rows = []
    for one in [*OTHERS, *OWN] if measured is None else measured:
        if importlib.util.find_spec(one.module) is None:
            continue
        print(f"  {one.name} ...", file=sys.stderr)
        try:
            row(one, shapes, device)  # what is compiled leaves things behind
            rows.append(row(one, shapes, device))
        except Exception as error:
            rows.append({"name": one.name, "error": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
    return rows


def row(measured: Measured, shapes: list[Shape], device: torch.device) -> Row:
    """Bytes per parameter, by the names in ``PARTS``, their ``total``, and the ``peak`` of a training step."""
    gc.collect()
    model, x = Chain(shapes, measured.dtype, device), torch.ones(1, dtype=measured.dtype, device=device)
    params = list(model.parameters())
    found: Row = {"weights": _bytes(params)}
    kept: list[Any] = []

    def training_step() -> None:
        optimizer: Optimizer = kept[0]
        optimizer.zero_grad()
        model(x).backward()
        found["gradients"] = _bytes([p.grad for p in params if p.grad is not None])
        optimizer.step()

    def begin() -> None:
        kept.append(measured.build(list(model.named_parameters())))
        if measured.released:
            kept.append(lamb16.release_gradients(model, kept[0]))
        for _ in range(2):
            training_step()
        gc.collect()

    held, _ = timing.traced_bytes(begin, device)
    found["state"] = state_bytes(kept[0])
    found["buffers"] = held - found["state"] - found["gradients"]
    found["total"] = sum(found[part] for part in PARTS)
    found["peak"] = found["weights"] + held + timing.peak_bytes(training_step, device)
    for handle in kept[1:]:
        handle.remove()
    numel = sum(p.numel() for p in params)
    return {"name": measured.name} | {key: value / numel for key, value in found.items()}


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    keys = (*PARTS, "total", "peak")
    return report.table(
        HEADER,
        [
            [one["name"], f"could not run: {one['error']}", *[""] * (len(keys) - 1)]
            if "error" in one
            else [one["name"], *(f"{one[key]:.2f}" for key in keys)]
            for one in rows
        ],
    )
