"""A step from the gradients to the new weights: plans are found or made, states made ready, the passes run."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .hyper import check_hyperparameters
from .parameters import Parameters
from .ready import New, add_up, ready_states, unknown
from .sharding.exchange import digest
from .sharding.layout import is_sharded, local
from .sharding.reduction import BoundReduction, Reduction, is_told_at_once, meet, signature
from .step.gradient_norm import clip
from .step.gradients import gather
from .step.known import apart, are_good
from .step.making import executor_for, gathered, members_of, plan_class, prepare
from .step.plan import Plan
from .stepper import Request, Stepped, Stepper
from .wrapped import fake_mode

GRAD = attrgetter("grad")


def run(stepper: Stepper, request: Request) -> list[Stepped]:
    """Step the parameters that have gradients, or whose gradients were released; returns which.

    Plans hold tensors when this returns or raises; the stepper sees to that.
    """
    try:
        return _run(stepper, request)
    except BaseException:  # whatever was being noted, the next step looks at everything
        stepper.key = []
        raise


def _run(stepper: Stepper, request: Request) -> list[Stepped]:
    plans, reductions = _begin(stepper, request)
    grad_scale = request.grad_scale
    factor = None if grad_scale is None or not plans else grad_scale.double().reciprocal().view(())
    stepper.grad_norm = None
    if request.max_grad_norm is not None and plans:
        stepper.grad_norm, factor = clip(plans, reductions, request.max_grad_norm, factor)
    for plan in plans:
        plan.update(request.found_inf, factor, next((reduction.stop for reduction in reductions), None))
    for reduction in reductions:
        reduction.after()
    return [Stepped(plan, plan.present) for plan in plans]


def _begin(stepper: Stepper, request: Request) -> tuple[list[Plan], list[BoundReduction]]:
    """Plans that have read the gradients, and what the ranks reduce; raises on all ranks with nothing changed.

    Where others go on with a step that this rank cannot take with them, there are no plans, and all raise at the next.
    """
    if (error := stepper.settle()) is not None:
        stepper.agreed, stepper.error, stepper.late = None, None, []
        raise error
    plans: list[Plan] = []
    reductions: list[BoundReduction] = []
    new, number = New([], []), 0
    parameters, state = request.parameters, request.parameters.states
    try:
        request.check()
        found = _look(stepper, request)
        plans = _prepare(stepper, request, new) if found is None else found
        for plan in plans:
            plan.hyper.check()
        for plan in plans:
            plan.inspect()
        reductions, number = _reductions(stepper, parameters, plans)
    except Exception as caught:
        error = _cause(caught, parameters)
    try:
        if error is not None:
            reductions = [reduction.bind([]) for reduction in Reduction.of(parameters)]
        if reductions:
            salts = [[int(state[p]["salt"]) for p in part if is_sharded(p)] for part in new]
            clips = request.max_grad_norm is not None and len(plans) > 0
            # Where all do what they did before, nothing is waited for.
            same = error is None and not any(new) and clips == stepper.agreed
            goes_on = same and len(reductions) == 1 and not is_told_at_once(reductions[0].device)
            stepper.late, error = meet(reductions, digest([number, salts, clips]), error, goes_on, clips)
            stepper.agreed, stepper.error = clips, error
            if error is not None:
                _roll_back(stepper, new, state)
                return [], []
        elif error is not None:
            raise error
        if any(new):
            unnamed = parameters.unnamed()
            weights = {p: local(p) for p in new.made if id(p) in unnamed}
            add_up({p: state[p] for p in (*new.made, *new.completed)}, weights)
            stepper.bound = None  # it has the salts of before
    except BaseException:
        _roll_back(stepper, new, state)
        raise
    return plans, reductions


def _roll_back(stepper: Stepper, new: New, states: dict[Any, Any]) -> None:
    new.roll_back(states)
    if any(new):
        stepper.clear()
        stepper.stores.clear()


def _look(stepper: Stepper, request: Request) -> list[Plan] | None:
    """The plans of this step, which it has begun in, where all is in the place where the steps before left it."""
    parameters, released = request.parameters, request.released
    every = list(parameters)
    if not stepper.key or stepper.key != _key(parameters, every, request) or fake_mode():
        return None
    grads: list[Any] = list(map(GRAD, every) if released is None else map(released.get, map(id, every)))
    given, plans = sum(g is not None for g in grads), []
    for plan, places in zip(stepper.plans.values(), stepper.places, strict=True):
        own = grads if len(places) == len(every) else [grads[k] for k in places]
        count = len(own) - sum(g is None for g in own)
        if not count:
            continue
        given -= count
        params = every if len(places) == len(every) else [every[k] for k in places]
        if not plan.look(params, own, parameters.states, stepper.weights):
            return None
        plans.append(plan)
    if given or (released is not None and sum(len(plan.params) for plan in plans) != len(released)):
        return None
    if any(plan.known.moved for plan in plans):
        stepper.weights = starts_of_weights(stepper)
        weights = [w for plan in plans for w in plan.operands[0]]
        good = are_good(weights) and all(are_good(plan.operands[1], stepper.weights) for plan in plans)
        if not good or any(map(Tensor.is_inference, weights)) or not apart(list(stepper.plans.values())):
            return None
    return plans


def starts_of_weights(stepper: Stepper) -> set[int]:
    """Where the parameters of all plans begin."""
    return {start for plan in stepper.plans.values() for start in plan.known.places[0].tolist()} - {0}


def _key(parameters: Parameters, every: list[Tensor], request: Request) -> list[Any]:
    key: list[Any] = [torch.is_inference_mode_enabled(), request.max_grad_norm is None, request.compile]
    for group in parameters.groups:
        key += id(group), len(group["params"]), group["moment_dtype"], group["caution"], group["param_rounding"]
    key += map(id, every)
    return key


def _prepare(stepper: Stepper, request: Request, new: New) -> list[Plan]:
    """The plans of this step, once everything has been checked and the states are there.

    Plans that were made for these parameters go on; ``new`` is filled.
    """
    parameters, inference = request.parameters, torch.is_inference_mode_enabled()
    states, clips = parameters.states, request.max_grad_norm is not None
    stepper.key = []
    grads = gather(parameters, request.released)
    known = {key: plan.kind for plan in stepper.plans.values() for key in plan.ids}
    with torch.inference_mode(False), torch.no_grad():  # what is made here is for later steps, too
        every_kind, needed = members_of(parameters, grads, known)
        members = {kind: pairs for kind, pairs in every_kind.items() if kind in needed}
        executor = executor_for(members, request.compile)
        present = {kind: [pair for pair in pairs if id(pair[0]) in grads] for kind, pairs in members.items()}
        changed = unknown(parameters, stepper.stores, present)
        ready_states(
            parameters, stepper.stores, grads, changed, new, inference, partial(prepare, executor, members, clips)
        )
        changed.update(map(id, new.made))
        for device in {kind.device for kind in members} - set(stepper.skipped):
            stepper.skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        make, plans = plan_class(executor), []
        for kind, pairs in members.items():
            plan, store = stepper.plans.get(kind), stepper.stores[kind.device]
            if plan is None or not (plan.fits(pairs) and plan.store is store and _same(plan.executor, executor)):
                plan = stepper.plans[kind] = make(kind, pairs, executor, store, stepper.skipped[kind.device])
            plan.want(clips, gathered(members))
            own = [p for p, _ in present[kind]]
            read = [states[p] for p in own if id(p) in changed]
            room = sum(len(x) for k, x in members.items() if k.device == kind.device)
            rows = store.adopt([states[p] for p in own], read, states.values(), room)
            plan.begin(own, [grads[id(p)] for p in own], [states[p] for p in own], rows)
            plans.append(plan)
    every = list(parameters)
    place = {id(p): k for k, p in enumerate(every)}
    for kind, plan in list(stepper.plans.items()):
        if not plan.fits(every_kind.get(kind, [])):  # some are gone, or of another kind by now
            del stepper.plans[kind]
    stepper.places = [[place[key] for key in plan.ids] for plan in stepper.plans.values()]
    if fake_mode():
        return plans
    stepper.weights = starts_of_weights(stepper)
    for plan in plans:
        plan.separate(stepper.weights)
    if apart(list(stepper.plans.values())):
        stepper.key = _key(parameters, every, request)
    return plans


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not vars(one) and not vars(other))


def _reductions(stepper: Stepper, parameters: Parameters, plans: list[Plan]) -> tuple[list[BoundReduction], int]:
    """What the ranks reduce in this step, and the signature of what is stepped."""
    if not stepper.key or stepper.reductions is None:
        stepper.reductions, stepper.bound = Reduction.of(parameters), None
    if not stepper.reductions:
        return [], 0
    key = [(plan, plan.present) for plan in plans]
    if stepper.bound is None or stepper.bound[0] != key:
        stepper.bound = key, [reduction.bind(plans) for reduction in stepper.reductions], signature(plans)
    return stepper.bound[1:]


def _cause(error: Exception, parameters: Parameters) -> Exception:
    """The error that a wrong hyperparameter is, where that is what this one came of."""
    if isinstance(error, (KeyError, TypeError)):
        try:
            for group in parameters.groups:
                check_hyperparameters(group, running=True)
        except ValueError as cause:
            return cause
    return error
