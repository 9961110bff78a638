"""What an optimizer keeps from step to step beside its states, and what it is asked for; ``stepping.py`` does it.

Making an optimizer imports this module, the first step that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .parameters import Parameters

if TYPE_CHECKING:
    from .sharding.reduction import BoundReduction, Late, Reduction
    from .step.compiled import Executor
    from .step.kinds import Kind
    from .step.plan import Plan
    from .store import Store


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
        from .stepping import run  # and all that a step needs

        try:
            return run(self, request)
        finally:
            for plan in {*self.plans.values(), *(stepped.plan for stepped in self.last)}:
                plan.drop_tensors()
