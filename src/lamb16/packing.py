"""Copying what is packed of many tensors into one buffer and back.

On the CPU a ``torch._foreach_copy_`` for each of weights, gradients and codes. On CUDA that would be a launch for every
64 tensors of each; there one kernel copies all of them by a table of addresses (compiled steps only).
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

    def of(self, flat: Tensor) -> Tensor:
        """Its elements in the flat tensor."""
        return flat[self.start : self.start + self.length]

    def pieces(self) -> list[tuple[int, int, int]]:
        """(tensor, first element, length) of each of its rows."""
        starts = range(self.start, self.start + self.length, PIECE)
        return [(self.tensor, start, min(PIECE, self.start + self.length - start)) for start in starts]


class ForeachPacking:
    """Copies with a ``torch._foreach_copy_`` for each of p, g and codes."""

    def __init__(self, tails: Sequence[Tail], block: Block, codes: Sequence[Sequence[Tensor]]) -> None:
        """``block`` has the packed p, g and codes, [rows, PIECE]; ``codes`` are the flat codes of all tensors."""
        self.tails = tails
        flat = [x.view(-1) for x in block[:4]]
        self.rows = [[x[t.row * PIECE : t.row * PIECE + t.length] for t in tails] for x in flat]
        self.codes = [[t.of(codes[t.tensor][k]) for t in tails] for k in (0, 1)]
        self.weights: list[Tensor] = []

    def pack(self, flat_p: list[Tensor], flat_g: list[Tensor]) -> None:
        """Copy into the buffer; takes all tensors' flat weights and gradients."""
        self.weights = [t.of(flat_p[t.tensor]) for t in self.tails]
        gradients = [t.of(flat_g[t.tensor]) for t in self.tails]
        for rows, sources in zip(self.rows, (self.weights, gradients, *self.codes), strict=True):
            torch._foreach_copy_(rows, sources)

    def unpack(self) -> None:
        """Copy weights and codes back to where the last :meth:`pack` took them from."""
        p, _, m, v = self.rows
        for targets, rows in ((self.weights, p), (self.codes[0], m), (self.codes[1], v)):
            torch._foreach_copy_(targets, rows)
        self.weights = []


class TablePacking:
    """Copies with one launch each way, by tables of addresses; the tables are renewed when an address has changed."""

    def __init__(
        self,
        tails: Sequence[Tail],
        block: Block,
        codes: Sequence[Sequence[Tensor]],
        launch: Callable[..., None],
    ) -> None:
        """As for :class:`ForeachPacking`; ``launch`` calls the kernel of ``cuda/copying.py``."""
        self.tails, self.block, self.device, self.launch = tails, block[:4], block.p.device, launch
        pieces = [piece for tail in tails for piece in tail.pieces()]
        self.owner, self.start = [i for i, _, _ in pieces], [start for _, start, _ in pieces]
        self.length = torch.tensor([n for _, _, n in pieces], dtype=torch.int32, device=self.device)
        self.addresses: list[list[int]] = [[], [], [], []]
        self.tables: list[Tensor] = [self.length] * 4
        self.kept: list[Tensor] = []
        self._note(2, [m for m, _ in codes])
        self._note(3, [v for _, v in codes])

    def _note(self, k: int, flat: Sequence[Tensor]) -> None:
        """Bring the table of one kind of tensors up to date."""
        size = flat[0].element_size()
        first = [x.data_ptr() for x in flat]
        addresses = [first[i] + size * start for i, start in zip(self.owner, self.start, strict=True)]
        if addresses != self.addresses[k]:
            table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            table = table.pin_memory() if self.device.type == "cuda" else table
            self.addresses[k], self.tables[k] = addresses, table.to(self.device, non_blocking=True)
            self._keep(table)

    def _keep(self, *tables: Tensor) -> None:
        """Keep what a CUDA graph that is being captured will read at every replay."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept += tables

    def pack(self, flat_p: list[Tensor], flat_g: list[Tensor]) -> None:
        """As in :class:`ForeachPacking`."""
        self._note(0, flat_p)
        self._note(1, flat_g)
        self._keep(*self.tables)
        self.launch(*self.tables, *self.block, self.length, False)

    def unpack(self) -> None:
        """As in :class:`ForeachPacking`."""
        self.launch(*self.tables, *self.block, self.length, True)
