"""What ranks that share parameters can tell each other, in a step or outside it: rows of numbers, and errors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks.sharded import differing_steps, refused_elsewhere
from .layout import Layout, is_sharded, layout

MOST, MODULO = 0x7FFFFFFF, 0xFFFFFFFF


class Table:
    """Rows of numbers, one per tensor, that the ranks which share the tensors reduce: for every group one call."""

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        self.count = len(layouts)
        rows: dict[tuple[int, ...], list[int]] = {}
        groups: dict[tuple[int, ...], Any] = {}
        for row, place in enumerate(layouts):
            for group in place.groups:
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                groups.setdefault(ranks, group)
                rows.setdefault(ranks, []).append(row)
        self.groups = [
            (group, None if len(rows[ranks]) == self.count else torch.tensor(rows[ranks], device=device))
            for ranks, group in groups.items()
        ]

    def largest(self, table: Tensor) -> None:
        """The maximum of every number, in place; a row more than there are tensors goes to all groups."""
        self._reduce(table, torch.distributed.ReduceOp.MAX)

    def largest_anywhere(self, x: Tensor) -> None:
        """The maximum of a number over all ranks that share any tensor, in place."""
        for group, _ in self.groups:
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group)

    def sum(self, table: Tensor) -> None:
        """The sum of every number, in place."""
        self._reduce(table, torch.distributed.ReduceOp.SUM)

    def _reduce(self, table: Tensor, op: Any) -> None:
        for group, rows in self.groups:
            if rows is None:
                torch.distributed.all_reduce(table, op, group)
                continue
            extra = torch.arange(self.count, len(table), device=table.device)
            chosen = torch.cat([rows, extra])
            part = table[chosen]
            torch.distributed.all_reduce(part, op, group)
            table[chosen] = part


def whole_sums(params: Sequence[Tensor], sums: Sequence[Tensor], salts: Sequence[int]) -> None:
    """Make sums over shards, 0-d int64 one per parameter, those over whole parameters, in place; a collective.

    Raises:
        RuntimeError: the ranks do not ask for the same parameters.
    """
    layouts = [layout(p) for p in params]
    if not any(place.groups for place in layouts):
        return
    device = params[0].device
    table = Table(layouts, device)
    number = digest([(salt, tuple(p.shape)) for salt, p in zip(salts, params, strict=True)])
    for group, _ in table.groups:
        both = torch.tensor([number, -number], device=device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group)
        if both.tolist() != [number, -number]:
            raise differing_steps()
    values = torch.stack(list(sums))[:, None]
    table.sum(values)
    for x, value in zip(sums, values[:, 0], strict=True):
        x.copy_(value)


def digest(what: Any) -> int:
    """31 bits."""
    return int.from_bytes(hashlib.blake2s(repr(what).encode(), digest_size=4).digest(), "little") & MOST


def agree(error: Exception | None, elsewhere: Exception | None) -> None:
    """Raise this rank's error or, where another rank has one, what stands for it: all raise, or none does."""
    for found in (error, elsewhere):
        if found is not None:
            raise found


def refuse(error: Exception | None, params: Sequence[Tensor], where: str = "load_state_dict") -> None:
    """Raise on every rank that shares parameters with this one, or has replicas, if one of them has found an error.

    A collective for DTensor parameters; else it raises this rank's error, if there is one.
    """
    groups = {
        tuple(torch.distributed.get_process_group_ranks(group)): (group, p.device)
        for p in params
        if is_sharded(p)
        for group in p.device_mesh.get_all_groups()  # type: ignore[attr-defined]
    }
    failed = torch.tensor(int(error is not None))
    for group, device in groups.values():
        failed = failed.to(device)
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX, group)
    agree(error, refused_elsewhere(where) if failed else None)


def first_text(text: str | None) -> tuple[int, str] | None:
    """Of the texts of all processes the first, with the rank it is of; None where none has one. A collective."""
    texts = [text]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        texts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(texts, text)
    return next(((rank, found) for rank, found in enumerate(texts) if found is not None), None)
