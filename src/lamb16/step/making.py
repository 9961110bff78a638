"""Plans for parameters with gradients: their kinds, what runs them, and a plan of each kind."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks.tensors import check_gradient_device
from ..hyper import check_hyperparameters
from ..moments import in_float8
from ..parameters import Parameters
from ..store import Store
from ..wrapped import is_fake
from .compiled import Compiled, Eager, Executor
from .kinds import Kind
from .plan import Plan, graphs_of
from .waiting import WAIT

Member = tuple[Tensor, dict[str, Any]]  # a parameter and its group


def members_of(parameters: Parameters, grads: dict[int, Tensor]) -> dict[Kind, list[Member]]:
    """The parameters with gradients by their kinds, checked."""
    members: dict[Kind, list[Member]] = {}
    for group in parameters.groups:
        check_hyperparameters(group, running=True)
        for i, p in enumerate(group["params"]):
            if id(p) in grads:
                parameters.check(group, i)
                check_gradient_device(p, grads[id(p)], partial(parameters.name, group, i))
                rounding = "nearest" if p.dtype == torch.float32 else group["param_rounding"]
                float8 = in_float8(group)
                kind = Kind(p.device, p.dtype, grads[id(p)].dtype, float8, group["caution"], rounding)
                members.setdefault(kind, []).append((p, group))
    return members


def executor_for(members: dict[Kind, list[Member]], compile: bool | Executor) -> Executor:
    """The one that was asked for; eager where there is no memory for generated code to work on."""
    if isinstance(compile, bool):
        params = [p for pairs in members.values() for p, _ in pairs]
        return Compiled() if compile and not any(p.is_meta or is_fake(p) for p in params) else Eager()
    return compile


def prepare(executor: Executor, members: dict[Kind, list[Member]], clips: bool) -> None:
    """Have an executor make ready all that plans of these members will run; RuntimeError where it cannot."""
    with WAIT:
        for kind, pairs in members.items():
            params = [p for p, _ in pairs]
            for graph in graphs_of(kind, params, clips) if type(executor) is not Eager else ():
                executor.prepare(graph, kind)


def make_plan(
    kind: Kind,
    pairs: list[Member],
    executor: Executor,
    store: Store,
    states: dict[Any, Any],
    changed: Collection[int],
) -> Plan:
    """A plan of members of a kind; the store reads those of their states that have ``changed``, by parameters' ids."""
    slices: list[tuple[dict[str, Any], int, int]] = []
    for i, (_, group) in enumerate(pairs):
        if not slices or slices[-1][0] is not group:
            slices.append((group, i, i))
        slices[-1] = (group, slices[-1][1], i + 1)
    params = [p for p, _ in pairs]
    read = [states[p] for p in params if id(p) in changed]
    state_indices = store.adopt([states[p] for p in params], read, states.values())
    return Plan(kind, params, state_indices, store, slices, executor)
