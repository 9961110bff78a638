"""The hyperparameters, declared once: name, default, rule and message.

What checks values, fills parameter groups, makes the step's table, the C structure, the command-line options of
``export`` and ``train`` and the C harness's input follows from the fields of :class:`Hyper`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

MOMENT_DTYPES = {
    "float8": (torch.float8_e4m3fn, torch.float8_e5m2),
    "float32": (torch.float32, torch.float32),
}
ROUNDINGS = ("stochastic", "nearest", "exact")  # of weights with 16 bits
HAIR = 1e-9  # below 0 that a scheduler may end, by rounding
SMALLEST_EPS = 2.0**-100  # so that eps · (1 − β1) is a normal float32 too


def _number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _number(value) and value > 0  # type: ignore[operator]


def _non_negative(value: object) -> bool:
    return _number(value) and value >= 0  # type: ignore[operator]


def _lr(value: object) -> bool:
    if not isinstance(value, Tensor):
        return _non_negative(value)
    # Values on other devices are not read: that would wait for the device.
    return (
        value.numel() == 1 and value.is_floating_point() and (value.device.type != "cpu" or _non_negative(value.item()))
    )


def _running_lr(value: object) -> bool:
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
        return value.is_floating_point() and _running_lr(value.item())
    return _lr(value) if isinstance(value, Tensor) else _number(value) and value >= -HAIR  # type: ignore[operator]


def _betas(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value)


def _eps(value: object) -> bool:
    return _number(value) and SMALLEST_EPS <= value <= 1  # type: ignore[operator]


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _option(default: Any, valid: Callable[[object], bool], wanted: str) -> Any:
    return field(default=default, metadata={"valid": valid, "wanted": wanted})


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of one tensor; :class:`lamb16.Lamb16` says what they mean."""

    lr: float = _option(0.01, _lr, "a finite number >= 0 or a one-element floating-point tensor")
    betas: tuple[float, float] = _option((0.9, 0.999), _betas, "two numbers in [0, 1)")
    eps: float = _option(
        1e-6, _eps, "a number in [2^-100, 1] (it is also the lower clamp of squared updates in their norm)"
    )
    weight_decay: float = _option(0.0, _non_negative, "a finite number >= 0")
    trust_scale: float = _option(0.382, _non_negative, "a finite number >= 0")
    trust_lr: float = _option(1e-3, _positive, "a finite number > 0")
    trust_clip: float = _option(2.0, _positive, "a finite number > 0")
    bias_correction: bool = _option(True, _flag, "True or False")
    nesterov: bool = _option(True, _flag, "True or False")
    caution: bool = _option(False, _flag, "True or False")
    maximize: bool = _option(False, _flag, "True or False")
    moment_dtype: str = _option(
        "float8", lambda value: isinstance(value, str) and value in MOMENT_DTYPES, "'float8' or 'float32'"
    )
    param_rounding: str = _option(
        "stochastic", lambda value: isinstance(value, str) and value in ROUNDINGS, "'stochastic', 'nearest' or 'exact'"
    )


NAMES = tuple(f.name for f in fields(Hyper))
FLAGS = tuple(f.name for f in fields(Hyper) if isinstance(f.default, bool))
WORDS = tuple(f.name for f in fields(Hyper) if isinstance(f.default, str))  # what a step is specialised on


def numbers_of(values: dict[str, Any]) -> dict[str, float]:
    """The hyperparameters that are numbers or flags under their names in tables and in C: betas become two."""
    found: dict[str, float] = {}
    for name in NAMES:
        if name == "betas":
            found |= {"beta1": float(values[name][0]), "beta2": float(values[name][1])}
        elif name not in WORDS:
            found[name] = float(values[name])
    return found


NUMBERS = tuple(numbers_of(vars(Hyper())))


def check_hyperparameters(group: dict[str, Any], where: str = "", *, running: bool = False) -> None:
    """Raise ValueError naming the first hyperparameter of ``group`` that is out of range.

    ``running``: none may be missing, and lr, which schedulers own by then, may be a :data:`HAIR` below 0.
    """
    for f in fields(Hyper):
        if running and f.name not in group:
            raise ValueError(f"Lamb16{where}: a parameter group has no {f.name}; set it, or give the group to Lamb16")
        valid = _running_lr if running and f.name == "lr" else f.metadata["valid"]
        if f.name in group and not valid(group[f.name]):
            raise ValueError(f"Lamb16{where}: {f.name}={group[f.name]!r} is invalid; it must be {f.metadata['wanted']}")


def check_max_grad_norm(value: object) -> None:
    """Raise ValueError for a ``max_grad_norm`` that is neither None nor a number > 0 (infinity included)."""
    if value is not None and not (value == math.inf or _positive(value)):
        raise ValueError(
            f"Lamb16: max_grad_norm={value!r} is invalid; it must be None or a number > 0 (inf only measures the norm)"
        )
