"""The norm of all gradients, as integers, and the factor that brings it to ``max_grad_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sharding.reduction import BoundReduction
from .floats import INF_BITS, UNIT, sqrt64
from .plan import Plan


def clip(
    plans: Sequence[Plan], reductions: Sequence[BoundReduction], max_norm: float, inverse_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norm of the finite gradients of all plans, and the factor for them; float64, 0-d, nothing is read back.

    Every square counts in units of 2^-40 of the power of two above the largest gradient, as ``reference.grad_norm``
    says. ``inverse_scale`` is the inverse of a gradient scaler's scale, which both results contain.
    """
    device = plans[0].kind.device
    bits = [plan.whole_largest for plan in plans]
    finite = [x < INF_BITS for x in bits]
    tops = [torch.where(x, b, 0).max().to(device) for x, b in zip(finite, bits, strict=True)]
    top = torch.stack(tops).max()
    for reduction in reductions:
        if not reduction.alone:  # the largest may be in a tensor that others know nothing of
            shared = top.to(reduction.device, copy=True)
            reduction.table.largest_anywhere(shared)
            top = torch.maximum(top, shared.to(device))
    exponent = (top >> 23).clamp(min=1) - 126  # 2^exponent is above the largest
    half = exponent >> 1
    rescale = torch.stack([(127 - half) << 23, (127 - (exponent - half)) << 23]).to(torch.int32).view(torch.float32)
    sums = {id(plan): plan.squared_gradients(rescale.to(plan.kind.device)) for plan in plans}
    for reduction in reductions:
        reduction.squares([sums[id(plan)] for plan in reduction.plans])
    total = sum((sums[id(plan)] * x[:, None]).sum(0).to(device) for plan, x in zip(plans, finite, strict=True))
    assert isinstance(total, Tensor)
    high, low = total.double().unbind()
    root = sqrt64((high + low * UNIT) * UNIT)
    norm = root * ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    inverse = torch.ones((), dtype=torch.float64, device=device) if inverse_scale is None else inverse_scale.to(device)
    norm = norm * inverse
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0) * inverse
