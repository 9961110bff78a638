"""What the ranks tell each other in a step: the maxima before the update, and the sums after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks.sharded import check_same, step_refused_elsewhere
from ..entries import SCALARS
from ..step.blocks import State
from ..step.fp8 import as_int32
from ..step.plan import Plan
from .exchange import MODULO, MOST, Table, agree, digest
from .layout import is_sharded, layout

REDUCED_BYTES = 36  # per tensor and split mesh axis: three maxima of 4 and three sums of 8
CLIP_BYTES = 16  # more where clipping is on: two sums
EXACT_BYTES = 16  # more where weights are kept exactly: their checksum, before and after the update


class Reduction:
    """What the ranks tell each other in a step, about all tensors of a device, with gradients or not.

    Before the update the bits of the largest gradient and moments, int32, which order like the magnitudes and put inf
    and NaN on top, and where gradients are clipped the sums of their squares; after it the sums that the next step
    needs. All are integers, so that no order shows. Every rank takes part with a row for every tensor, in every step:
    none waits for another, whatever has gradients there. Below the maxima goes a signature of what is stepped.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.device = params[0].device
        self.table = Table([layout(p) for p in params], self.device)
        self.row = {id(p): row for row, p in enumerate(params)}

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> list[Reduction]:
        """One for every device of parameters that are split."""
        devices = {p.device: None for p in params if is_sharded(p) and layout(p).groups}
        return [cls([p for p in params if p.device == device]) for device in devices]

    def bind(self, plans: Sequence[Plan]) -> BoundReduction:
        """The reduction for these plans, of which it takes those of its device."""
        return BoundReduction(self, [plan for plan in plans if plan.kind.device == self.device], len(plans))


class BoundReduction:
    """A :class:`Reduction` and the plans of a step."""

    def __init__(self, reduction: Reduction, plans: Sequence[Plan], count: int) -> None:
        self.plans, self.table, self.device = plans, reduction.table, reduction.device
        self.rows = [torch.tensor([reduction.row[key] for key in plan.ids], device=self.device) for plan in plans]
        # Whether all tensors of the step are shared by all ranks that share any, which then know the same of them.
        self.exact = any(plan.kind.exact and plan.sharded for plan in self.plans)
        self.alone = len(self.plans) == count and all(rows is None for _, rows in self.table.groups)

    def _filled(self, parts: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
        """A table with a row per tensor of the device and one more; what is not stepped has zeros."""
        table = torch.zeros(self.table.count + 1, width, dtype=dtype, device=self.device)
        for rows, part in zip(self.rows, parts, strict=True):
            table[rows] = part
        return table

    def before(self, signature: int, failed: bool) -> tuple[bool, bool]:
        """Make the largest gradients and moments those of whole tensors.

        Returns whether another rank steps other tensors, by this ``signature`` of 31 bits, and whether one ``failed``;
        reading that waits for the device. Where one is true no other method may be called, on no rank.
        """
        found = [plan.whole_largest for plan in self.plans]
        states = self._states()
        parts = [
            stepped(s, [g[: len(s.state_index)], *(x[s.state_index].view(torch.int32) for x in (s.max_m, s.max_v))])
            for g, s in zip(found, states, strict=True)
        ]
        maxima = self._filled(parts, 3, torch.int32)
        own = [signature, MOST - signature, int(failed)]
        maxima[-1] = torch.tensor(own, dtype=torch.int32)
        self.table.largest(maxima)
        told = maxima[-1].tolist()
        if told != own or failed:
            return told[:2] != own[:2], bool(told[2])
        for g, s, rows in zip(found, states, self.rows, strict=True):
            g[: len(rows)] = maxima[rows, 0]
            s.max_m[s.state_index], s.max_v[s.state_index] = (maxima[rows, k].view(torch.float32) for k in (1, 2))
        if self.exact:
            self._checksums()
        return False, False

    def _checksums(self) -> None:
        """Make checksums of weights, before a step, those of whole tensors."""
        sums = [plan.whole_checksum for plan in self.plans]
        pairs = [(x[: len(rows)], rows) for x, rows in zip(sums, self.rows, strict=True) if x is not None]
        table = torch.zeros(self.table.count, 1, dtype=torch.int64, device=self.device)
        for x, rows in pairs:
            table[rows, 0] = x.long()
        self.table.sum(table)
        for x, rows in pairs:
            x.copy_(as_int32(table[rows, 0]))

    def squares(self, sums: Sequence[Tensor]) -> None:
        """Make sums of squared gradients, int64 [tensors, 2] for each plan, those of whole tensors, in place."""
        own = [x[: len(plan.ids)] for x, plan in zip(sums, self.plans, strict=True)]
        table = self._filled(own, 2, torch.int64)[:-1]
        self.table.sum(table)
        for x, rows in zip(own, self.rows, strict=True):
            x.copy_(table[rows])

    def after(self) -> None:
        """Make the sums in the state those of whole tensors."""
        states, parts = self._states(), []
        for plan, s in zip(self.plans, states, strict=True):
            # Without caution the last one stays: the first of the ranks adds it.
            first = plan.shards.first_rank[: len(s.state_index)]
            shares = 1, 1, 1 if plan.kind.caution else first, 1 if plan.kind.exact else first
            sums = s.weight_sum, s.update_sum, s.mask_count, s.checksum
            parts.append(stepped(s, [x[s.state_index] * share for x, share in zip(sums, shares, strict=True)]))
        width = 4 if self.exact else 3
        table = self._filled([x[:, :width] for x in parts], width, torch.int64)[:-1]
        self.table.sum(table)
        for s, rows in zip(states, self.rows, strict=True):
            s.weight_sum[s.state_index], s.update_sum[s.state_index], s.mask_count[s.state_index] = table[
                rows, :3
            ].unbind(1)
            if self.exact:
                s.checksum[s.state_index] = table[rows, 3] & MODULO

    def _states(self) -> list[State]:
        return [plan.store.state(plan.state_index[: len(plan.ids)]) for plan in self.plans]


def stepped(state: State, numbers: Sequence[Tensor]) -> Tensor:
    """A row per tensor; 0 for those that are left out."""
    return torch.stack(list(numbers), 1) * (state.state_index != 0)[:, None]


def meet(reductions: Sequence[BoundReduction], signature: int, error: Exception | None) -> None:
    """Begin a step with the other ranks, of which all must be here; raises on all of them if one cannot take it.

    Raises:
        RuntimeError: the ranks do not step the same tensors, or another one has an error.
        Exception: ``error``, which this rank has.
    """
    told = [reduction.before(signature, error is not None) for reduction in reductions]
    agree(error, step_refused_elsewhere() if any(failed for _, failed in told) else None)
    check_same(any(differ for differ, _ in told))


def signature(plans: Sequence[Plan]) -> int:
    """31 bits of which split tensors are stepped, by salts and shapes."""
    found = []
    for plan in plans:
        split = [(p, row) for i, p, row in plan.stepped() if plan.layouts[i].groups]
        salts = plan.store.columns[SCALARS.index("salt")].tolist() if split else []
        found += [(salts[row], tuple(p.shape), plan.kind[3:]) for p, row in split]
    return digest(found)
