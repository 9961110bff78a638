"""A step from the gradients to the new weights: plans are found or made, states made ready, the passes run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hyper import check_hyperparameters
from .parameters import Parameters
from .ready import New, add_up, ready_states, unknown
from .sharding.exchange import digest
from .sharding.layout import is_sharded
from .sharding.reduction import BoundReduction, Reduction, meet, signature
from .step.compiled import Executor
from .step.gradient_norm import clip
from .step.gradients import gather
from .step.making import executor_for, make_plan, members_of, prepare
from .step.plan import Plan
from .step.remembered import Cached, Remembered
from .store import Store


class Request(NamedTuple):
    """What a step is to do."""

    parameters: Parameters
    max_grad_norm: float | None
    compile: bool | Executor
    cached_plans: int  # how many sets of parameters with gradients are remembered
    grad_scale: Any
    found_inf: Any
    released: dict[int, Tensor] | None  # gradients in place of those that the parameters have, by parameters' ids
    check: Callable[[], None]  # raises for what is refused whatever the gradients are


class Stepper:
    """What an optimizer keeps from step to step beside its states: all of it is derived, but for counts."""

    def __init__(self) -> None:
        self.stores: dict[torch.device, Store] = {}
        self.plans = Remembered()
        self.last: list[Plan] = []  # of the last step
        self.skipped: dict[torch.device, Tensor] = {}
        self.grad_norm: Tensor | None = None

    def step(self, request: Request) -> list[Plan]:
        """Step the parameters that have gradients, or whose gradients were released; returns their plans."""
        plans: list[Plan] = []
        try:
            plans = self._run(request)
        finally:
            for plan in (*self.last, *plans, *self.plans.all()):
                plan.drop_tensors()
        return plans

    def _run(self, request: Request) -> list[Plan]:
        cached = self._begin(request)
        plans, grad_scale = cached.plans, request.grad_scale
        factor = None if grad_scale is None else grad_scale.double().reciprocal().view(())
        self.grad_norm = None
        if request.max_grad_norm is not None and plans:
            self.grad_norm, factor = clip(plans, cached.reductions, request.max_grad_norm, factor)
        for plan in plans:
            plan.scale(self.skipped[plan.kind.device], request.found_inf, factor)
        for plan in plans:
            plan.update()
        for reduction in cached.reductions:
            reduction.after()
        return plans

    def _begin(self, request: Request) -> Cached:
        """Plans that have read the gradients, and what the ranks reduce; raises on all ranks with nothing changed."""
        cached, new, error = Cached([], [], 0, set()), New([], []), None
        parameters, state = request.parameters, request.parameters.states
        try:
            request.check()
            cached, grads, states = self._current_plans(request, new)
            for plan, own in zip(cached.plans, states, strict=True):
                plan.inspect([grads[key] for key in plan.ids], own)
        except Exception as found:
            error = _cause(found, parameters)
        try:
            reductions = cached.reductions if error is None else _reductions(parameters, [])
            if reductions:
                salts = [[int(state[p]["salt"]) for p in part if is_sharded(p)] for part in new]
                clips = request.max_grad_norm is not None and [len(cached.plans) > 0, [x.alone for x in reductions]]
                meet(reductions, digest([cached.signature, salts, clips]), error)
            elif error is not None:
                raise error
            add_up({p: state[p] for p in (*new.made, *new.completed)})
        except BaseException:
            new.roll_back(state)
            if any(new):
                self.plans.clear()
                self.stores.clear()
            raise
        return cached

    def _current_plans(self, request: Request, new: New) -> tuple[Cached, dict[int, Tensor], list[list[Any]]]:
        """The plans for the parameters that have gradients, from the cache or new; these gradients' local parts; and
        the states of each plan's parameters.

        ``new`` is filled.
        """
        parameters, inference = request.parameters, torch.is_inference_mode_enabled()
        state, most = parameters.states, request.cached_plans
        gradients = gather(parameters, request.released, request.max_grad_norm is None)
        grads = gradients.grads
        cached = self.plans.find(gradients.key, gradients.params)
        part = None if cached is not None else self.plans.part(gradients, parameters.groups, most)
        cached, changed = cached or part, cached is None and part is None
        if cached is None:
            with torch.inference_mode(False), torch.no_grad():  # what is made here is for later steps, too
                plans = self._make_plans(request, grads, new, inference)
            weights = {start for plan in plans for start in plan.memory[0]} - {0}
            cached = Cached(plans, [], 0, weights, gradients.setting, gradients.members(parameters.groups))
        states: list[list[Any]] = [list(map(state.get, plan.params)) for plan in cached.plans]
        touched = {id(p) for plan, own in zip(cached.plans, states, strict=True) for p in plan.touched(own)}
        if touched:
            with torch.inference_mode(False), torch.no_grad():
                ready_states(parameters, self.stores, grads, touched, new, inference)
                for plan in cached.plans:
                    own = [state[p] for p in plan.params]
                    read = [x for x, key in zip(own, plan.ids, strict=True) if key in touched]
                    plan.place(plan.store.adopt(own, read, state.values()))
            states = [[state[p] for p in plan.params] for plan in cached.plans]
            changed = True
        if changed and part is None:
            reductions = _reductions(parameters, cached.plans)
            number = signature(cached.plans) if reductions else 0
            cached = cached._replace(reductions=reductions, signature=number)
            self.plans.remember(gradients.key, cached, parameters.groups, most)
        if part is None:
            self.plans.used(gradients.key)
        for plan in cached.plans:
            plan.hyper.check()
        # Weights as gradients, which the step would change as it reads them:
        if not cached.weights.isdisjoint(gradients.starts):
            grads = {k: g.clone() if g.data_ptr() in cached.weights else g for k, g in grads.items()}
        return cached, grads, states

    def _make_plans(self, request: Request, grads: dict[int, Tensor], new: New, inference: bool) -> list[Plan]:
        """One plan for each kind of tensor, once everything has been checked and the states are there."""
        parameters, clips = request.parameters, request.max_grad_norm is not None
        members = members_of(parameters, grads)
        executor = executor_for(members, request.compile)
        changed = unknown(parameters, self.stores, members)
        ready = partial(prepare, executor, members, clips)
        ready_states(parameters, self.stores, grads, changed, new, inference, ready)
        changed.update(map(id, new.made))
        for device in {kind.device for kind in members} - set(self.skipped):
            self.skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return [
            make_plan(kind, pairs, executor, self.stores[kind.device], parameters.states, changed)
            for kind, pairs in members.items()
        ]


def _reductions(parameters: Parameters, plans: list[Plan]) -> list[BoundReduction]:
    return [reduction.bind(plans) for reduction in Reduction.of(list(parameters))]


def _cause(error: Exception, parameters: Parameters) -> Exception:
    """The error that a wrong hyperparameter is, where that is what this one came of."""
    if isinstance(error, (KeyError, TypeError)):
        try:
            for group in parameters.groups:
                check_hyperparameters(group, running=True)
        except ValueError as cause:
            return cause
    return error
