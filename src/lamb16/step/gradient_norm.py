"""The norm of all gradients, as integers, and the factor that brings it to ``max_grad_norm``.

Every square counts in units of 2^-40 of the power of two above the largest gradient, as ``reference.grad_norm`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Gathered, Norm, Stages
from .factors import largest_of, sum_of
from .floats import INF_BITS, UNIT, sqrt64
from .fp8 import as_int32

if TYPE_CHECKING:
    from ..sharding.reduction import BoundReduction
    from .plan import Plan


def gather(largest: Tensor, checksum: Tensor | None, stages: Stages, state_index: Tensor, found: Gathered) -> None:
    """Reduce what ``inspect`` found of rows to tensors; those with ``state_index`` 0 are left out."""
    there = state_index != 0
    found.largest.copy_(torch.where(there, largest_of(largest, stages), 0))
    if checksum is not None and found.checksum is not None:
        found.checksum.copy_(torch.where(there, as_int32(sum_of(checksum, stages)), 0))
    top = top_of(found.largest)
    found.top.copy_(top)
    found.rescale.copy_(rescale_of(top))


def norm(squares: list[Tensor], stages: Stages, state_index: Tensor, found: Gathered, result: Norm) -> None:
    """From the rows' sums of ``squares`` to the norm of the finite gradients and the factor for them."""
    counts = (state_index != 0) & (found.largest < INF_BITS)
    total = [torch.where(counts, sum_of(x, stages), 0).sum() for x in squares]
    result.total.copy_(torch.stack(total))
    norm, factor = norm_of(total[0], total[1], found.top, result.limits[0], result.limits[1])
    result.norm.copy_(norm)
    result.factor.copy_(factor)


def top_of(largest: Tensor) -> Tensor:
    """The bits of the largest finite gradient of all tensors, int32 0-d."""
    return torch.where(largest < INF_BITS, largest, 0).max()


def exponent_of(top: Tensor) -> Tensor:
    """2 to this power is above a gradient with these bits."""
    return (top >> 23).clamp(min=1) - 126


def rescale_of(top: Tensor) -> Tensor:
    """Two powers of two, float32 [2], whose product brings gradients of at most these bits below 1."""
    exponent = exponent_of(top)
    half = exponent >> 1
    return torch.stack([(127 - half) << 23, (127 - (exponent - half)) << 23]).to(torch.int32).view(torch.float32)


def norm_of(high: Tensor, low: Tensor, top: Tensor, max_norm: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The norm and the factor, float64 0-d, from int64 sums of squares; both contain a scale's ``inverse``."""
    root = sqrt64((high.double() + low.double() * UNIT) * UNIT)
    power = ((exponent_of(top).to(torch.int64) + 1023) << 52).view(torch.float64)
    norm = root * power * inverse
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0) * inverse


def clip(
    plans: Sequence[Plan], reductions: Sequence[BoundReduction], max_norm: float, inverse_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norm of the finite gradients of all plans, and the factor for them; float64, 0-d, nothing is read back.

    ``inverse_scale`` is the inverse of a gradient scaler's scale, which both results contain.
    """
    first, device = plans[0].norm, plans[0].kind.device
    split = {id(plan) for reduction in reductions for plan in reduction.plans}
    several = len(plans) > 1 or len(split) > 0
    for plan in plans:
        plan.limit(max_norm, inverse_scale)
        plan.gather()
    if several:
        top = torch.stack([top_of(plan.found.largest).to(device) for plan in plans]).max()
        for reduction in reductions:
            if not reduction.alone:  # the largest may be in a tensor that others know nothing of
                shared = top.to(reduction.device, copy=True)
                reduction.table.largest_anywhere(shared)
                top = torch.maximum(top, shared.to(device))
        rescale = rescale_of(top)
        for plan in plans:
            plan.found.rescale.copy_(rescale)
    for plan in plans:
        plan.squares(norm=id(plan) not in split)
    if not several:
        return first.norm.clone(), first.factor
    totals = [plan.norm.total for plan in plans if id(plan) not in split]
    for reduction in reductions:
        sums = [plan.squared_gradients() for plan in reduction.plans]
        reduction.squares(sums)
        finite = [plan.found.largest < INF_BITS for plan in reduction.plans]
        totals += [(x * counts[:, None]).sum(0) for x, counts in zip(sums, finite, strict=True)]
    high, low = torch.stack([x.to(device) for x in totals]).sum(0).unbind()
    return norm_of(high, low, top, *first.limits.unbind())
