"""Comparison of tensors bit by bit, and where and how they differ."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def difference(a: Tensor, b: Tensor) -> str:
    """In words; empty where the bits are the same. NaN equals NaN of the same bits, and 0 differs from -0."""
    a, b = a.detach().cpu(), b.detach().cpu()
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{tuple(a.shape)} of {a.dtype} against {tuple(b.shape)} of {b.dtype}"
    x, y = (t.view(INTEGERS[t.element_size()]) for t in (a, b))
    if torch.equal(x, y):
        return ""
    places = (x != y).nonzero()
    at = tuple(places[0].tolist())
    mask = (1 << 8 * a.element_size()) - 1
    shown = " against ".join(f"{float(t[at]):.9g} ({int(i[at]) & mask:#x})" for t, i in ((a, x), (b, y)))
    return f"{len(places)} of {x.numel()} elements, the first at {list(at)}: {shown}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return not difference(a, b)


def assert_same_bits(a: Tensor, b: Tensor, what: object = "the tensors") -> None:
    found = difference(a, b)
    assert not found, f"{what} differ: {found}"


def raw(tensor: Tensor) -> Tensor:
    """A copy of the bytes of a tensor in its logical order."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
