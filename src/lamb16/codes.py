"""Codes and remainders as the bytes that state dicts and pickles hold, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .moments import BYTES, CODES
from .sharding.layout import is_sharded, like, local

REMAINDER = "param_remainder"


def map_codes(state: Any, convert: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy of one parameter's state with its codes and remainders converted."""
    if not isinstance(state, dict):
        return state
    return {key: convert(key, value) if key in (*CODES, REMAINDER) else value for key, value in state.items()}


def as_bytes(key: str, codes: Tensor) -> Tensor:
    """Of these entries; float32 moments as they are."""
    if key == REMAINDER:
        return remainder_as_bytes(codes)
    return like(codes, local(codes).view(BYTES)) if codes.dtype == CODES[key] else codes


def as_fp8(key: str, codes: Tensor) -> Tensor:
    """What :func:`as_bytes` made bytes of; what is none as it is."""
    if key == REMAINDER:
        found: Tensor = remainder_from_bytes(codes)
        return found
    return like(codes, local(codes).view(CODES[key])) if codes.dtype == BYTES else codes


def remainder_as_bytes(remainder: Tensor) -> Tensor:
    """int16 [...] as uint8 [..., 2], which every collective knows; int16 neither NCCL's nor gloo's do. In place."""
    if remainder.dtype != torch.int16:
        return remainder
    return like(remainder, local(remainder).unsqueeze(-1).view(torch.uint8), 2)


def remainder_from_bytes(value: Any) -> Any:
    """int16 [...] of what :func:`remainder_as_bytes` returned; everything else as it is."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.shape[-1:] != (2,):
        return value
    found = local(value).contiguous().view(torch.int16).squeeze(-1)
    return like(value[..., 0], found) if is_sharded(value) else found
