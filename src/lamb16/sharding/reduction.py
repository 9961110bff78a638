"""What the ranks tell each other in a step: the maxima before the update, and the sums after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks.sharded import differing_steps, step_refused_elsewhere
from ..entries import SCALARS, TABLES
from ..parameters import Parameters
from ..remainder import is_exact
from ..step.fp8 import as_int32
from ..step.plan import Plan
from ..step.tables import sent
from .exchange import MODULO, MOST, Table, digest
from .layout import is_sharded, layout

REDUCED_BYTES = 36  # per tensor and split mesh axis: three maxima of 4 and three sums of 8
CLIP_BYTES = 16  # more where clipping is on: two sums
EXACT_BYTES = 16  # more where weights are kept exactly: their checksum, before and after the update


class Reduction:
    """What the ranks tell each other in a step, about all tensors of a device, with gradients or not.

    Before the update the bits of the largest gradient and moments, int32, which order like the magnitudes and put inf
    and NaN on top, and where gradients are clipped the sums of their squares; after it the sums that the next step
    needs. All are integers, so that no order shows. Every rank takes part with a row for every tensor, in every step:
    none waits for another, whatever has gradients there. Below the maxima goes a :class:`Message`.
    """

    def __init__(self, parameters: Parameters, device: torch.device) -> None:
        params = [p for p in parameters if p.device == device]
        self.device = device
        self.table = Table([layout(p) for p in params], device)
        self.row = {id(p): row for row, p in enumerate(params)}
        self.exact = any(
            is_sharded(p) and p.device == device and is_exact(p, group)
            for group in parameters.groups
            for p in group["params"]
        )
        # Whether all tensors are shared by all ranks that share any, which then know the same of them.
        self.alone = len(params) == len(list(parameters)) and all(rows is None for _, rows in self.table.groups)

    @classmethod
    def of(cls, parameters: Parameters) -> list[Reduction]:
        """One for every device of parameters that are split."""
        devices = {p.device: None for p in parameters if is_sharded(p) and layout(p).groups}
        return [cls(parameters, device) for device in devices]

    def bind(self, plans: Sequence[Plan]) -> BoundReduction:
        """The reduction for these plans, of which it takes those of its device."""
        return BoundReduction(self, [plan for plan in plans if plan.kind.device == self.device])


class Message(NamedTuple):
    """What a rank tells the others about its step; they hear of each number the largest."""

    signature: int  # 31 bits of what is stepped
    negated: int  # MOST less that
    failed: int  # 1: it cannot take this step
    goes_on: int  # 1: it takes the step without waiting for the answer
    clips: int  # 1: it does, and clips gradients

    def check(self, told: Message) -> Exception | None:
        """The error of a rank that has told this and was ``told`` that."""
        if told.failed:
            return step_refused_elsewhere()
        return differing_steps() if told[:2] != self[:2] else None


class Late(NamedTuple):
    """An answer that is on its way to the host."""

    own: Message
    told: Tensor
    event: Any  # None on the CPU

    def error(self) -> Exception | None:
        """What is wrong with the step; waits for the answer."""
        if self.event is not None:
            self.event.synchronize()
        return self.own.check(Message(*self.told.tolist()))


class BoundReduction:
    """A :class:`Reduction` and the plans of a step."""

    def __init__(self, reduction: Reduction, plans: Sequence[Plan]) -> None:
        self.reduction, self.plans, self.table, self.device = reduction, plans, reduction.table, reduction.device
        self.exact, self.alone = reduction.exact, reduction.alone
        self.rows = [_index([reduction.row[key] for key in plan.ids], self.device) for plan in plans]
        everywhere = [dict(zip(plan.present, plan.state_indices, strict=True)) for plan in plans]
        indices = [[own.get(i, 0) for i in range(len(plan.ids))] for plan, own in zip(plans, everywhere, strict=True)]
        self.indices = [_index(own, self.device) for own in indices]  # of their states; 0 for what is left out
        self.there = [torch.tensor(own, device=self.device)[:, None] != 0 for own in indices]  # and counts as 0
        self.shares = list(map(_shares, plans, self.there))
        self.stop: Tensor | None = None  # whether the step is frozen, bool 0-d, where nobody waits for that
        self.kept: list[Tensor] = []  # the sums in the state, in case it is
        self.sent: tuple[Message, Tensor] | None = None  # the last message

    def _filled(self, parts: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
        """A table with a row per tensor of the device; what is not stepped has zeros."""
        if len(parts) == 1 and len(parts[0]) == self.table.count and isinstance(self.rows[0], slice):
            return parts[0]
        table = torch.zeros(self.table.count, width, dtype=dtype, device=self.device)
        for rows, part in zip(self.rows, parts, strict=True):
            table[rows] = part
        return table

    def before(self, own: Message) -> Message | Late:
        """Make the largest gradients and moments those of whole tensors.

        Returns what the other ranks have told, for which the host waits for the device; where this rank goes on, an
        answer for later, and on the device a step that ranks cannot take together changes nothing. Where such a step
        is known, and no rank goes on, no other method may be called, on no rank.
        """
        found = [plan.gather().largest[: len(plan.ids)] for plan in self.plans]
        states = self._states(torch.float32, 2, 4)
        old = [table[index] for table, index in states]
        parts = [torch.cat([g[:, None], x.view(torch.int32)], 1) for g, x in zip(found, old, strict=True)]
        table = self._filled([x * there for x, there in zip(parts, self.there, strict=True)], 3, torch.int32)
        if self.sent is None or self.sent[0] != own:
            self.sent = own, sent(torch.tensor([*own, 0], dtype=torch.int32), self.device)
        maxima = torch.cat([table, self.sent[1].view(2, 3)])
        self.table.largest(maxima)
        answer = maxima[-2:].view(-1)[: len(own)]
        self.stop, self.kept = None, []
        if own.goes_on:
            told: Message | Late = self._late(own, answer)
            self.stop = (answer[:2] != self.sent[1][:2]).any() | (answer[2] != 0)
            self.kept = [table[index].clone() for table, index in self._states(torch.int64, 0, 4)]
        else:
            told = Message(*answer.tolist())
            if own.check(told) is not None:
                if told.goes_on and self.exact:
                    self._checksums()
                return told
        for g, x, (table, index), rows in zip(found, old, states, self.rows, strict=True):
            whole = maxima[rows]
            g.copy_(whole[:, 0])
            table[index] = self._unless_stopped(whole[:, 1:].view(torch.float32), x)
        if self.exact:
            self._checksums()
        return told

    def _late(self, own: Message, answer: Tensor) -> Late:
        if not answer.is_cuda:
            return Late(own, answer.clone(), None)
        host = torch.empty(len(own), dtype=answer.dtype, pin_memory=True)
        host.copy_(answer, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(answer.device))
        return Late(own, host, event)

    def _unless_stopped(self, x: Tensor, old: Tensor) -> Tensor:
        return x if self.stop is None else torch.where(self.stop, old, x)

    def _checksums(self) -> None:
        """Make checksums of weights, before a step, those of whole tensors."""
        sums = [plan.found.checksum for plan in self.plans]
        own = zip(sums, self.plans, self.rows, strict=True)
        pairs = [(x[: len(plan.ids)], rows) for x, plan, rows in own if x is not None]
        table = torch.zeros(self.table.count, 1, dtype=torch.int64, device=self.device)
        for x, rows in pairs:
            table[rows, 0] = x.long()
        self.table.sum(table)
        for x, rows in pairs:
            x.copy_(as_int32(table[rows, 0]))

    def squares(self, sums: Sequence[Tensor]) -> None:
        """Make sums of squared gradients, int64 [tensors, 2] for each plan, those of whole tensors, in place."""
        own = [x[: len(plan.ids)] for x, plan in zip(sums, self.plans, strict=True)]
        table = self._filled(own, 2, torch.int64)
        self.table.sum(table)
        for x, rows in zip(own, self.rows, strict=True):
            x.copy_(table[rows])

    def after(self) -> None:
        """Make the sums in the state those of whole tensors."""
        width = 4 if self.exact else 3
        states = self._states(torch.int64, 0, width)
        parts = [table[index] * share[:, :width] for (table, index), share in zip(states, self.shares, strict=True)]
        sums = self._filled(parts, width, torch.int64)
        self.table.sum(sums)
        if self.exact:
            sums[:, 3] &= MODULO
        for (table, index), rows, old in zip(states, self.rows, self.kept or parts, strict=True):
            table[index] = self._unless_stopped(sums[rows], old[:, :width])

    def unbound(self) -> BoundReduction:
        """The same without plans."""
        return BoundReduction(self.reduction, [])

    def _states(self, dtype: torch.dtype, first: int, end: int) -> list[tuple[Tensor, Any]]:
        """For each plan columns of the table of this dtype, and which rows in it the tensors' states have."""
        k = list(TABLES).index(dtype)
        return [(plan.store.tables[k][:, first:end], x) for plan, x in zip(self.plans, self.indices, strict=True)]


