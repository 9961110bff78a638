"""Plans are remembered for the sets of parameters with gradients that came lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..sharding.reduction import BoundReduction
from .gradients import Gradients
from .parts import Part, divisible
from .plan import Plan

CACHED_PLANS = 8  # sets of parameters with gradients that are remembered


class Cached(NamedTuple):
    """What a step over one set of parameters needs."""

    plans: list[Plan]
    reductions: list[BoundReduction]
    signature: int
    weights: set[int]  # where the weights begin
    setting: Any = None  # what must be equal in steps of parts of these plans
    members: Mapping[int, Any] = {}  # by parameters' ids their groups' and their gradients' dtypes


class Remembered:
    """The plans of the sets that came lately, by the sets' keys."""

    def __init__(self) -> None:
        self.cached: OrderedDict[Any, Cached] = OrderedDict()
        self.seen: OrderedDict[Any, None] = OrderedDict()  # sets that came lately

    def clear(self) -> None:
        """Forget all plans; which sets have come stays known."""
        self.cached.clear()

    def all(self) -> list[Plan]:
        """All plans that are remembered."""
        return [plan for cached in self.cached.values() for plan in cached.plans]

    def find(self, key: Any, params: Mapping[int, Tensor]) -> Cached | None:
        """The plans of a set; all are forgotten where these do not fit its parameters any more."""
        cached = self.cached.get(key)
        if cached is not None and not all(plan.fits(params) for plan in cached.plans):
            self.clear()
            return None
        return cached

    def part(self, gradients: Gradients, groups: list[dict[str, Any]], most: int) -> Cached | None:
        """Parts of plans that are remembered for more parameters, where these ones have come for the first time.

        ``most`` sets are known to have come.
        """
        if gradients.key in self.seen:
            return None
        self.seen[gradients.key] = None
        if len(self.seen) > most:
            self.seen.popitem(last=False)
        own = gradients.members(groups)
        for known, cached in reversed(self.cached.items()):
            if cached.setting != gradients.setting or not own or not own.items() <= cached.members.items():
                continue
            if cached.reductions or not all(map(divisible, cached.plans)):
                continue
            parts: list[Plan] = [Part(plan, own) for plan in cached.plans if not own.keys().isdisjoint(plan.ids)]
            if all(part.fits(gradients.params) for part in parts):
                self.cached.move_to_end(known)
                return cached._replace(plans=parts)
        return None

    def remember(self, key: Any, cached: Cached, groups: list[dict[str, Any]], most: int) -> None:
        """Keep plans for later steps, of ``most`` sets, but for those of groups that are gone."""
        there = set(map(id, groups))
        for old, other in list(self.cached.items()):
            if any(id(group) not in there for plan in other.plans for group, _, _ in plan.hyper.groups):
                del self.cached[old]
        self.cached[key] = cached
        if len(self.cached) > most:
            self.cached.popitem(last=False)

    def used(self, key: Any) -> None:
        """Note that a set has come again."""
        self.cached.move_to_end(key)
