"""States that cannot be stepped or loaded, and state dicts that are not of this optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codes import REMAINDER, remainder_from_bytes
from ..entries import DERIVED, ENTRIES, MAXIMA, SCALARS, chunks
from ..moments import MOMENTS, allowed, are_codes
from ..sharding.layout import is_sharded, local
from .remainders import check_remainder

SHOWN = 4  # names that an error lists


def check_state(state: dict[str, Any], param: Tensor, name: str, moment_dtype: str) -> None:
    """Raise ValueError unless ``state`` is a Lamb16 state for ``param`` with codes as uint8 or fp8.

    What version 0.1 did not have may be missing; entries that others added are theirs to check.
    """
    if _missing(state):
        raise ValueError(
            f"Lamb16.load_state_dict: the state of parameter {name} has the entries {sorted(map(str, state))}, not "
            f"{sorted(ENTRIES)}: this is the state of another optimizer"
        )
    for key, known in zip(MOMENTS, allowed(moment_dtype), strict=True):
        value = state[key]
        if not isinstance(value, Tensor) or value.dtype not in known:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is {found}, expected "
                f"{' or '.join(map(str, known))} for moment_dtype={moment_dtype!r}"
            )
        if is_sharded(value) and not is_sharded(param):
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is sharded (a DTensor), the parameter not; "
                "gather it first (get_optimizer_state_dict with StateDictOptions(full_state_dict=True))"
            )
        if are_codes(value) and _has_nan(local(value), key):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} holds NaN codes: it is damaged")
        if value.shape != param.shape:
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} has shape {tuple(value.shape)}, but the parameter "
                f"has shape {tuple(param.shape)}: the checkpoint belongs to another model"
            )
    check_remainder(remainder_from_bytes(state.get(REMAINDER)), param, name, ".load_state_dict")
    for key in (key for key in SCALARS if key in state and key not in MAXIMA):
        value = state[key]
        if not _is_number(value):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} is {value!r}, expected one number")
        if not math.isfinite(float(value)):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} is {float(value)!r}")
    for key in ("exp_avg_scale", "exp_avg_sq_scale"):
        _check_scale(float(state[key]), key, name)
    if not 0 <= int(state["step"]) < 2**31:
        raise ValueError(
            f"Lamb16.load_state_dict: step of parameter {name} is {int(state['step'])}, expected 0..2^31-1"
        )
    for key, most in (
        ("weight_sum", param.numel() << 20),
        ("update_sum", param.numel() << 20),
        ("mask_count", param.numel()),
        ("param_checksum", 2**32 - 1),
    ):
        if key in state and not 0 <= int(state[key]) <= most:
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is {int(state[key])}, expected 0..{most}: the "
                "checkpoint belongs to another model or is damaged"
            )


def check_live_state(state: dict[str, Any], param: Tensor, name: str, moment_dtype: str) -> None:
    """Raise ValueError unless a step can go on with what is in the state of ``param``, or with copies of it.

    Codes may be uint8, not contiguous or on another device. Values are not read.
    """
    missing = _missing(state)
    if missing:
        raise ValueError(
            f"Lamb16: the state of parameter {name} has no {sorted(missing)}; delete optimizer.state[parameter] to "
            "start anew, or load a state with Lamb16.load_state_dict"
        )
    for key in set(SCALARS) & set(state):
        if not _is_number(state[key]):
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is {state[key]!r}, expected one number; load states with "
                "Lamb16.load_state_dict, cut and extend parameters with optimizer.resize(p, index, new_p)"
            )
    for key, known in zip(MOMENTS, allowed(moment_dtype), strict=True):
        value = state[key]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is {value!r}, expected a tensor; delete "
                "optimizer.state[parameter] to start anew, or load a state with Lamb16.load_state_dict"
            )
        if is_sharded(value) != is_sharded(param):
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is not sharded over the ranks as the parameter is; load states "
                "with Lamb16.load_state_dict, or with torch.distributed.checkpoint.state_dict"
            )
        if value.shape != param.shape or local(value).shape != local(param).shape:
            raise ValueError(
                f"Lamb16: parameter {name} has shape {tuple(param.shape)}, but its state was made for "
                f"{tuple(value.shape)}; change a parameter's rows with optimizer.resize(p, index, new_p), or "
                "delete optimizer.state[parameter]"
            )
        if value.dtype not in known:
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is {value.dtype}, but its group has "
                f"moment_dtype={moment_dtype!r}, which needs {known[0]}; moment_dtype cannot change after "
                "the first step, and states must be loaded with Lamb16.load_state_dict"
            )


def _missing(state: dict[str, Any]) -> set[str]:
    """What a state of every version has, and this one has not."""
    return set(ENTRIES) - set(DERIVED) - set(state)


def _is_number(value: Any) -> bool:
    return isinstance(value, (Tensor, int, float)) and not (isinstance(value, Tensor) and value.numel() != 1)


def _check_scale(value: float, key: str, name: str) -> None:
    if not (2.0**-126 <= value < math.inf and math.frexp(value)[0] == 0.5):
        raise ValueError(
            f"Lamb16.load_state_dict: {key} of parameter {name} is {value!r}, expected a positive power of two: the "
            "checkpoint was cast to a smaller dtype or is damaged. Keep 0-d entries out of such a cast (float16 loses "
            "them, bfloat16 does not)"
        )


def _has_nan(codes: Tensor, key: str) -> bool:
    """Whether fp8 codes of a first (e4m3fn) or second (e5m2) moment hold a NaN or an infinity."""
    largest = torch.zeros((), dtype=torch.uint8, device=codes.device)
    for chunk in chunks(codes.reshape(-1).view(torch.uint8)):
        if chunk.numel():
            largest = torch.maximum(largest, (chunk & 0x7F).max())
    return int(largest) > (0x7E if key == "exp_avg_codes" else 0x7B)


def check_state_dict(state_dict: Any) -> None:
    """Raise ValueError unless ``state_dict`` is made like an optimizer's."""
    for key, kinds in (("state", (dict,)), ("param_groups", (list, tuple))):
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get(key), kinds):
            raise ValueError(f"Lamb16.load_state_dict: no optimizer state dict: it has no {kinds[0].__name__} {key!r}")


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