def _index(rows: list[int], device: torch.device) -> Any:
    """These rows of a table, as a slice where they follow one another: nothing is to be copied then."""
    if rows and rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _shares(plan: Plan, there: Tensor) -> Tensor:
    """What of each of the sums in the state this rank adds, int64 [tensors, 4], in their order.

    Those that no step makes stay what they are: the first of the ranks adds all of them.
    """
    ones, first = there.to(torch.int64), there * plan.shards.first_rank[: len(there), None]
    counts, checksums = ones if plan.kind.caution else first, ones if plan.kind.exact else first
    return torch.cat([ones, ones, counts, checksums], 1)


def meet(
    reductions: Sequence[BoundReduction], signature: int, error: Exception | None, goes_on: bool, clips: bool
) -> tuple[list[Late], Exception | None]:
    """Begin a step with the other ranks, of which all must be here; raises on all of them if one cannot take it.

    With ``goes_on`` nothing is waited for: the answers are returned. Where other ranks go on, an error is returned, not
    raised, for the next step, in which they will hear of it; this one has then done what they do, without plans.

    Raises:
        RuntimeError: the ranks do not step the same tensors, or another one has an error.
        Exception: ``error``, which this rank has.
    """
    own = Message(signature, MOST - signature, int(error is not None), int(goes_on), int(goes_on and clips))
    answers = [reduction.before(own) for reduction in reductions]
    late = [x for x in answers if isinstance(x, Late)]
    told = [x for x in answers if isinstance(x, Message)]
    wrong = [error, *map(own.check, told)]
    found = next((x for x in wrong if x is not None), None)
    if found is not None and not any(x.goes_on for x in told):
        raise found
    if found is not None:
        _follow([reduction.unbound() for reduction in reductions], any(x.clips for x in told))
    return late, found


def is_told_at_once(device: torch.device) -> bool:
    """Whether hearing from other ranks takes no waiting for a device, or cannot be put off."""
    return device.type != "cuda" or torch.cuda.is_current_stream_capturing()


def _follow(reductions: Sequence[BoundReduction], clips: bool) -> None:
    """Take part in what is left of the step of ranks that go on."""
    for reduction in reductions if clips else ():
        if not reduction.alone:
            reduction.table.largest_anywhere(torch.zeros((), dtype=torch.int32, device=reduction.device))
    for reduction in reductions if clips else ():
        reduction.squares([])
    for reduction in reductions:
        reduction.after()


def signature(plans: Sequence[Plan]) -> int:
    """31 bits of which split tensors are stepped, by salts and shapes."""
    found = []
    for plan in plans:
        split = [(p, row) for i, p, row in plan.stepped() if plan.layouts[i].groups]
        salts = plan.store.columns[SCALARS.index("salt")].tolist() if split else []
        found += [(salts[row], tuple(p.shape), plan.kind[3:]) for p, row in split]
    return digest(found)
