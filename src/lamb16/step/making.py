"""Plans for parameters with gradients: their kinds, what runs them, and a plan of each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..checks.tensors import PARAM_DTYPES, check_gradient_device
from ..hyper import check_hyperparameters
from ..moments import in_float8
from ..parameters import Parameters
from ..sharding.layout import layout
from ..wrapped import is_fake
from . import native
from .compiled import Compiled, Executor, inductor_compiles
from .eager import Eager, WholePlan
from .kinds import Kind
from .plan import Member, Plan
from .row_plan import RowPlan, graphs_of
from .waiting import WAIT

LARGEST = 1 << 31  # elements


def members_of(
    parameters: Parameters, grads: dict[int, Tensor], known: dict[int, Kind]
) -> tuple[dict[Kind, list[Member]], set[Kind]]:
    """The parameters by their kinds, checked where they have gradients, and the kinds of those that have.

    With them those that may come to have some: what is trained, as far as nothing is wrong with it, and what a plan is
    there for, by ids its kind.
    """
    members: dict[Kind, list[Member]] = {}
    needed: set[Kind] = set()
    for group in parameters.groups:
        check_hyperparameters(group, running=True)
        for i, p in enumerate(group["params"]):
            grad = grads.get(id(p))
            if grad is not None:
                parameters.check(group, i)
                check_gradient_device(p, grad, partial(parameters.name, group, i))
            elif not (p.requires_grad or id(p) in known) or not _may_have_gradients(parameters, group, i):
                continue
            before = known.get(id(p))
            dtype = grad.dtype if grad is not None else p.dtype if before is None else before.grad_dtype
            kind = kind_of(p, dtype, group)
            if grad is not None:
                needed.add(kind)
            members.setdefault(kind, []).append((p, group))
    return members, needed


def kind_of(p: Tensor, grad_dtype: Any, group: dict[str, Any]) -> Kind:
    """The kind of a parameter of this group."""
    rounding = "nearest" if p.dtype == PARAM_DTYPES[0] else group["param_rounding"]
    return Kind(p.device, p.dtype, grad_dtype, in_float8(group), group["caution"], rounding)


def _may_have_gradients(parameters: Parameters, group: dict[str, Any], i: int) -> bool:
    p = group["params"][i]
    return parameters.fits(group, i) and not (p.is_meta or is_fake(p)) and p.numel() < LARGEST


def executor_for(members: dict[Kind, list[Member]], compile: bool | Executor) -> Any:
    """The one that was asked for; eager without memory for generated code, or where torch compiles nothing."""
    if not isinstance(compile, bool):
        return compile
    params = [p for pairs in members.values() for p, _ in pairs]
    if not compile or any(p.is_meta or is_fake(p) for p in params):
        return Eager()
    return Compiled() if native.loaded() is not None or inductor_compiles() else Eager()


def prepare(executor: Any, members: dict[Kind, list[Member]], clips: bool) -> None:
    """Have an executor make ready all that plans of these members will run; RuntimeError where it cannot."""
    gathers = gathered(members)
    with WAIT:
        for kind, pairs in members.items():
            params = [p for p, _ in pairs]
            for graph in graphs_of(kind, params, clips, gathers) if type(executor) is not Eager else ():
                executor.prepare(graph, kind)


def gathered(members: dict[Kind, list[Member]]) -> bool:
    """Whether some of the parameters are split over ranks, which then reduce what is known of whole tensors."""
    return any(layout(p).groups for pairs in members.values() for p, _ in pairs)


def plan_class(executor: Any) -> Callable[..., Plan]:
    """What plans are made for this executor."""
    return WholePlan if type(executor) is Eager else RowPlan
