"""Copying what is packed of many tensors into one buffer and back.

On the CPU a ``torch._foreach_copy_`` for each of weights, gradients and codes. On CUDA that would be a launch for every
64 tensors of each; there one kernel copies all of them by a table of addresses (compiled steps only). *Parts* are what
is packed of p, g, the two moments and, if there are, the remainders of the weights: lists with a tensor per tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .update import PIECE, Block


class Tail(NamedTuple):
    """What is packed of a tensor: its elements from ``start`` on, in the packed rows from ``row`` on."""

    tensor: int
    start: int
    length: int
    row: int

    @property
    def rows(self) -> int:
        return -(-self.length // PIECE)

    def of(self, tensor: Tensor) -> Tensor:
        """Its elements in the contiguous tensor; the tensor itself where these are all."""
        return tensor if self.start == 0 else tensor.view(-1)[self.start : self.start + self.length]

    def pieces(self) -> list[tuple[int, int, int]]:
        """(tensor, first element, length) of each of its rows."""
        starts = range(self.start, self.start + self.length, PIECE)
        return [(self.tensor, start, min(PIECE, self.start + self.length - start)) for start in starts]


def memory(block: Block) -> list[Tensor]:
    """The buffers of a block of packed rows, in the order of the parts."""
    found = block.p, block.g, block.m, block.v, block.remainder
    return [x for x in found if x is not None]


class ForeachPacking:
    """Copies with a ``torch._foreach_copy_`` for each of p, g, codes and remainders."""

    def __init__(
        self, tails: Sequence[Tail], block: Block, shapes: Sequence[Sequence[int]], moments: Sequence[torch.dtype]
    ) -> None:
        """``block`` has the packed p, g and codes, [rows, PIECE]; shapes are those of the tails' parts.

        The dtypes are those of the states' moments.
        """
        first = tails[0].row
        p, g, m, v, *remainder = memory(block)
        flat = [x.view(-1) for x in (p, g, m.view(moments[0]), v.view(moments[1]), *remainder)]
        places = [slice((t.row - first) * PIECE, (t.row - first) * PIECE + t.length) for t in tails]
        self.rows = [[x[place].view(shape) for place, shape in zip(places, shapes, strict=True)] for x in flat]

    def pack(self, parts: Sequence[list[Tensor]], kinds: Sequence[int]) -> None:
        """Copy these kinds of parts into the buffer: 0 for p, 1 for g, 2 and 3 for the moments, 4 for remainders."""
        for k in kinds:
            torch._foreach_copy_(self.rows[k], parts[k])

    def unpack(self, parts: Sequence[list[Tensor]]) -> None:
        """Copy all but the gradients back."""
        for k in (0, *range(2, len(parts))):
            torch._foreach_copy_(parts[k], self.rows[k])


class TablePacking:
    """Copies with one launch each way, by tables of addresses; the tables are renewed when an address has changed."""

    def __init__(self, tails: Sequence[Tail], block: Block, launch: Callable[..., None]) -> None:
        """As for :class:`ForeachPacking`; ``launch`` calls the kernel of ``cuda/copying.py``."""
        self.block, self.device, self.launch = memory(block), block.p.device, launch
        pieces = [(i, j, n) for i, tail in enumerate(tails) for j, (_, _, n) in enumerate(tail.pieces())]
        self.owner, self.step = [i for i, _, _ in pieces], [PIECE * j for _, j, _ in pieces]
        self.length = torch.tensor([n for _, _, n in pieces], dtype=torch.int32, device=self.device)
        self.addresses: list[list[int]] = [[] for _ in self.block]
        self.tables: list[Tensor] = [self.length for _ in self.block]
        self.kept: list[Tensor] = []

    def _note(self, k: int, parts: Sequence[Tensor]) -> None:
        """Bring the table of one kind of tensors up to date."""
        size = parts[0].element_size()
        first = [x.data_ptr() for x in parts]
        addresses = [first[i] + size * start for i, start in zip(self.owner, self.step, strict=True)]
        if addresses != self.addresses[k]:
            table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            table = table.pin_memory() if self.device.type == "cuda" else table
            self.addresses[k], self.tables[k] = addresses, table.to(self.device, non_blocking=True)
            self._keep(table)

    def _keep(self, *tables: Tensor) -> None:
        """Keep what a CUDA graph that is being captured will read at every replay."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept += tables

    def pack(self, parts: Sequence[list[Tensor]], kinds: Sequence[int]) -> None:
        """As in :class:`ForeachPacking`, but that one launch copies all kinds, when it is the gradients' turn."""
        if 1 not in kinds:
            return
        for k, tensors in enumerate(parts):
            self._note(k, tensors)
        self._keep(*self.tables)
        self._launch(False)

    def unpack(self, parts: Sequence[list[Tensor]]) -> None:
        """As in :class:`ForeachPacking`."""
        self._launch(True)

    def _launch(self, unpack: bool) -> None:
        """Without remainders the codes stand for them, which nothing is done with."""
        same = [-1] * (5 - len(self.block))
        tables, block = ([*x, *(x[k] for k in same)] for x in (self.tables, self.block))
        self.launch(*tables, *block, self.length, not same, unpack)
