"""A step from the gradients to the new weights: plans are found or made, states made ready, the passes run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hyper import check_hyperparameters
from .parameters import Parameters
from .ready import New, add_up, ready_states, unknown
from .sharding.exchange import digest
from .sharding.layout import is_sharded, local
from .sharding.reduction import BoundReduction, Late, Reduction, is_told_at_once, meet, signature
from .signals import Held
from .step.compiled import Executor
from .step.gradient_norm import clip
from .step.gradients import gather
from .step.kinds import Kind
from .step.known import apart, are_good
from .step.making import executor_for, gathered, members_of, plan_class, prepare
from .step.plan import Plan
from .store import Store
from .wrapped import fake_mode

GRAD = attrgetter("grad")


class Request(NamedTuple):
    """What a step is to do."""

    parameters: Parameters
    max_grad_norm: float | None
    compile: bool | Executor
    grad_scale: Any
    found_inf: Any
    released: dict[int, Tensor] | None  # gradients in place of those that the parameters have, by parameters' ids
    check: Callable[[], None]  # raises for what is refused whatever the gradients are


class Stepped(NamedTuple):
    """What one step has stepped."""

    plan: Plan
    tensors: list[int]


class Stepper:
    """What an optimizer keeps from step to step beside its states: all of it is derived, but for counts."""

    def __init__(self) -> None:
        self.stores: dict[torch.device, Store] = {}
        self.last: list[Stepped] = []  # by the last step
        self.skipped: dict[torch.device, Tensor] = {}
        self.grad_norm: Tensor | None = None
        self.agreed: bool | None = None  # whether gradients were clipped in the last step that all ranks took together
        self.late: list[Late] = []  # what they will have told about the last step
        self.error: Exception | None = None  # of that step, which the others go on with
        self.clear()

    def clear(self) -> None:
        """Forget all plans."""
        self.plans: dict[Kind, Plan] = {}
        self.key: list[Any] = []  # what must be equal in a step that needs no other plans
        self.places: list[list[int]] = []  # of each plan's parameters among all
        self.weights: set[int] = set()  # where the parameters of all plans begin
        self.reductions: list[Reduction] | None = None
        self.bound: tuple[Any, list[BoundReduction], int] | None = None  # for what they are bound, and its signature

    def settle(self) -> Exception | None:
        """What kept the ranks from taking the last step together, if they did not wait to hear of it."""
        found = (self.error, *(late.error() for late in self.late))
        return next((error for error in found if error is not None), None)

    def step(self, request: Request) -> list[Stepped]:
        """Step the parameters that have gradients, or whose gradients were released; returns which."""
        try:
            return self._step(request)
        except BaseException:  # whatever was being noted, the next step looks at everything
            self.key = []
            raise
        finally:
            for plan in {*self.plans.values(), *(stepped.plan for stepped in self.last)}:
                plan.drop_tensors()

    def _step(self, request: Request) -> list[Stepped]:
        plans, reductions = self._begin(request)
        grad_scale = request.grad_scale
        factor = None if grad_scale is None or not plans else grad_scale.double().reciprocal().view(())
        self.grad_norm = None
        if request.max_grad_norm is not None and plans:
            self.grad_norm, factor = clip(plans, reductions, request.max_grad_norm, factor)
        stop = next((reduction.stop for reduction in reductions), None)
        for plan in plans:
            plan.get_ready(request.found_inf, factor, stop)
        at_once = len(plans) == 1 and plans[0].at_once and not reductions
        with contextlib.nullcontext() if at_once else Held():
            for plan in plans:
                plan.update()
            for reduction in reductions:
                reduction.after()
        return [Stepped(plan, plan.present) for plan in plans]

    def _begin(self, request: Request) -> tuple[list[Plan], list[BoundReduction]]:
        """Plans that have read the gradients, and what the ranks reduce; raises on all ranks with nothing changed.

        Where others go on with a step that this rank cannot take with them, there are no plans, and all raise at the
        next.
        """
        if (error := self.settle()) is not None:
            self.agreed, self.error, self.late = None, None, []
            raise error
        plans: list[Plan] = []
        reductions: list[BoundReduction] = []
        new, number = New([], []), 0
        parameters, state = request.parameters, request.parameters.states
        try:
            try:
                request.check()
                found = self._look(request)
                plans = self._prepare(request, new) if found is None else found
                for plan in plans:
                    plan.hyper.check()
                for plan in plans:
                    plan.inspect()
                reductions, number = self._reductions(parameters, plans)
            except Exception as caught:
                error = _cause(caught, parameters)
            if error is not None:
                reductions = [reduction.bind([]) for reduction in Reduction.of(parameters)]
            if reductions:
                salts = [[int(state[p]["salt"]) for p in part if is_sharded(p)] for part in new]
                clips = request.max_grad_norm is not None and len(plans) > 0
                # Where all do what they did before, nothing is waited for.
                same = error is None and not any(new) and clips == self.agreed
                goes_on = same and len(reductions) == 1 and not is_told_at_once(reductions[0].device)
                self.late, error = meet(reductions, digest([number, salts, clips]), error, goes_on, clips)
                self.agreed, self.error = clips, error
                if error is not None:
                    self._roll_back(new, state)
                    return [], []
            elif error is not None:
                raise error
            if any(new):
                unnamed = parameters.unnamed()
                weights = {p: local(p) for p in new.made if id(p) in unnamed}
                add_up({p: state[p] for p in (*new.made, *new.completed)}, weights)
                self.bound = None  # it has the salts of before
        except BaseException:
            self._roll_back(new, state)
            raise
        return plans, reductions

    def _roll_back(self, new: New, states: dict[Any, Any]) -> None:
        new.roll_back(states)
        if any(new):
            self.clear()
            self.stores.clear()

    def _look(self, request: Request) -> list[Plan] | None:
        """The plans of this step, which it has begun in, where all is in the place where the steps before left it."""
        parameters, released = request.parameters, request.released
        every = list(parameters)
        if not self.key or self.key != _key(parameters, every, request) or fake_mode():
            return None
        grads: list[Any] = list(map(GRAD, every) if released is None else map(released.get, map(id, every)))
        given, plans = sum(g is not None for g in grads), []
        for plan, places in zip(self.plans.values(), self.places, strict=True):
            own = grads if len(places) == len(every) else [grads[k] for k in places]
            count = len(own) - sum(g is None for g in own)
            if not count:
                continue
            given -= count
            params = every if len(places) == len(every) else [every[k] for k in places]
            if not plan.look(params, own, parameters.states, self.weights):
                return None
            plans.append(plan)
        if given or (released is not None and sum(len(plan.params) for plan in plans) != len(released)):
            return None
        if any(plan.known.moved for plan in plans):
            self.weights = self._starts_of_weights()
            weights = [w for plan in plans for w in plan.operands[0]]
            good = are_good(weights) and all(are_good(plan.operands[1], self.weights) for plan in plans)
            if not good or any(map(Tensor.is_inference, weights)) or not apart(list(self.plans.values())):
                return None
        return plans

    def _starts_of_weights(self) -> set[int]:
        """Where the parameters of all plans begin."""
        return {start for plan in self.plans.values() for start in plan.known.places[0].tolist()} - {0}

    def _prepare(self, request: Request, new: New) -> list[Plan]:
        """The plans of this step, once everything has been checked and the states are there.

        Plans that were made for these parameters go on; ``new`` is filled.
        """
        parameters, inference = request.parameters, torch.is_inference_mode_enabled()
        states, clips = parameters.states, request.max_grad_norm is not None
        self.key = []
        grads = gather(parameters, request.released)
        known = {key: plan.kind for plan in self.plans.values() for key in plan.ids}
        with torch.inference_mode(False), torch.no_grad():  # what is made here is for later steps, too
            every_kind, needed = members_of(parameters, grads, known)
            members = {kind: pairs for kind, pairs in every_kind.items() if kind in needed}
            executor = executor_for(members, request.compile)
            present = {kind: [pair for pair in pairs if id(pair[0]) in grads] for kind, pairs in members.items()}
            changed = unknown(parameters, self.stores, present)
            ready_states(
                parameters, self.stores, grads, changed, new, inference, partial(prepare, executor, members, clips)
            )
            changed.update(map(id, new.made))
            for device in {kind.device for kind in members} - set(self.skipped):
                self.skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
            make, plans = plan_class(executor), []
            for kind, pairs in members.items():
                plan, store = self.plans.get(kind), self.stores[kind.device]
                if plan is None or not (plan.fits(pairs) and plan.store is store and _same(plan.executor, executor)):
                    plan = self.plans[kind] = make(kind, pairs, executor, store, self.skipped[kind.device])
                plan.want(clips, gathered(members))
                own = [p for p, _ in present[kind]]
                read = [states[p] for p in own if id(p) in changed]
                room = sum(len(x) for k, x in members.items() if k.device == kind.device)
                rows = store.adopt([states[p] for p in own], read, states.values(), room)
                plan.begin(own, [grads[id(p)] for p in own], [states[p] for p in own], rows)
                plans.append(plan)
        every = list(parameters)
        place = {id(p): k for k, p in enumerate(every)}
        for kind, plan in list(self.plans.items()):
            if not plan.fits(every_kind.get(kind, [])):  # some are gone, or of another kind by now
                del self.plans[kind]
        self.places = [[place[key] for key in plan.ids] for plan in self.plans.values()]
        if fake_mode():
            return plans
        self.weights = self._starts_of_weights()
        for plan in plans:
            plan.separate(self.weights)
        if apart(list(self.plans.values())):
            self.key = _key(parameters, every, request)
        return plans

    def _reductions(self, parameters: Parameters, plans: list[Plan]) -> tuple[list[BoundReduction], int]:
        """What the ranks reduce in this step, and the signature of what is stepped."""
        if not self.key or self.reductions is None:
            self.reductions, self.bound = Reduction.of(parameters), None
        if not self.reductions:
            return [], 0
        key = [(plan, plan.present, plan.state_indices) for plan in plans]
        if self.bound is None or self.bound[0] != key:
            self.bound = key, [reduction.bind(plans) for reduction in self.reductions], signature(plans)
        return self.bound[1:]


def _key(parameters: Parameters, every: list[Tensor], request: Request) -> list[Any]:
    key: list[Any] = [torch.is_inference_mode_enabled(), request.max_grad_norm is None, request.compile]
    for group in parameters.groups:
        key += id(group), len(group["params"]), group["moment_dtype"], group["caution"], group["param_rounding"]
    key += map(id, every)
    return key


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not vars(one) and not vars(other))


def _cause(error: Exception, parameters: Parameters) -> Exception:
    """The error that a wrong hyperparameter is, where that is what this one came of."""
    if isinstance(error, (KeyError, TypeError)):
        try:
            for group in parameters.groups:
                check_hyperparameters(group, running=True)
        except ValueError as cause:
            return cause
    return error
