"""The one look by which a step finds that everything is where the steps before left it.

Programs may replace an entry of a state, give it other memory (``.data =``, ``set_``, a resized storage), write codes,
or bring gradients of another kind; weights and gradients may be elsewhere in every step. What is compared is cheap, and
nothing is kept alive by it: kinds of tensors by the guards that Dynamo checks with, addresses by native code, moments'
identities by weak references and what others write to them by their version counters. Where one thing differs, the step
looks at everything and checks it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import chain, compress
from operator import attrgetter, is_not, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codes import REMAINDER
from ..moments import MOMENTS, dtypes
from ..sharding.layout import is_sharded
from ..wrapped import PLAIN
from . import native
from .tables import integers

if TYPE_CHECKING:
    from .plan import Plan

DTYPE, LAYOUT, DEVICE, LOCAL = map(attrgetter, ("dtype", "layout", "device", "_local_tensor"))


class Known:
    """Of every tensor of a plan, where the last step that was checked found it."""

    def __init__(self, count: int, operands: int) -> None:
        self.there: list[bool] = []  # which have gradients in this step
        self.rows = [0] * count  # of their states in the store; 0: never stepped
        self.places = torch.zeros(operands, count, dtype=torch.int64)
        self.rows_of_places = list(self.places)
        self.shapes: list[Any] = [None] * count
        self.specs: list[Any] = [None] * count  # of DTensors
        self.plain = self.simple = True
        self.index = self.row_index = torch.zeros(0, dtype=torch.int64)
        self.all = False
        self.guards: Callable[..., bool] | None = None  # of all that a step is over
        self.each: list[Callable[..., bool] | None] = [None] * count  # of each tensor, for other sets
        self.looks = 0  # since the set of tensors changed
        self.moved = 0  # weights that have other memory than in the step before

    def note(self, plan: Plan, weights: Sequence[Tensor]) -> None:
        """Remember what a step that was checked works on; ``weights`` are the parameters' own tensors."""
        types = set(map(type, plan.params))
        self.plain = types <= PLAIN and self.plain
        self.simple = self.simple and all(type(p) in PLAIN or is_sharded(p) for p in plan.params)
        index = integers(plan.present)
        self.places[1] = -1
        for k, tensors in enumerate((weights, *plan.operands[1:])):
            if k != 1:
                self.places[k, index] = integers(map(Tensor.data_ptr, tensors))
        for i, p, w, row in zip(plan.present, plan.params, weights, plan.state_indices, strict=True):
            self.rows[i], self.shapes[i], self.specs[i] = row, w.shape, getattr(p, "_spec", None)
            self.each[i] = None
        self._choose(plan)

    def _choose(self, plan: Plan) -> None:
        count = len(self.rows)
        own = set(plan.present)
        self.all = len(own) == count
        self.index, self.row_index = integers(plan.present), integers(plan.state_indices) - 1
        self.guards, self.looks = None, 0
        self.there = [i in own for i in range(count)]

    def look(
        self, plan: Plan, params: list[Tensor], grads: list[Any], states: Mapping[Any, Any], weights: set[int]
    ) -> bool:
        """See :meth:`Plan.look`."""
        there = list(map(is_not, grads, itertools.repeat(None)))
        other = there != self.there
        if other:
            present = list(compress(range(len(there)), there))
            rows = list(compress(self.rows, there))
            if not self.simple or 0 in rows:
                return False
            plan.choose(present, rows)
            self._choose(plan)
        if not self.all:
            params, grads = list(compress(params, there)), list(compress(grads, there))
        own: list[Any] = list(map(states.get, params))
        if not all(own) or not plan.store.same(own, plan.state_indices, self.row_index):
            return False
        names = (*MOMENTS, REMAINDER) if plan.kind.exact else MOMENTS
        try:
            operands = [params, grads, *(list(map(itemgetter(name), own)) for name in names)]
            if not self.plain:
                operands = self._local(operands)
            if not self._alike(plan, operands):
                return False
        except (AttributeError, KeyError, TypeError):  # something is missing, or no tensor
            return False
        index = None if self.all else self.index
        if plan.kind.exact and native.look(operands[4], self.rows_of_places[4], index, 1, False):
            return False  # the store has looked at the moments
        changed, self.moved = (native.look(operands[k], self.rows_of_places[k], index, 1, True) for k in (1, 0))
        if changed < 0 or self.moved < 0 or (changed and not are_good(operands[1], weights)):
            self.places[1] = -1
            return False
        plan.hold(params, operands)
        if changed or other or self.moved:
            self.place(plan)
        return True

    def place(self, plan: Plan) -> None:
        """Hand a plan the addresses of this step."""
        plan.place_from(self.places if self.all else self.places * integers(self.there))

    def _local(self, operands: list[list[Tensor]]) -> list[list[Tensor]]:
        """This rank's parts; TypeError where a tensor is not sharded as it was, or a gradient not as its parameter."""
        specs = self.specs if self.all else list(compress(self.specs, self.there))
        for p, g, spec in zip(*operands[:2], specs, strict=True):
            if getattr(p, "_spec", None) is not spec:
                raise TypeError
            if spec is not None and g._spec is not spec:
                other = g._spec
                if other.placements != spec.placements or other.mesh != spec.mesh or other.shape != spec.shape:
                    raise TypeError
        return [
            [x if spec is None else x._local_tensor for x, spec in zip(own, specs, strict=True)]  # type: ignore[attr-defined]
            for own in operands
        ]

    def _alike(self, plan: Plan, operands: list[list[Tensor]]) -> bool:
        """Whether these are contiguous plain tensors of the plan's dtypes and of known shapes, on its device."""
        if self.guards is not None and self.guards(*chain.from_iterable(operands)):
            return True
        own = self.each if self.all else list(compress(self.each, self.there))
        if None in own or not all(map(_call, own, *operands)):
            if not self._are_alike(plan, operands):
                return False
            for k, i in enumerate(plan.present):
                self.each[i] = guards([x[k] for x in operands])
        if self.looks == 1:
            self.guards = guards(list(chain.from_iterable(operands)))
        self.looks += 1
        return True

    def _are_alike(self, plan: Plan, operands: list[list[Tensor]]) -> bool:
        shapes = self.shapes if self.all else list(compress(self.shapes, self.there))
        kind = plan.kind
        expected = (kind.param_dtype, kind.grad_dtype, *dtypes(kind.float8), *[torch.int16] * kind.exact)
        for tensors, dtype in zip(operands, expected, strict=True):
            if set(map(DTYPE, tensors)) != {dtype} or set(map(DEVICE, tensors)) != {kind.device}:
                return False
            if set(map(LAYOUT, tensors)) != {torch.strided} or list(map(Tensor.size, tensors)) != shapes:
                return False
            if not all(map(Tensor.is_contiguous, tensors)) or any(map(Tensor.is_neg, tensors)):
                return False
        return True


