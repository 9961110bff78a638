"""States of other optimizers that cannot become Lamb16's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ..sharding.layout import is_sharded

OVERFLOW = 2.0**127  # of a second moment, as in reference.py


def check_entries(surplus: Collection[str], name: str) -> None:
    """Raise ValueError for a state with entries that are neither moments nor known to belong to them."""
    if surplus:
        raise ValueError(
            f"Lamb16.load_state_dict: the state of parameter {name} is another optimizer's and has the entries "
            f"{sorted(surplus)}, of which Lamb16 knows nothing; delete these to load its moments alone"
        )


def check_moment(value: Any, param: Tensor, where: str) -> None:
    """Raise ValueError for what is no moment of this parameter; ``where`` begins the message."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is {type(value).__name__}, expected a tensor")
    if value.shape != param.shape:
        raise ValueError(
            f"{where} has shape {tuple(value.shape)}, but the parameter has shape {tuple(param.shape)}: the "
            "checkpoint belongs to another model"
        )
    if is_sharded(value) and not is_sharded(param):
        raise ValueError(f"{where} is sharded (a DTensor), the parameter not; gather it first")


def check_extremes(low: float, high: float, where: str, second: bool) -> None:
    """Raise ValueError for values between these that are no first or ``second`` moment's."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{where} holds an infinity or a NaN: it is damaged")
    if second and (low < 0 or high >= OVERFLOW):
        raise ValueError(f"{where} holds {low if low < 0 else high}, which is no second moment")


def check_step(step: Any, name: str) -> None:
    """Raise ValueError for what is no number of steps."""
    if step is None or (isinstance(step, Tensor) and step.numel() != 1) or not 0 <= float(step) <= 2**31:
        raise ValueError(
            f"Lamb16.load_state_dict: step of parameter {name} is {step!r}, expected a number of steps in its state or "
            "its group"
        )


def warn_of_rates(taken: Mapping[int, tuple[float, float]]) -> None:
    """Warn where another optimizer's learning rate takes the place of this one's, the first, in a group."""
    for k, (old, new) in taken.items():
        if not math.isclose(new, old, rel_tol=1e-6):  # torchao's are tensors in float32
            warnings.warn(
                f"Lamb16.load_state_dict: lr={new:g} of the state, which another optimizer made, replaces lr={old:g} "
                f"in group {k}; where AdamW's rate served, three to ten times as much serves "
                "Lamb16: set lr after loading (docs/recipes.md)",
                stacklevel=4,
            )
            return


def check_betas(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for the group of an optimizer that is not of Adam's kind."""
    if "betas" not in group:
        raise ValueError(
            f"Lamb16.load_state_dict: {where} has no betas: this is the state of another optimizer, without Adam's "
            "two moments"
        )
