"""What Lamb16 refuses: hyperparameters by value, parameters and gradients by name, state dicts by their first fault."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sharding import is_sharded, local

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENT_DTYPES = {
    "float8": (torch.float8_e4m3fn, torch.float8_e5m2),
    "float32": (torch.float32, torch.float32),
}
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


def _betas(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value)


def _eps(value: object) -> bool:
    return _number(value) and SMALLEST_EPS <= value <= 1  # type: ignore[operator]


def _flag(value: object) -> bool:
    return isinstance(value, bool)


RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "lr": (_lr, "a finite number >= 0 or a one-element floating-point tensor"),
    "betas": (_betas, "two numbers in [0, 1)"),
    "eps": (_eps, "a number in [2^-100, 1] (it is also the lower clamp of squared updates in their norm)"),
    "weight_decay": (_non_negative, "a finite number >= 0"),
    "trust_scale": (_non_negative, "a finite number >= 0"),
    "trust_lr": (_positive, "a finite number > 0"),
    "trust_clip": (_positive, "a finite number > 0"),
    "bias_correction": (_flag, "True or False"),
    "maximize": (_flag, "True or False"),
    "moment_dtype": (lambda value: isinstance(value, str) and value in MOMENT_DTYPES, "'float8' or 'float32'"),
}


def check_hyperparameters(group: dict[str, Any], where: str = "", *, running: bool = False) -> None:
    """Raise ValueError naming the first hyperparameter of ``group`` that is out of range.

    ``running``: leave out lr, which schedulers own by then; some end a hair below 0.
    """
    for name, (valid, wanted) in RULES.items():
        if name in group and not (running and name == "lr") and not valid(group[name]):
            raise ValueError(f"Lamb16{where}: {name}={group[name]!r} is invalid; it must be {wanted}")


def check_parameter(param: Tensor, name: str) -> None:
    """Raise TypeError or ValueError for a parameter that cannot be optimized."""
    if param.is_complex():
        raise TypeError(
            f"Lamb16: parameter {name} is complex ({param.dtype}), which has no fp8 moments; "
            "optimize torch.view_as_real(parameter) instead"
        )
    if param.layout != torch.strided:
        raise TypeError(f"Lamb16: parameter {name} is sparse ({param.layout}); only dense parameters are supported")
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"Lamb16: parameter {name} has dtype {param.dtype}; supported are float32, bfloat16 and float16 "
            "(convert it with .float())"
        )


def check_gradient(grad: Tensor, name: str) -> None:
    """Raise RuntimeError for a gradient that cannot be used."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"Lamb16 does not support sparse gradients, and parameter {name} has one ({grad.layout}); "
            "build the embedding with sparse=False"
        )
    if grad.dtype not in PARAM_DTYPES:
        raise RuntimeError(
            f"Lamb16: the gradient of parameter {name} has dtype {grad.dtype}; expected float32, bfloat16 or float16"
        )


def check_state(state: dict[str, Any], param: Tensor, name: str, moment_dtype: str) -> None:
    """Raise ValueError unless ``state`` is a Lamb16 state for ``param`` with codes as uint8 or fp8."""
    wanted = {"step", "exp_avg", "exp_avg_norm", "exp_avg_sq", "exp_avg_sq_norm", "salt"}
    if set(state) != wanted:
        raise ValueError(
            f"Lamb16.load_state_dict: the state of parameter {name} has the entries {sorted(map(str, state))}, not "
            f"{sorted(wanted)}: this is the state of another optimizer"
        )
    for key, dtype in zip(("exp_avg", "exp_avg_sq"), MOMENT_DTYPES[moment_dtype], strict=True):
        value = state[key]
        allowed = (dtype,) if moment_dtype == "float32" else (dtype, torch.uint8)
        if not isinstance(value, Tensor) or value.dtype not in allowed:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is {found}, expected "
                f"{' or '.join(map(str, allowed))} for moment_dtype={moment_dtype!r}"
            )
        if is_sharded(value) and not is_sharded(param):
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is spread over ranks (DTensor), the parameter not; "
                "gather it first (get_optimizer_state_dict with StateDictOptions(full_state_dict=True))"
            )
        if value.dtype != torch.float32 and _has_nan(local(value), key):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} holds NaN codes: it is damaged")
        if value.shape != param.shape:
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} has shape {tuple(value.shape)}, but the parameter "
                f"has shape {tuple(param.shape)}: the checkpoint belongs to another model"
            )
    for key in ("exp_avg_norm", "exp_avg_sq_norm", "step", "salt"):
        value = state[key]
        if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.numel() != 1):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} is {value!r}, expected one number")
        if not math.isfinite(float(value)):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} is {float(value)!r}")
    for key in ("exp_avg_norm", "exp_avg_sq_norm"):
        _check_norm(float(state[key]), key, name)
    if not 0 <= int(state["step"]) < 2**31:
        raise ValueError(
            f"Lamb16.load_state_dict: step of parameter {name} is {int(state['step'])}, expected 0..2^31-1"
        )


def _check_norm(value: float, key: str, name: str) -> None:
    if not (2.0**-126 <= value < math.inf and math.frexp(value)[0] == 0.5):
        raise ValueError(
            f"Lamb16.load_state_dict: {key} of parameter {name} is {value!r}, expected a positive power of two: the "
            "checkpoint was cast to a smaller dtype or is damaged"
        )


def _has_nan(codes: Tensor, key: str) -> bool:
    """Whether fp8 codes of a first (e4m3fn) or second (e5m2) moment hold a NaN or an infinity."""
    magnitude = codes.view(torch.uint8) & 0x7F
    return bool((magnitude > (0x7E if key == "exp_avg" else 0x7B)).any())


def check_state_dict(state_dict: Any) -> None:
    """Raise ValueError unless ``state_dict`` is made like an optimizer's."""
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get(key), kind):
            raise ValueError(f"Lamb16.load_state_dict: no optimizer state dict: it has no {kind.__name__} {key!r}")


def check_groups(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless both have the same groups of the same sizes."""
    if len(saved) != len(current):
        raise ValueError(
            f"Lamb16.load_state_dict: the state dict has {len(saved)} parameter groups, this optimizer {len(current)}"
        )
    for k, (a, b) in enumerate(zip(saved, current, strict=True)):
        if "params" not in a:
            raise ValueError(f"Lamb16.load_state_dict: group {k} of the state dict has no 'params'")
        if len(a["params"]) != len(b["params"]):
            raise ValueError(
                f"Lamb16.load_state_dict: group {k} of the state dict has {len(a['params'])} parameters, "
                f"the optimizer's has {len(b['params'])}"
            )


def check_owners(state_dict: dict[str, Any]) -> None:
    """Raise ValueError for a state that belongs to no parameter."""
    named = {key for group in state_dict["param_groups"] for key in group["params"]}
    unknown = [key for key in state_dict["state"] if isinstance(key, int) and key not in named]
    if unknown:
        raise ValueError(f"Lamb16.load_state_dict: there is a state for {unknown[0]!r}, which no parameter group names")
