"""The gradients of a step, checked."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..checks.release import check_members
from ..checks.sharded import check_gradient_kind
from ..checks.tensors import check_fake, check_gradient, check_gradient_memory
from ..parameters import Parameters
from ..sharding.layout import is_sharded, like_param
from ..store import addresses
from ..wrapped import PLAIN, fake_mode

GRAD, DTYPE, LAYOUT = map(attrgetter, ("grad", "dtype", "layout"))


def gather(parameters: Parameters, released: dict[int, Tensor] | None) -> dict[int, Tensor]:
    """The gradients that the parameters have, or those that were ``released``, by parameters' ids: this rank's shards.

    A tensor's hash takes longer than all else that is done for it.
    """
    grads: dict[int, Tensor] = {}
    fake = fake_mode()
    for group in parameters.groups:
        every = group["params"]
        found = list(map(GRAD, every) if released is None else map(released.get, map(id, every)))
        pairs = [(p, g) for p, g in zip(every, found, strict=True) if g is not None]
        params, own = [p for p, _ in pairs], [g for _, g in pairs]
        if fake or not _are_plain(params, own):
            own = [_checked_gradient(parameters, g, group, i, fake) for i, g in enumerate(found) if g is not None]
        grads.update(zip(map(id, params), own, strict=True))
    if released is not None:
        check_members(len(grads), len(released))
    if 0 in addresses(list(grads.values())):
        _check_gradients_memory(parameters, grads)
    return grads


def _checked_gradient(parameters: Parameters, grad: Tensor, group: dict[str, Any], i: int, fake: bool) -> Tensor:
    """This rank's part of the gradient of a group's parameter."""
    p, name = group["params"][i], parameters.name(group, i)
    special = type(grad) is not Tensor or is_sharded(p)
    if special or grad.layout != torch.strided or grad.dtype != p.dtype or grad.shape != p.shape:
        parameters.check(group, i)  # it may have been frozen
        check_gradient(p, grad, name)
    if special or fake:
        check_fake(p, grad, name)
        check_gradient_kind(p, grad, name)
        return like_param(p, grad)  # of which partial sums are reduced
    return grad


def _check_gradients_memory(parameters: Parameters, grads: dict[int, Tensor]) -> None:
    for group in parameters.groups:
        for i, p in enumerate(group["params"]):
            if id(p) in grads:
                check_gradient_memory(grads[id(p)], parameters.name(group, i))


def _are_plain(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether all are plain strided tensors, and the gradients of the parameters' dtypes and shapes."""
    return (
        set(map(type, params)) <= PLAIN
        and set(map(type, grads)) <= {Tensor}
        and set(map(LAYOUT, grads)) <= {torch.strided}
        and list(map(DTYPE, grads)) == list(map(DTYPE, params))
        and list(map(Tensor.size, grads)) == list(map(Tensor.size, params))
    )
