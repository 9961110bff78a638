"""How moments are kept: in which dtypes, by the name that ``moment_dtype`` has for them, and as which bytes.

:data:`lamb16.hyper.MOMENT_DTYPES` declares the names and dtypes; what follows from them is here. Arithmetic has
``float8``, whether moments are fp8 codes with a scale or float32 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hyper import MOMENT_DTYPES

MOMENTS = ("exp_avg_codes", "exp_avg_sq_codes")
FLOAT8, FLOAT32 = MOMENT_DTYPES
BYTES = torch.uint8  # of codes in state dicts, pickles and graphs
CODES = dict(zip(MOMENTS, MOMENT_DTYPES[FLOAT8], strict=True))


def in_float8(group: dict[str, Any]) -> bool:
    """Whether the moments of a group's parameters are codes."""
    return bool(group["moment_dtype"] == FLOAT8)


def dtypes(float8: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of both moments."""
    return MOMENT_DTYPES[FLOAT8 if float8 else FLOAT32]


def graph_dtype(float8: bool) -> torch.dtype:
    """Of moments as graphs see them: fp8 types do not compile before sm_89."""
    return BYTES if float8 else MOMENT_DTYPES[FLOAT32][0]


def allowed(moment_dtype: str) -> list[tuple[torch.dtype, ...]]:
    """Of each moment the dtypes in which it may be handed over, its own first: codes may be bytes."""
    return [(x, BYTES) if moment_dtype == FLOAT8 else (x,) for x in MOMENT_DTYPES[moment_dtype]]


def are_codes(moment: Tensor) -> bool:
    """Whether this is a moment in codes, as fp8 or as bytes."""
    return moment.element_size() == 1


def raw(tensor: Tensor) -> Tensor:
    """Codes as a view of bytes, which all of torch knows; what is none as it is."""
    return tensor.view(BYTES) if tensor.element_size() == 1 else tensor
