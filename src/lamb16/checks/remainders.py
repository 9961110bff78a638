"""Remainders of exact weights that a step or a load cannot take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codes import REMAINDER
from ..sharding.layout import is_sharded, local
from ..wrapped import has_memory


def check_remainder(value: Any, param: Tensor, name: str, where: str = "") -> None:
    """Raise ValueError for remainders, int16, of another kind or shape than the parameter's; there may be none."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.int16 or value.shape != param.shape:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Lamb16{where}: {REMAINDER} of parameter {name} is {found}, expected torch.int16 {tuple(param.shape)}; "
            "without it (delete the entry) the weights go on as they are"
        )
    if not has_memory(local(value)):
        raise ValueError(
            f"Lamb16{where}: {REMAINDER} of parameter {name} has no memory (its storage was resized to 0 bytes); bring "
            "it back before step"
        )
    if is_sharded(value) and not is_sharded(param):
        raise ValueError(
            f"Lamb16{where}: {REMAINDER} of parameter {name} is sharded (a DTensor), the parameter not; gather "
            "it first (.full_tensor())"
        )


def check_remainder_shard(value: Tensor, param: Tensor, name: str) -> None:
    """Raise ValueError for remainders, right as a whole, that are not sharded as the parameter is."""
    if local(value).shape != local(param).shape:
        raise ValueError(
            f"Lamb16: {REMAINDER} of parameter {name} is not sharded over the ranks as the parameter is; load "
            "states with Lamb16.load_state_dict"
        )
