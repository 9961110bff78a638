"""Steps over some of the tensors that a plan was made for.

Where the set of parameters with gradients changes from step to step a plan for each set would take longer to make than
its step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from .packing import AddressPacking, ForeachPacking
from .plan import Batch, Plan


def divisible(plan: Plan) -> bool:
    """Whether there can be a :class:`Part` of this plan: on the CPU, where each large tensor has a call of its own."""
    packed = all(isinstance(batch.packing, (AddressPacking, ForeachPacking)) for batch in plan.batches)
    return packed and plan.kind.group == 1 and plan.plain and not plan.sharded


class Part(Plan):
    """A plan for some of another's tensors, with the other's tables and buffers.

    The rows of those that are left out are computed with, as tensors of zeros in row 0 of the store, which is padding.
    """

    def __init__(self, whole: Plan, ids: Collection[int]) -> None:
        """``ids`` are those of the parameters that are stepped."""
        self.__dict__.update(vars(whole))
        self.whole = whole
        self.own = [k for k, key in enumerate(whole.ids) if key in ids]
        index = {k: n for n, k in enumerate(self.own)}  # tensor indices of the whole plan -> those of this one

        def chosen(x: Sequence[Any], kept: Sequence[int] = self.own) -> list[Any]:
            return [x[k] for k in kept]

        self.ids, self.layouts, self.memory = chosen(whole.ids), chosen(whole.layouts), list(map(chosen, whole.memory))
        large = [j for j, (i, _) in enumerate(whole.rows.large) if i in index]
        self.rows = copy(whole.rows)
        self.rows.large = [(index[i], rows) for i, rows in chosen(whole.rows.large, large)]
        self.row_read, self.row_sums = chosen(whole.row_read, large), chosen(whole.row_sums, large)
        self.row_floats, self.row_integers = chosen(whole.row_floats, large), chosen(whole.row_integers, large)
        self.calls = self.readings = [slice(k, k + 1) for k in range(len(large))]
        self.batches = [part for batch in whole.batches if (part := _part(batch, index))]
        self.report = torch.zeros_like(whole.report)  # two parts may follow each other before they are read
        self.outputs = [*whole.outputs[:2], list(self.report.unbind(1))]
        self.state_indices = []
        self.place(chosen(whole.state_indices))

    def place(self, state_indices: list[int]) -> None:
        """As in :class:`Plan`; of tensors that are left out the padding."""
        if state_indices != self.state_indices:
            self.state_indices = state_indices
            everywhere = list(self.whole.state_indices)
            for k, state_index in zip(self.own, state_indices, strict=True):
                everywhere[k] = state_index
            self.whole.place(everywhere)
            self.state_index = torch.zeros_like(self.whole.state_index)
            self.state_index[self.own] = torch.tensor(state_indices)

    def inspect(self, grads: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """As in :class:`Plan`."""
        found = self.largest, self.checksum, *self.sums
        torch._foreach_zero_([x for x in found if x is not None])  # of what is left out
        super().inspect(grads, states)

    @property
    def reports(self) -> Tensor:
        """As in :class:`Plan`."""
        return self.report[self.own]


def _part(batch: Batch, index: dict[int, int]) -> Batch | None:
    """What is left of a batch, of the tensors that have these indices now."""
    packing = batch.packing
    assert isinstance(packing, (AddressPacking, ForeachPacking))
    kept = [k for k, packed in enumerate(packing.packed_rows) if packed.tensor_index in index]
    if not kept:
        return None
    own = [packing.packed_rows[k] for k in kept]
    packed_rows = [packed._replace(tensor_index=index[packed.tensor_index]) for packed in own]
    return batch._replace(packing=packing.part(kept, packed_rows), dirty=True)
