"""The optimizers that are compared, by name: this project's, torch's, and the low-bit ones of other libraries."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lamb16
from lamb16.hyper import NAMES
from lamb16.lab.errors import CommandError

Named = Iterable[tuple[str, Tensor]]
MOST_SHAPES = 100  # torchao compiles for every shape, a second or so each


@dataclass(frozen=True)
class OptimizerInfo:
    """How an optimizer is made; ``module`` must be importable, ``special`` are the options that only it has."""

    label: str
    build: Callable[..., Optimizer]
    default_lr: float
    module: str = "torch"
    special: frozenset[str] = frozenset()


def _foreign(module: str, name: str, **always: Any) -> Callable[..., Optimizer]:
    """An optimizer of another library, which is imported when it is made."""

    def build(named: Named, **settings: Any) -> Optimizer:
        optimizer: Optimizer = getattr(importlib.import_module(module), name)(_plain(named), **settings, **always)
        return optimizer

    return build


def _plain(named: Named) -> list[Tensor]:
    return [p for _, p in named]


REGISTRY = {
    "lamb16": OptimizerInfo(
        "Lamb16",
        lamb16.Lamb16,
        0.01,
        special=frozenset({*NAMES, "max_grad_norm", "compile", "seed"}),
    ),
    "lamb": OptimizerInfo("LAMB (FP32)", lamb16.Lamb, 0.01),
    "adam": OptimizerInfo("Adam", torch.optim.Adam, 0.001),
    "adamw": OptimizerInfo("AdamW", torch.optim.AdamW, 0.001),
    "nadam": OptimizerInfo("NAdam", _foreign("torch.optim", "NAdam", decoupled_weight_decay=True), 0.001),
    "adamw-kahan": OptimizerInfo("AdamW with Kahan summation (optimi)", _foreign("optimi", "AdamW"), 0.001, "optimi"),
    "published": OptimizerInfo("PublishedLamb16", lamb16.PublishedLamb16, 0.01),
    "adamw8bit": OptimizerInfo(
        "AdamW8bit (torchao)",
        _foreign("torchao.optim", "AdamW8bit"),
        0.001,
        "torchao",
        special=frozenset({"bf16_stochastic_round"}),
    ),
    "adamwfp8": OptimizerInfo("AdamWFp8 (torchao)", _foreign("torchao.optim", "AdamWFp8"), 0.001, "torchao"),
    "adamw4bit": OptimizerInfo("AdamW4bit (torchao)", _foreign("torchao.optim", "AdamW4bit"), 0.001, "torchao"),
    "adamw8bit-bnb": OptimizerInfo(
        "AdamW8bit (bitsandbytes)", _foreign("bitsandbytes.optim", "AdamW8bit"), 0.001, "bitsandbytes"
    ),
    "lamb-timm": OptimizerInfo("LAMB (timm)", _foreign("timm.optim", "Lamb"), 0.01, "timm"),
    "lamb-timm-cautious": OptimizerInfo(
        "LAMB (timm), cautious", _foreign("timm.optim", "Lamb", caution=True), 0.01, "timm"
    ),
    "lamb-po": OptimizerInfo(
        "LAMB (pytorch_optimizer)", _foreign("pytorch_optimizer", "Lamb"), 0.01, "pytorch_optimizer"
    ),
}


def label(name: str, caution: bool = False, apart: bool = False) -> str:
    """The optimizer's name in tables and plots; ``apart``: biases and norms have a parameter group of their own."""
    return REGISTRY[name].label + (", caution" if caution else "") + (", biases and norms apart" if apart else "")


def build(name: str, named: Named, *, lr: float | None, weight_decay: float, **options: Any) -> Optimizer:
    """The optimizer ``name`` over named parameters; of the ``options`` it gets those that it has."""
    info, named = REGISTRY[name], list(named)
    shapes = len({p.shape for _, p in named})
    if info.module == "torchao" and shapes > MOST_SHAPES:
        raise CommandError(f"left out: it would compile for each of {shapes} shapes")
    accepted = {key: value for key, value in options.items() if key in info.special | {"betas"}}
    try:
        return info.build(named, lr=lr, weight_decay=weight_decay, **accepted)
    except ImportError as error:
        raise CommandError(
            f"{info.label} needs '{info.module}' ({error}); install it with: pip install 'lamb16[peers]'"
        ) from error


@functools.cache
def why_unusable(name: str, device: str = "cpu") -> str | None:
    """None if the optimizer can take a step on ``device``, else the reason in one line; tried on a small tensor."""
    p = nn.Parameter(torch.ones(64, 64, device=device))
    p.grad = torch.ones_like(p)
    try:
        build(name, [("p", p)], lr=1e-3, weight_decay=0.01, compile=False).step()
        finite = bool(torch.isfinite(p).all()) and not bool((p == 1).all())
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None if finite else "its step left the weights as they were, or made them non-finite"


def unusable(names: Iterable[str]) -> dict[str, str]:
    """Why, by name, those do not work here that do not."""
    reasons = {name: why_unusable(name) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}
