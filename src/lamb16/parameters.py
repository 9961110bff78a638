"""The parameters of an optimizer with their groups, names and states, for all that needs more than one of these."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from .checks.arguments import check_names
from .checks.sharded import check_layout
from .checks.tensors import check_parameter, check_rounding


class Parameters:
    """A view of an optimizer's parameter groups and states, made when it is needed."""

    def __init__(self, groups: list[dict[str, Any]], states: dict[Any, Any], seed: int) -> None:
        self.groups, self.states, self.seed = groups, states, seed

    def __iter__(self) -> Iterator[Tensor]:
        """All parameters, group by group."""
        return (p for group in self.groups for p in group["params"])

    def name(self, group: dict[str, Any], i: int) -> str:
        """The parameter's name, or its position among all parameters."""
        if "param_names" in group:
            check_names(group, i)
            return str(group["param_names"][i])
        before = 0
        for other in self.groups:
            if other is group:
                break
            before += len(other["params"])
        return str(before + i)

    def salt(self, group: dict[str, Any], i: int) -> int:
        """From seed and name; without one from position and shape, to which ``ready.add_up`` adds the weights."""
        name = self.name(group, i)
        return tensor_salt(self.seed, name if "param_names" in group else f"{name} {tuple(group['params'][i].shape)}")

    def unnamed(self) -> set[int]:
        """The parameters without names, by id."""
        return {id(p) for group in self.groups if "param_names" not in group for p in group["params"]}

    def names(self) -> list[list[str]]:
        """All names, group by group."""
        return [[self.name(group, i) for i in range(len(group["params"]))] for group in self.groups]

    def named(self) -> dict[str, tuple[Tensor, dict[str, Any], int]]:
        """The judged parameters with their groups and places in these, by name.

        A name that is there gets its group before it, and a number after it where that is there, or another's name.
        """
        names, judged = self.names(), {(id(group), i) for group, i in self.judged()}
        real = set(chain.from_iterable(names))
        named: dict[str, tuple[Tensor, dict[str, Any], int]] = {}
        for k, (group, own) in enumerate(zip(self.groups, names, strict=True)):
            for i, (p, name) in enumerate(zip(group["params"], own, strict=True)):
                key, number = name, itertools.count(2)
                if name in named:
                    key = f"{k}.{name}"
                    while key in named or key in real:
                        key = f"{k}.{name}.{next(number)}"
                named[key] = (p, group, i)
        return {key: place for key, place in named.items() if (id(place[1]), place[2]) in judged}

    def check(self, group: dict[str, Any], i: int) -> None:
        """Raise TypeError or ValueError for a parameter that cannot be optimized in its group."""
        p, name = group["params"][i], self.name(group, i)
        check_parameter(p, name)
        check_layout(p, name)
        check_rounding(p, group, name)

    def fits(self, group: dict[str, Any], i: int) -> bool:
        """Whether a parameter can be optimized in its group; one that is frozen need not be."""
        try:
            self.check(group, i)
        except (TypeError, ValueError):
            return False
        return True

    def judged(self) -> list[tuple[dict[str, Any], int]]:
        """Groups and places of the parameters, but for frozen ones that cannot be optimized."""
        places = ((group, i) for group in self.groups for i in range(len(group["params"])))
        return [(group, i) for group, i in places if group["params"][i].requires_grad or self.fits(group, i)]


def tensor_salt(seed: int, name: str) -> int:
    """A 32-bit salt from the seed and the parameter's name, the same on every machine."""
    digest = hashlib.blake2s(f"{seed}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
