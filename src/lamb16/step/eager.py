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
        self.run_calls()

    def update_calls(self, left: dict[int, int]) -> None:
        """As in :class:`Plan`; a block's tensors are written to when all is there."""
        maps = self.shards.index_maps
        for index, own, block in self._blocks():
            found = Sums._make(None if x is None else x[index] for x in self.sums)
            own_maps = None if maps is None else IndexMap(*(x[index] for x in maps))
            tables = self.floats[index], self.integers[index]
            if len(own) == 1:
                block = block._replace(**{x: torch.empty_like(getattr(block, x)) for x in written(block)})
            update.update_whole(block, *tables, found, own_maps, self.kind.rounding == "stochastic")
            for table, x in zip(self.sums, found, strict=True):
                if table is not None and x is not None:
                    table[index] = x
            for k, name in zip((0, 2, 3, 4), written(block), strict=False):
                results = getattr(block, name).unbind(0)
                torch._foreach_copy_([raw(self.operands[k][j]).view(-1) for j in own], list(results))
            for j in own:
                left.pop(self.present[j], None)


def written(block: Block) -> list[str]:
    """What a block writes: weights, moments and, if there are, remainders."""
    return ["new_p", "new_m", "new_v", *["new_remainder"] * (block.remainder is not None)]