def _call(function: Callable[..., bool], *arguments: Any) -> bool:
    return function(*arguments)


def are_good(tensors: Sequence[Tensor], weights: Set[int] = frozenset()) -> bool:
    """Whether tensors at other addresses have memory there, and none begins where ``weights`` do."""
    places = list(map(Tensor.data_ptr, tensors))
    pairs = zip(places, tensors, strict=True)
    empty = 0 in places and any(not place and x.numel() and not x.is_meta for place, x in pairs)
    return not empty and weights.isdisjoint(places)


def apart(plans: Sequence[Plan]) -> bool:
    """Whether, of all that the plans have ever written to, no two have memory in common."""
    begins, sizes = [], []
    for plan in plans:
        numel = torch.tensor(plan.sizes)
        for k, dtype in enumerate(plan.kind.dtypes):
            if k != 1:
                begins.append(plan.known.places[k])
                sizes.append(numel * dtype.itemsize)
    if not begins:
        return True
    size = torch.cat(sizes)
    begin, order = torch.where(size != 0, torch.cat(begins), 0).sort()
    end = torch.where(begin != 0, begin + size[order], 0)
    found: Any = (end[:-1] <= begin[1:]).all().tolist()
    return bool(found)


def guards(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """Whether tensors are of the types, dtypes, devices, sizes and strides of these, in one native call."""
    from torch._C._dynamo.guards import TensorGuards

    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    found = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]
    check: Callable[..., bool] = found.check
    return check
