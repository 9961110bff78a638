"""The eager form: the step functions on whole tensors, those of one size together, with temporaries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..moments import raw
from . import update
from .blocks import Block, IndexMap, Sums, in_place
from .kinds import Graph, Kind
from .plan import Plan
from .rows import SMALL


class Eager:
    """The executor that runs the functions as they are."""

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Nothing to do."""

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the function."""
        update.FUNCTIONS[graph.function](*arguments)


class WholePlan(Plan):
    """A plan whose blocks are [tensors, elements]: each row is a tensor."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stages = self.one_row
        self.largest = self._zeros(self.count, dtype=torch.int32)
        self.checksum = self._zeros(self.count, dtype=torch.int32) if self.kind.exact else None
        wide = [False, False, True, True, True, False]
        made = Sums.of(lambda: self._zeros(self.count, dtype=torch.int64), self.kind.caution, self.kind.exact)
        self.sums = Sums._make(x if x is None or w else x.int() for x, w in zip(made, wide, strict=True))

    def _blocks(self) -> Iterator[tuple[Tensor, list[int], Block]]:
        """Blocks with the indices of their tensors, in the tables and in this step."""
        members: dict[Any, list[int]] = {}
        for k, i in enumerate(self.present):
            n = self.sizes[i]
            if n:
                members.setdefault(n if n < SMALL else ("large", k), []).append(k)
        for own in members.values():
            tensors = [[raw(x[k]).view(1, -1) for k in own] for x in self.operands]
            index = torch.tensor([self.present[k] for k in own], device=self.kind.device)
            yield index, own, in_place([x[0] if len(own) == 1 else torch.cat(x) for x in tensors])

    def inspect(self) -> None:
        """As in :class:`Plan`."""
        for index, _, block in self._blocks():
            tables = [self.largest] if self.checksum is None else [self.largest, self.checksum]
            self._read(tables, index, block, None)

    def squares(self, norm: bool) -> None:
        """As in :class:`Plan`."""
        for index, _, block in self._blocks():
            self._read([self.sums.weights, self.sums.updates], index, block, self.found.rescale)
        if norm:
            self.execute("norm", self.norm_arguments())

    def _gather(self) -> None:
        """As in :class:`Plan`."""
        self.execute("gather", self.gather_arguments())

    def _read(self, tables: list[Tensor], index: Tensor, block: Block, rescale: Tensor | None) -> None:
        found = [x[index] for x in tables]
        self.executor.run(Graph("inspect"), self.kind, [block], [found], rescale)
        for table, x in zip(tables, found, strict=True):
            table[index] = x

    def run(self) -> None:
        """As in :class:`Plan`."""
        self.execute("scale", self.scale_arguments(self.from_whole))
        maps = self.shards.index_maps
        for index, own, block in self._blocks():
            found = Sums._make(None if x is None else x[index] for x in self.sums)
            own_maps = None if maps is None else IndexMap(*(x[index] for x in maps))
            tables = self.floats[index], self.integers[index]
            update.update_whole(block, *tables, found, own_maps, self.kind.rounding == "stochastic")
            for table, x in zip(self.sums, found, strict=True):
                if table is not None and x is not None:
                    table[index] = x
            if len(own) > 1:
                for tensors, rows in zip(self.operands, in_place_results(block), strict=True):
                    if rows is not None:
                        torch._foreach_copy_([raw(tensors[k]).view(-1) for k in own], list(rows.unbind(0)))
        self.execute("fold", self.fold_arguments())


def in_place_results(block: Block) -> list[Tensor | None]:
    """What is written of each operand of a block, in their order; the gradients are not."""
    found: list[Tensor | None] = [block.new_p, None, block.new_m, block.new_v]
    return found if block.new_remainder is None else [*found, block.new_remainder]
