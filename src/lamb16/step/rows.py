"""How parameters are cut into the rows of blocks, and how results of rows are reduced to one number per tensor.

A parameter of n elements is seen as a flat array. Its first n // 1024 rows of 1024 elements are a *large* block, if
there are at least two rows; what is left is copied into a packed block and back after the step. There it takes as many
packed rows of 256 elements as it needs. So a handful of compiled graphs serve every model, and hundreds of tiny tensors
cost one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import PACKED_ROW, ROW, Stages
from .kinds import Kind

SMALL = 2 * ROW  # elements from which on a tensor has full rows
CHUNK = 256  # rows that are reduced together on the way from rows to tensors


class PackedRows(NamedTuple):
    """What is packed of a tensor: its elements from ``start`` on, in the packed rows from ``row`` on."""

    tensor_index: int
    start: int
    length: int
    row: int

    @property
    def rows(self) -> int:
        """How many there are."""
        return -(-self.length // PACKED_ROW)

    def places(self) -> list[tuple[int, int, int]]:
        """(tensor index, first element, length) of each row."""
        starts = range(self.start, self.start + self.length, PACKED_ROW)
        return [(self.tensor_index, start, min(PACKED_ROW, self.start + self.length - start)) for start in starts]


def cut(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[PackedRows]]:
    """Large blocks as (tensor index, rows), and what is packed, of tensors with these numbers of elements."""
    large, packed_rows, row = [], [], 0
    for i, n in enumerate(sizes):
        rows = n // ROW if n >= SMALL else 0
        if rows:
            large.append((i, rows))
        if n > rows * ROW:
            packed_rows.append(PackedRows(i, rows * ROW, n - rows * ROW, row))
            row += packed_rows[-1].rows
    return large, packed_rows


class Rows:
    """The rows of a plan's blocks: those of large tensors, of padding of a group of them, then the packed ones."""

    def __init__(self, kind: Kind, sizes: Sequence[int]) -> None:
        device = kind.device
        self.large, self.packed_rows = cut(sizes)
        self.padding = kind.reading_group - 1 if self.large else 0  # at most; any of the tensors may be left out
        heights = [rows for _, rows in self.large] + [2] * self.padding
        packed_count = sum(packed.rows for packed in self.packed_rows)
        packed_count = max(packed_count, 2) if packed_count else 0  # graphs are compiled for two or more of everything
        heights += [packed_count] * bool(packed_count)
        self.slices = [slice(end - n, end) for end, n in zip(_cumulated(heights), heights, strict=True)]
        self.count, self.packed_count = max(sum(heights), 2), packed_count

        # Chunks of neighbouring rows, those of a tensor one after the other.
        ranges: list[list[tuple[int, int]]] = [[] for _ in sizes]
        for (i, n), rows in zip(self.large, self.slices, strict=False):
            ranges[i].append((rows.start, n))
        for packed in self.packed_rows:
            ranges[packed.tensor_index].append((self.slices[-1].start + packed.row, packed.rows))
        chunks = [[(a + k, min(CHUNK, n - k)) for a, n in own for k in range(0, n, CHUNK)] for own in ranges]
        counts = [len(own) for own in chunks]
        flat = [chunk for own in chunks for chunk in own]
        first = [end - n if n else 0 for end, n in zip(_cumulated(counts), counts, strict=True)]
        self.stages = _stages(flat, list(zip(first, counts, strict=True)), device)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of every packed row its tensor index [rows] int64, first element and length, [rows, 1] int32."""
        places = [place for packed in self.packed_rows for place in packed.places()]
        table = torch.tensor(places + [(0, 0, 0)] * (self.packed_count - len(places)), device=device).view(-1, 3)
        return table[:, 0].contiguous(), table[:, 1:2].int().contiguous(), table[:, 2:].int().contiguous()


def _cumulated(numbers: Sequence[int]) -> list[int]:
    total, found = 0, []
    for n in numbers:
        total += n
        found.append(total)
    return found


def _stages(chunks: list[tuple[int, int]], tensors: list[tuple[int, int]], device: torch.device) -> Stages:
    """From (first, count) of rows and of chunks; two or more of everything."""
    columns: list[Tensor] = []
    for pairs in (chunks, tensors):
        padded = pairs + [(0, 0)] * (2 - len(pairs))
        table = torch.tensor(padded, device=device)
        width = max(2, *(n for _, n in padded))
        columns += [table[:, :1].contiguous(), table[:, 1:].contiguous(), torch.arange(width, device=device)]
    return Stages(*columns)
