"""The gradients of a step, checked, and what tells sets of parameters with gradients apart."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

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


class Gradients(NamedTuple):
    """Gradients are keyed by their parameter's id: a tensor's hash takes longer than all else that is done for it."""

    grads: dict[int, Tensor]  # this rank's shards of them
    params: dict[int, Tensor]
    key: tuple[Any, ...]  # equal where the same plans will do
    setting: list[Any]  # what must be equal in steps of parts of these plans
    starts: list[int]  # where the gradients begin

    def members(self, groups: list[dict[str, Any]]) -> dict[int, Any]:
        """By parameters' ids what must be equal in plans of which a step can be a part."""
        grads = self.grads
        return {id(p): (id(group), grads[id(p)].dtype) for group in groups for p in group["params"] if id(p) in grads}


def gather(parameters: Parameters, released: dict[int, Tensor] | None, unclipped: bool) -> Gradients:
    """The gradients that the parameters have, or those that were ``released``, by parameters' ids."""
    grads: dict[int, Tensor] = {}
    params_of: dict[int, Tensor] = {}
    setting: list[Any] = [torch.is_inference_mode_enabled(), unclipped]
    key: list[Any] = [*setting]
    fake = fake_mode()
    for group in parameters.groups:
        of_group = (id(group), group["moment_dtype"], group["caution"], group["param_rounding"])
        setting += of_group
        key += of_group
        every = group["params"]
        found = list(map(GRAD, every) if released is None else map(released.get, map(id, every)))
        pairs = [(p, g) for p, g in zip(every, found, strict=True) if g is not None]
        params, own = [p for p, _ in pairs], [g for _, g in pairs]
        if fake or not _are_plain(params, own):
            own = [_checked_gradient(parameters, g, group, i, fake) for i, g in enumerate(found) if g is not None]
        ids = list(map(id, params))
        grads.update(zip(ids, own, strict=True))
        params_of.update(zip(ids, params, strict=True))
        key += ids
        key += map(DTYPE, own)
    if released is not None:
        check_members(len(grads), len(released))
    starts = addresses(list(grads.values()))
    if 0 in starts:
        _check_gradients_memory(parameters, grads)
    return Gradients(grads, params_of, tuple(key), setting, starts)


def _checked_gradient(parameters: Parameters, grad: Tensor, group: dict[str, Any], i: int, fake: bool) -> Tensor:
    """This rank's part of the gradient of a group's parameter."""
    p, name = group["params"][i], parameters.name(group, i)
    special = type(grad) is not Tensor or is_sharded(p)
    if special or grad.layout != torch.strided or grad.dtype != p.dtype or grad.shape != p.shape:
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
