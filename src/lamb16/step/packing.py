"""Copying what is packed of many tensors into one buffer and back.

Eager steps have a ``torch._foreach_copy_`` for each of weights, gradients, codes and remainders. On CUDA that would be
a launch for every 64 tensors of each, and on the CPU longer than all else that is done for tiny tensors: compiled steps
copy by tables of addresses, on the CPU with a call for each of these, on CUDA with one for all. *Operands* are p, g,
the two moments and, if there are, the remainders of the weights; the *sources* of each are what is packed of it, or
where that is: a list with one for each tensor that has packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..store import addresses
from .blocks import PACKED_ROW, Block
from .cpu_copying import PACK, UNPACK


class PackedRows(NamedTuple):
    """What is packed of a tensor: its elements from ``start`` on, in the packed rows from ``row`` on."""

    tensor_index: int
    start: int
    length: int
    row: int

    @property
    def rows(self) -> int:
        return -(-self.length // PACKED_ROW)

    def of(self, tensor: Tensor) -> Tensor:
        """Its elements in the contiguous tensor; the tensor itself where these are all."""
        return tensor if self.start == 0 else tensor.view(-1)[self.start : self.start + self.length]

    def places(self) -> list[tuple[int, int, int]]:
        """(tensor index, first element, length) of each row."""
        starts = range(self.start, self.start + self.length, PACKED_ROW)
        return [(self.tensor_index, start, min(PACKED_ROW, self.start + self.length - start)) for start in starts]


def memory(block: Block) -> list[Tensor]:
    """The buffers of a block of packed rows, in the order of the operands."""
    found = block.p, block.g, block.m, block.v, block.remainder
    return [x for x in found if x is not None]


class Packing(Protocol):
    """Copies what is packed of some tensors into a block and back."""

    pads: bool  # whether the block's padding becomes 0

    def sources(self, tensors: Sequence[list[Tensor]]) -> list[list[Any]]:
        """The sources for these contiguous p, g, moments and remainders, each a list of all tensors of the plan."""

    def pack(self, sources: Sequence[list[Any]], operands: Sequence[int]) -> None:
        """Copy these operands into the buffer: 0 for p, 1 for g, 2 and 3 for the moments, 4 for remainders."""

    def unpack(self, sources: Sequence[list[Any]]) -> None:
        """Copy all but the gradients back."""


class ForeachPacking:
    """Copies with a ``torch._foreach_copy_`` for each of p, g, codes and remainders."""

    pads = True

    def __init__(
        self,
        packed_rows: Sequence[PackedRows],
        block: Block,
        shapes: Sequence[Sequence[int]],
        moments: Sequence[torch.dtype],
    ) -> None:
        """``block`` has the packed p, g and codes, [rows, PACKED_ROW]; shapes are those of the sources.

        The dtypes are those of the states' moments.
        """
        self.packed_rows, self.block, first = packed_rows, memory(block), packed_rows[0].row
        p, g, m, v, *remainder = self.block
        flat = [x.view(-1) for x in (p, g, m.view(moments[0]), v.view(moments[1]), *remainder)]
        places = [slice((t.row - first) * PACKED_ROW, (t.row - first) * PACKED_ROW + t.length) for t in packed_rows]
        self.rows = [[x[place].view(shape) for place, shape in zip(places, shapes, strict=True)] for x in flat]

    def part(self, kept: Sequence[int], packed_rows: Sequence[PackedRows]) -> ForeachPacking:
        """For the ``kept`` ones among the tensors, whose rows are now ``packed_rows``."""
        found = copy(self)
        found.packed_rows, found.rows = packed_rows, [[x[k] for k in kept] for x in self.rows]
        return found

    def sources(self, tensors: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """A view for every tensor that has packed rows."""
        return [[packed.of(x[packed.tensor_index]) for packed in self.packed_rows] for x in tensors]

    def pack(self, sources: Sequence[list[Tensor]], operands: Sequence[int]) -> None:
        """As in :class:`Packing`."""
        torch._foreach_zero_([self.block[k] for k in operands])
        for k in operands:
            torch._foreach_copy_(self.rows[k], sources[k])

    def unpack(self, sources: Sequence[list[Tensor]]) -> None:
        """As in :class:`Packing`."""
        for k in (0, *range(2, len(sources))):
            torch._foreach_copy_(sources[k], self.rows[k])


class AddressPacking:
    """Copies on the CPU with a call for each operand; the tables are renewed when an address has changed."""

    pads = True

    def __init__(self, packed_rows: Sequence[PackedRows], block: Block, launch: Callable[..., None]) -> None:
        """``block`` as for :class:`ForeachPacking`; ``launch`` is the function of ``cpu_copying.py``."""
        self.buffers, self.launch, self.first = memory(block), launch, packed_rows[0].row
        self._note(packed_rows)

    def _note(self, packed_rows: Sequence[PackedRows]) -> None:
        self.packed_rows, indices = packed_rows, [packed.tensor_index for packed in packed_rows]
        self.chosen: Callable[[list[Tensor]], Sequence[Tensor]] = itemgetter(*indices, indices[0])
        self.places = torch.tensor(
            [(packed.start, packed.length, packed.row - self.first) for packed in packed_rows], device="cpu"
        )
        self.addresses: list[list[int]] = [[] for _ in self.buffers]
        self.tables: list[Tensor] = [self.places for _ in self.buffers]

    def part(self, kept: Sequence[int], packed_rows: Sequence[PackedRows]) -> AddressPacking:
        """As in :class:`ForeachPacking`."""
        found = copy(self)
        found._note(packed_rows)
        return found

    def sources(self, tensors: Sequence[list[Tensor]]) -> list[list[int]]:
        """Where the tensors begin that have packed rows; they are to be kept until all is copied."""
        return [addresses(self.chosen(x)[:-1]) for x in tensors]

    def pack(self, sources: Sequence[list[int]], operands: Sequence[int]) -> None:
        """As in :class:`Packing`."""
        for k in operands:
            if sources[k] != self.addresses[k]:
                self.addresses[k], self.tables[k] = sources[k], torch.tensor(sources[k], device="cpu")
            self._copy(k, PACK)

    def unpack(self, sources: Sequence[list[int]]) -> None:
        """As in :class:`Packing`, to where it was packed from."""
        for k in (0, *range(2, len(sources))):
            self._copy(k, UNPACK)

    def _copy(self, k: int, task: int) -> None:
        buffer, size = self.buffers[k], self.buffers[k].element_size()
        self.launch(self.tables[k], self.places, buffer, len(self.places), size, PACKED_ROW * size, task)


class TablePacking:
    """Copies with one launch each way, by tables of addresses; the tables are renewed when an address has changed."""

    pads = False

    def __init__(self, packed_rows: Sequence[PackedRows], block: Block, launch: Callable[..., None]) -> None:
        """As for :class:`ForeachPacking`; ``launch`` calls the kernel of ``cuda_copying.py``."""
        self.packed_rows, self.block, self.device, self.launch = packed_rows, memory(block), block.p.device, launch
        rows = [(i, j, n) for i, packed in enumerate(packed_rows) for j, (_, _, n) in enumerate(packed.places())]
        self.source_index, self.offset = [i for i, _, _ in rows], [PACKED_ROW * j for _, j, _ in rows]
        self.length = torch.tensor([n for _, _, n in rows], dtype=torch.int32, device=self.device)
        self.addresses: list[list[int]] = [[] for _ in self.block]
        self.tables: list[Tensor] = [self.length for _ in self.block]
        self.kept: list[Tensor] = []

    def sources(self, tensors: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """A view for every tensor that has packed rows."""
        return [[packed.of(x[packed.tensor_index]) for packed in self.packed_rows] for x in tensors]

    def _note(self, k: int, sources: Sequence[Tensor]) -> None:
        """Bring the table of one operand up to date."""
        size = sources[0].element_size()
        first = [x.data_ptr() for x in sources]
        addresses = [first[i] + size * start for i, start in zip(self.source_index, self.offset, strict=True)]
        if addresses != self.addresses[k]:
            table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            table = table.pin_memory() if self.device.type == "cuda" else table
            self.addresses[k], self.tables[k] = addresses, table.to(self.device, non_blocking=True)
            self._keep(table)

    def _keep(self, *tables: Tensor) -> None:
        """Keep what a CUDA graph that is being captured will read at every replay."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept += tables

    def pack(self, sources: Sequence[list[Tensor]], operands: Sequence[int]) -> None:
        """As in :class:`Packing`, but that one launch copies all operands, when it is the gradients' turn."""
        if 1 not in operands:
            return
        for k, tensors in enumerate(sources):
            self._note(k, tensors)
        self._keep(*self.tables)
        self._launch(False)

    def unpack(self, sources: Sequence[list[Tensor]]) -> None:
        """As in :class:`Packing`."""
        self._launch(True)

    def _launch(self, unpack: bool) -> None:
        """Without remainders the codes stand for them, which nothing is done with."""
        same = [-1] * (5 - len(self.block))
        tables, block = ([*x, *(x[k] for k in same)] for x in (self.tables, self.block))
        self.launch(*tables, *block, self.length, not same, unpack)
