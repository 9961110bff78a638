"""What is kept from step to step for the parameters of a kind: tables with a row per tensor, and where all of it lies.

A plan is for all parameters of a kind that may have gradients; a step is over those that have some. The others are left
out: nothing of them is read or written, and in the tables they have state index 0, which is padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import is_not, itemgetter
from typing import Any

import torch
from torch import Tensor

from ..codes import REMAINDER
from ..moments import MOMENTS
from ..sharding.layout import layout, local, sharding_of
from ..store import Store
from ..wrapped import PLAIN, fake_mode
from . import factors
from .blocks import Gathered, Inputs, Norm, Outputs, Stages, Sums
from .factors import FLOATS, INTEGERS, STOPPED
from .kinds import Graph, Kind
from .known import Known
from .tables import HyperTable, Shards, integers, sent

Member = tuple[Tensor, dict[str, Any]]  # a parameter and its group


class Plan(ABC):
    """A step over some of the parameters of one :class:`Kind`.

    The parameters are sorted by group, so that a group is a slice of the tables. Of parameters that are sharded over a
    mesh the plan sees this rank's shards; what the ranks tell each other
    (:class:`lamb16.sharding.reduction.Reduction`) comes after :meth:`inspect` and after :meth:`update`. Tensors are
    held during a step only.
    """

    stages: Stages  # how the results of rows become those of tensors
    largest: Tensor  # results of rows: bits of max|g|
    checksum: Tensor | None  # of the weights
    sums: Sums

    def __init__(self, kind: Kind, members: Sequence[Member], executor: Any, store: Store, skipped: Tensor) -> None:
        self.kind, self.executor, self.store, self.skipped = kind, executor, store, skipped
        params = [p for p, _ in members]
        self.key = _key(members)
        self.ids = list(map(id, params))
        self.index_of = {key: i for i, key in enumerate(self.ids)}
        self.layouts = list(map(layout, params))
        self.sizes = [local(p).numel() for p in params]
        self.sharded = any(x.groups for x in self.layouts)
        self.count = count = max(len(params), 2)  # graphs are compiled for two or more of everything
        self.params: Sequence[Tensor] = []
        self.operands: list[list[Tensor]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.present: list[int] = []  # the tensors of this step
        self.state_indices: list[int] = []  # theirs
        # Where each operand of each tensor begins; 0 for what is left out.
        self.addresses = torch.zeros(len(kind.dtypes), count, dtype=torch.int64)
        self.clips = self.gathers = False
        self.known = Known(len(params), len(kind.dtypes))
        device = kind.device
        self.hyper = HyperTable(_slices(members), count, device)
        self.shards = Shards(self.layouts, count, device)
        self.state_index = self._zeros(count, dtype=torch.int64)
        self.floats, self.integers = self._zeros(count, FLOATS), self._zeros(count, INTEGERS, dtype=torch.int32)
        self.report = self._zeros(count, 3, dtype=torch.float64)
        counted = self._zeros(count, dtype=torch.bool)
        columns = [list(x.unbind(1)) for x in (self.floats, self.integers, self.report)]
        self.outputs = Outputs(columns[0], columns[1], columns[2], counted, skipped)
        self.found_inf, self.factor = self._zeros(), torch.ones((), dtype=torch.float64, device=device)
        self.factors_given = False
        numbers, integers = [partial(self._zeros, dtype=x) for x in (torch.float64, torch.int32)]
        self.found = Gathered(integers(count), integers(), self._zeros(2), integers(count) if kind.exact else None)
        self.norm = Norm(numbers(2), self._zeros(2, dtype=torch.int64), numbers(), self.factor)
        self.limited: float | None = None  # the limits that `norm` was given, without a scale
        each, two = torch.arange(count, device=device)[:, None], torch.arange(2, device=device)
        ones = torch.ones_like(each)
        self.one_row = Stages(each, ones, two, each, ones, two)
        self.from_whole = False

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.kind.device)

    def fits(self, members: Sequence[Member]) -> bool:
        """Whether this plan is for these parameters, as they are."""
        return self.key == _key(members)

    # -- running -------------------------------------------------------------------------------------------------

    def begin(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: list[dict[str, Any]], rows: list[int]
    ) -> None:
        """Step these parameters: local gradients, states, and which rows of the store the states have."""
        self.choose(list(map(self.index_of.__getitem__, map(id, params))), rows)
        weights = list(params) if set(map(type, params)) <= PLAIN else list(map(local, params))
        contiguous = list(map(Tensor.contiguous, weights))
        names = (*MOMENTS, REMAINDER) if self.kind.exact else MOMENTS
        kept = [list(map(itemgetter(name), states)) for name in names]
        if any(set(map(type, x)) - {Tensor} for x in kept):
            kept = [list(map(local, x)) for x in kept]
        self.hold(params, [contiguous, list(map(Tensor.resolve_neg, map(Tensor.contiguous, grads))), *kept])
        self.copies = [(w, c) for w, c in zip(weights, contiguous, strict=True) if w is not c]
        if not fake_mode():
            self.place()
            self.known.note(self, weights)

    def hold(self, params: Sequence[Tensor], operands: list[list[Tensor]]) -> None:
        """Keep the tensors of this step: weights, gradients, moments and remainders, contiguous plain tensors."""
        self.params, self.operands, self.copies = params, operands, []
        self.from_whole = False

    def want(self, clips: bool, gathers: bool) -> None:
        """From now on squares may be asked for too, or what is known of whole tensors."""
        self.clips, self.gathers = self.clips or clips, self.gathers or gathers or clips

    def separate(self, weights: set[int]) -> None:
        """Copy gradients that are weights, which begin at these addresses: the step would change them as it reads."""
        grads = self.operands[1]
        copied = [g.clone() if g.numel() and g.data_ptr() in weights else g for g in grads]
        if any(map(is_not, copied, grads)):
            self.operands[1] = copied
            self.place()

    def place(self) -> None:
        """Note where the tensors of this step are."""
        index = integers(self.present)
        for row, tensors in zip(self.addresses, self.operands, strict=True):
            row[index] = integers(map(Tensor.data_ptr, tensors))

    def place_from(self, places: Tensor) -> None:
        """They are here: int64 [operands, tensors], 0 for what is left out."""
        self.addresses[:, : places.shape[1]] = places

    def look(self, params: list[Tensor], grads: list[Any], states: Mapping[Any, Any], weights: set[int]) -> bool:
        """Whether all of a step is where it is known to be; the step has then begun.

        Parameters are the plan's, with a gradient or None for each; ``weights`` are the addresses of all parameters.
        """
        return self.known.look(self, params, grads, states, weights)

    def choose(self, present: list[int], state_indices: list[int]) -> None:
        """Step these tensors, whose states have these rows of the store."""
        if (present, state_indices) == (self.present, self.state_indices):
            return
        self.addresses.zero_()
        everywhere = [0] * self.count
        for i, state_index in zip(present, state_indices, strict=True):
            everywhere[i] = state_index
        self.state_index.copy_(sent(integers(everywhere), self.kind.device))
        self.present, self.state_indices = present, state_indices

    @abstractmethod
    def inspect(self) -> None:
        """Read the gradients; changes no state."""

    @abstractmethod
    def squares(self, norm: bool) -> None:
        """Read the gradients again: their squares, into ``sums.weights`` and ``sums.updates``, and of these ``norm``.

        Gradients are multiplied by ``found.rescale``.
        """

    @abstractmethod
    def run(self) -> None:
        """Factors, scales and step counts; weights and moments; the sums that the next step needs."""

    @property
    def goes_back(self) -> bool:
        """Whether :meth:`run_calls` keeps what it takes to go back."""
        return True

    @property
    def at_once(self) -> bool:
        """Whether no Python runs while :meth:`run` changes states and weights."""
        return False

    @abstractmethod
    def update_calls(self, left: dict[int, int]) -> None:
        """Call ``update``; takes tensors that are written to out of ``left``, whose keys are those of this step."""

    def run_calls(self) -> None:
        """:meth:`run`, call by call.

        Where one fails, for want of memory, the tensors that have been written to are of this step, with all that their
        states hold, and the others of the one before.
        """
        device = self.kind.device
        kept = [x.clone() for x in (*self.store.tables, self.skipped)] if self.goes_back else []
        left = dict(zip(self.present, self.state_indices, strict=True))
        try:
            self.execute("scale", self.scale_arguments(self.from_whole))
            self.update_calls(left)
        except BaseException:
            if kept:
                index, rows = torch.tensor([list(left), list(left.values())], dtype=torch.int64, device=device)
                for table, old in zip(self.store.tables, kept, strict=False):
                    table[rows] = old[rows]
                self.skipped.copy_(kept[-1])
                self.state_index[index] = 0
                self.execute("fold", self.fold_arguments())
            self.choose([], [])
            raise
        self.execute("fold", self.fold_arguments())

    def gather(self) -> Gathered:
        """What is known of whole tensors once the gradients have been read; :meth:`update` then goes by it.

        Of shards the largest gradients are to be replaced by those of all ranks, and the checksums by their sums.
        """
        if not self.from_whole:
            self.from_whole = True
            self._gather()
        return self.found

    @abstractmethod
    def _gather(self) -> None:
        """Run ``gather``."""

    def squared_gradients(self) -> Tensor:
        """The sums of every tensor's squared gradients, int64 [tensors, 2]; see :func:`lamb16.step.update.inspect`."""
        found = [factors.sum_of(x, self.stages) for x in (self.sums.weights, self.sums.updates)]
        return torch.stack(found, 1) * (self.state_index != 0)[:, None]

    def limit(self, max_norm: float, inverse_scale: Tensor | None) -> None:
        """What ``norm`` brings the gradients to, and the inverse of a gradient scaler's scale."""
        if max_norm != self.limited or inverse_scale is not None:
            self.norm.limits[0] = max_norm
            self.norm.limits[1] = 1.0 if inverse_scale is None else inverse_scale.view(())
            self.limited = max_norm if inverse_scale is None else None

    def give(self, found_inf: Tensor | None, factor: Tensor | None, stop: Tensor | None) -> None:
        """What multiplies all gradients, float64, and whether a scaler has found an inf; else 1, and 0.

        With ``stop``, bool 0-d, the step changes nothing, and does not count as skipped.
        """
        if self.factors_given or found_inf is not None or factor is not None or stop is not None:
            if factor is not self.factor:
                self.factor.fill_(1.0) if factor is None else self.factor.copy_(factor.view(()))
            self.found_inf.zero_() if found_inf is None else self.found_inf.copy_(found_inf.view(()))
            if stop is not None:
                self.found_inf.masked_fill_(stop.to(self.kind.device), STOPPED)
        self.factors_given = found_inf is not None or factor is not None or stop is not None

    def get_ready(self, found_inf: Tensor | None, factor: Tensor | None, stop: Tensor | None) -> None:
        """What :meth:`update` needs once the gradients are known; see :meth:`give`."""
        self.give(found_inf, factor, stop)
        self.hyper.fill()

    def update(self) -> None:
        """The step, from which on states and weights change."""
        self.run()
        for w, c in self.copies:
            w.copy_(c)
        written = [x for k, own in enumerate(self.operands) if k != 1 for x in own]
        written += [p for p in self.params if type(p) not in PLAIN]
        written += [w for w, _ in self.copies]
        try:
            torch.autograd.graph.increment_version(written)
        except RuntimeError:  # inference tensors have no versions
            torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])
        self.store.stepped(self.state_indices, self.operands[2:4])

    def scale_arguments(self, whole: bool) -> tuple[Any, ...]:
        """Of ``scale``, from the results of rows or of whole tensors."""
        found = (self.found.largest, self.one_row) if whole else (self.largest, self.stages)
        checksum = self.found.checksum if whole else self.checksum
        shards = self.shards.numel, self.shards.base
        inputs = Inputs(*found, self.hyper.table, *shards, self.factor, self.found_inf, checksum)
        return inputs, self.store.state(self.state_index), self.outputs, self.kind.float8

    def gather_arguments(self) -> tuple[Any, ...]:
        """Of ``gather``."""
        return self.largest, self.checksum, self.stages, self.state_index, self.found

    def norm_arguments(self) -> tuple[Any, ...]:
        """Of ``norm``."""
        return [self.sums.weights, self.sums.updates], self.stages, self.state_index, self.found, self.norm

    def fold_arguments(self) -> tuple[Any, ...]:
        """Of ``fold``."""
        state = self.store.state(self.state_index)
        return self.sums, self.stages, self.outputs.counted, self.shards.first_rank, state, self.kind.float8

    def execute(self, function: str, arguments: tuple[Any, ...]) -> None:
        """Run a function that is about all tensors at once."""
        self.executor.run(Graph(function), self.kind, *arguments)

    def stepped(self) -> Iterator[tuple[int, Tensor, int]]:
        """Index, parameter and row of the store of every tensor of this step."""
        return zip(self.present, self.params, self.state_indices, strict=True)

    def drop_tensors(self) -> None:
        """Forget parameters, gradients, moments, remainders and copies of weights."""
        self.params, self.operands, self.copies = [], [], []


def _key(members: Sequence[Member]) -> list[Any]:
    """What a plan is made for."""
    return [(id(p), id(group), local(p).numel(), sharding_of(p)) for p, group in members]


def _slices(members: Sequence[Member]) -> list[tuple[dict[str, Any], int, int]]:
    """The groups, each with the range of its members."""
    slices: list[tuple[dict[str, Any], int, int]] = []
    for i, (_, group) in enumerate(members):
        if not slices or slices[-1][0] is not group:
            slices.append((group, i, i))
        slices[-1] = (group, slices[-1][1], i + 1)
    return slices
