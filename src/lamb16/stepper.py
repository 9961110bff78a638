"""What an optimizer keeps from step to step beside its states, and what it is asked for; ``stepping.py`` does it.

Making an optimizer imports this module, the first step that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .parameters import Parameters
from .step.remembered import Remembered

if TYPE_CHECKING:
    from .step.compiled import Executor
    from .step.plan import Plan
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
        from .stepping import run  # and all that a step needs

        plans: list[Plan] = []
        try:
            plans = run(self, request)
        finally:
            for plan in (*self.last, *plans, *self.plans.all()):
                plan.drop_tensors()
        return plans