def check_unknown_states(state_dict: dict[str, Any]) -> None:
    """Raise ValueError for a state that belongs to no parameter."""
    named = {key for group in state_dict["param_groups"] for key in group["params"]}
    unknown = [key for key in state_dict["state"] if isinstance(key, int) and key not in named]
    if unknown:
        raise ValueError(f"Lamb16.load_state_dict: there is a state for {unknown[0]!r}, which no parameter group names")


def check_names_match(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ValueError where parameters are on one side only: ``missing`` ones here, ``unexpected`` ones there."""
    if missing or unexpected:
        lacks = [f"the state dict has no {_shown(missing)}"] * bool(missing)
        lacks += [f"this optimizer has no {_shown(unexpected)}"] * bool(unexpected)
        raise ValueError(
            f"Lamb16.load_state_dict: {'; '.join(lacks)}. Load the same model's state, or pass strict=False, which "
            "loads what fits and returns the rest"
        )


def check_groups_match(kept: Sequence[int], saved: int, names: Sequence[Sequence[str]]) -> None:
    """Raise ValueError where there are groups here, with these names of members, that are none of the saved ones."""
    if kept:
        raise ValueError(
            f"Lamb16.load_state_dict: group {kept[0]} ({_shown(list(names[kept[0]]))}) is no group of the state dict, "
            f"which has {saved} groups, this optimizer {len(names)}. Group the parameters alike, or pass "
            "strict=False, which loads the states and keeps such groups' hyperparameters"
        )


def warn_of_other_moments(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> None:
    """Warn of groups whose moments are kept in another way from here on than the optimizer was made for."""
    for k, (new, old) in enumerate(zip(saved, own, strict=True)):
        if new["moment_dtype"] != old["moment_dtype"]:
            warnings.warn(
                f"Lamb16.load_state_dict: group {k} has moment_dtype={new['moment_dtype']!r} in the state, and "
                f"{old['moment_dtype']!r} in the optimizer, which goes on with the state's",
                stacklevel=4,
            )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
