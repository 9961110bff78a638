"""Codes and remainders as the bytes that state dicts and pickles hold, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import remainder
from .entries import MOMENTS
from .hyper import MOMENT_DTYPES
from .remainder import REMAINDER
from .sharding.layout import like, local

CODES = dict(zip(MOMENTS, MOMENT_DTYPES["float8"], strict=True))


def map_codes(state: Any, convert: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy of one parameter's state with its codes and remainders converted."""
    if not isinstance(state, dict):
        return state
    return {key: convert(key, value) if key in (*CODES, REMAINDER) else value for key, value in state.items()}


def as_bytes(key: str, codes: Tensor) -> Tensor:
    """Of these entries; float32 moments as they are."""
    if key == REMAINDER:
        return remainder.as_bytes(codes)
    return like(codes, local(codes).view(torch.uint8)) if codes.dtype == CODES[key] else codes


def as_fp8(key: str, codes: Tensor) -> Tensor:
    """What :func:`as_bytes` made bytes of; what is none as it is."""
    if key == REMAINDER:
        found: Tensor = remainder.from_bytes(codes)
        return found
    return like(codes, local(codes).view(CODES[key])) if codes.dtype == torch.uint8 else codes
