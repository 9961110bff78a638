"""The scalar state of all tensors on a device, in three tables of which the state entries are views."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .entries import ALL_ENTRIES, SCALARS, TABLES, WIDTH, local_tensors
from .moments import MOMENTS
from .signals import Held
from .step import native
from .step.blocks import State
from .wrapped import is_fake


class Store:
    """Tables with a row per tensor and a column per scalar; row 0 is padding.

    A state whose entries are not this store's views (after loading or unpickling, or when someone replaced one, or its
    memory) is read in again. 56 bytes per tensor. Nothing of the states is kept alive. So what is known of one is known
    by what cannot be taken for another's: its moments by weak references, its scalars by their places in the tables.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tables: list[Tensor] = []
        self.columns: list[Tensor] = []  # of them
        self.room = 0
        self.rows: dict[int, int] = {}  # id of a state -> row: 1, 2, ...
        self.order: list[int] = []  # of all rows
        self.free: list[int] = []  # rows of states that are gone
        # What the states held when they were read, of each the moments and WIDTH addresses; and what the last step left
        # as the moments' versions, by which it is found out who else writes to them.
        self.moments: list[Callable[[], Any]] = []
        self.addresses: list[int] = []
        self.sizes: list[int] = []
        self.versions: list[int] = []
        self.table: Tensor | None = None  # the addresses once more, int64 [rows, WIDTH]

    def same(self, states: Sequence[dict[str, Any]], rows: list[int], index: Tensor) -> bool:
        """Whether nothing of the states in these rows has been replaced, given other memory or written to.

        ``index`` int64 has the rows counted from 0.
        """
        try:
            entries = list(chain.from_iterable(map(ALL_ENTRIES, states)))
        except (KeyError, TypeError):
            return False
        everything, found = rows == self.order, _moments(entries)
        two = len(MOMENTS)
        refs = self.moments if everything else _of(self.moments, rows, two)
        if not all(map(is_, found, [x() for x in refs])):
            return False
        if self.table is None:
            self.table = torch.tensor(self.addresses)
        try:
            tensors = local_tensors(entries)
        except (AttributeError, TypeError):  # one is no tensor
            return False
        if native.look(tensors, self.table, None if everything else index, WIDTH, False):
            return False
        moments = found if tensors is entries else _moments(tensors)
        sizes, versions = (x if everything else _of(x, rows, two) for x in (self.sizes, self.versions))
        return list(map(Tensor.numel, moments)) == sizes and _versions(moments) == versions

    def changed(self, states: Sequence[dict[str, Any]], state_indices: Sequence[int] | None = None) -> list[int]:
        """Which of these are new, or have an entry that was replaced or was given other memory: their places.

        With ``state_indices`` also those that are not in these rows.
        """
        rows = list(map(self.rows.get, map(id, states)))
        try:
            entries = list(chain.from_iterable(map(ALL_ENTRIES, states)))
            found = _moments(entries), *_memory(entries)
        except (AttributeError, KeyError, TypeError):  # an entry is missing, or no tensor
            if len(states) == 1:
                return [0]
            own = [None] * len(states) if state_indices is None else [[state_index] for state_index in state_indices]
            return [k for k, state in enumerate(states) if self.changed([state], own[k])]
        if None in rows:
            old = [k for k, row in enumerate(rows) if row is not None]
            again = self.changed(
                [states[k] for k in old], None if state_indices is None else [state_indices[k] for k in old]
            )
            return sorted({*range(len(rows))} - {*old} | {old[k] for k in again})
        everything = rows == self.order
        moments, *seen = [x if everything else _of(x, rows, n) for x, n in self._known()]
        there = [x() for x in moments]
        if (
            (state_indices is None or rows == state_indices)
            and all(map(is_, found[0], there))
            and list(found[1:]) == seen
        ):
            return []
        pairs: list[tuple[Any, Any]] = [
            (list(map(is_, found[0], there)), [True] * len(there)),
            *zip(found[1:], seen, strict=True),
        ]
        widths = [n for _, n in self._known()]
        if state_indices is not None:
            pairs, widths = [*pairs, (rows, state_indices)], [*widths, 1]
        changed: set[int] = set()
        for (now, before), n in zip(pairs, widths, strict=True):
            parts = zip(*[iter(now)] * n, strict=True), zip(*[iter(before)] * n, strict=True)
            changed.update(k for k, (a, b) in enumerate(zip(*parts, strict=True)) if a != b)
        return sorted(changed)

    def _known(self) -> list[tuple[list[Any], int]]:
        """What is known of all rows, and how many numbers of each."""
        two = len(MOMENTS)
        return [(self.moments, two), (self.addresses, WIDTH), (self.sizes, two), (self.versions, two)]

    def holds(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether nothing of these states has been replaced, nor given other memory."""
        return not self.changed(states)

    def adopt(
        self,
        states: Sequence[dict[str, Any]],
        changed: Sequence[dict[str, Any]],
        live: Collection[dict[str, Any]],
        room: int,
    ) -> list[int]:
        """Make the scalars of those states that have changed views of the tables; returns the rows of all.

        ``live`` are all states there are; new tables have room for as many as ``room``.
        """
        self.room = max(self.room, room)
        self._forget_all_but(live)
        count, self.table = len(self.order), None
        for state in changed:
            if id(state) not in self.rows:
                if not self.free:
                    self.order.append(len(self.order) + 1)
                    self.free.append(self.order[-1])
                self.rows[id(state)] = self.free.pop(0)
        if changed:
            with Held():
                for known, n in self._known():
                    known += [_nothing if known is self.moments else -1] * (n * (len(self.order) - count))
                used = [state for state in changed if self.rows[id(state)] <= count]
                places = self._places(changed)
                if len(self.order) >= self._length() or not all(self._places(used)):
                    self._renew(count, live, changed)
                    places = [False] * len(places)
                self._read(changed, places)
        return [self.rows[id(state)] for state in states]

    def _length(self) -> int:
        return len(self.columns[0]) if self.columns else 0

    def _forget_all_but(self, live: Collection[dict[str, Any]]) -> None:
        """Free the rows of states that are gone. An id may be another's by now, whose entries are then new."""
        there = set(map(id, live))
        for gone in [key for key in self.rows if key not in there]:
            row = self.rows.pop(gone)
            self.free.append(row)
            self.addresses[(row - 1) * WIDTH : row * WIDTH] = [-1] * WIDTH
            self.moments[(row - 1) * len(MOMENTS) : row * len(MOMENTS)] = [_nothing] * len(MOMENTS)

    def _places(self, states: Sequence[dict[str, Any]], names: Sequence[str] = SCALARS) -> list[bool]:
        """Of these scalars, whether all these states have them where they are known to be."""
        first = [self.rows[id(state)] * WIDTH - len(SCALARS) for state in states]
        values = {SCALARS.index(name): list(map(itemgetter(name), states)) for name in names}
        return [
            set(map(type, own)) <= {Tensor} and addresses(own) == [self.addresses[place + k] for place in first]
            for k, own in values.items()
        ]

    def _renew(self, count: int, live: Collection[dict[str, Any]], changed: Sequence[dict[str, Any]]) -> None:
        """New tables, to which the scalars of the first ``count`` rows move; those of ``changed`` states are read then.

        Whoever has kept entries that were replaced, or states that were taken out, finds in them what was there.
        """
        length = max(len(self.order), self.room) + 1
        tables = [torch.zeros(length, len(names), dtype=x, device=self.device) for x, names in TABLES.items()]
        columns = [column for table in tables for column in table.unbind(1)]
        for new, column in zip(columns, self.columns, strict=False):
            new[: len(column)] = column
        self.tables, self.columns = tables, columns
        scalars = len(SCALARS)
        for state in changed:
            place = self.rows[id(state)] * WIDTH
            self.addresses[place - scalars : place] = [-1] * scalars
        read = set(map(id, changed))
        kept = [state for state in live if 0 < self.rows.get(id(state), 0) <= count and id(state) not in read]
        rows = [self.rows[id(state)] for state in kept]
        for k, (name, column) in enumerate(zip(SCALARS, self.columns, strict=True) if kept else ()):
            views, places = column.unbind(0), [row * WIDTH - scalars + k for row in rows]
            values: list[Any] = [state.get(name) for state in kept]
            own, alike = [views[row] for row in rows], type(views[0])
            if set(map(type, values)) == {alike}:
                seen: list[int | None] = [*addresses(values)]
            else:
                seen = [addresses([x])[0] if type(x) is alike else None for x in values]
            for state, view, there, place, now in zip(kept, own, seen, places, addresses(own), strict=True):
                if there == self.addresses[place]:
                    state[name] = view
                self.addresses[place] = now

    def _read(self, states: Sequence[dict[str, Any]], places: Sequence[bool]) -> None:
        """Put what these states hold into the tables, unless it is in place, and views of them into the states."""
        rows = [self.rows[id(state)] for state in states]
        for name, column, in_place in zip(SCALARS, self.columns, places, strict=True):
            if in_place:
                continue
            values = [state[name] for state in states]
            column[torch.tensor(rows, device=self.device)] = self._stacked(values, column.dtype)
            views = column.unbind(0)
            for state, row in zip(states, rows, strict=True):
                state[name] = views[row]
        entries = list(chain.from_iterable(map(ALL_ENTRIES, states)))
        found: list[list[Any]] = [list(map(ref, _moments(entries))), *_memory(entries)]
        for (known, n), read in zip(self._known(), found, strict=True):
            if rows == self.order:
                known[:] = read
                continue
            for k, row in enumerate(rows):
                known[(row - 1) * n : row * n] = read[k * n : (k + 1) * n]

    def put(self, name: str, states: Sequence[dict[str, Any]], values: Tensor) -> bool:
        """Set a scalar of these states to ``values``, if they have it in the tables; returns whether they have."""
        rows = list(map(self.rows.get, map(id, states)))
        if None in rows or not all(name in state for state in states) or not self._places(states, [name])[0]:
            return False
        self.columns[SCALARS.index(name)][torch.tensor(rows, device=self.device)] = values
        return True

    def _stacked(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        try:
            stacked = torch.stack(values)
            if (stacked.dtype, stacked.device, stacked.dim()) == (dtype, self.device, 1):
                return stacked
        except (TypeError, RuntimeError):
            pass
        return torch.stack([torch.as_tensor(x, dtype=dtype, device=self.device).view(()) for x in values])

    def stepped(self, rows: Sequence[int], moments: Sequence[Sequence[Tensor]]) -> None:
        """Note that these moments, the first and the second ones of these rows, have been written to by a step."""
        width = len(MOMENTS)
        found = _versions(list(chain.from_iterable(zip(*moments, strict=True))))
        if rows == self.order:
            self.versions = found
            return
        for k, row in enumerate(rows):
            self.versions[(row - 1) * width : row * width] = found[k * width : (k + 1) * width]

    def state(self, state_index: Tensor) -> State:
        """The tables for the step functions, and the rows ``state_index``, int64."""
        return State._make([*self.columns, state_index])


# Hundreds of states are looked at in every step: the loops of these functions are those of ``map``.


def _nothing() -> None:
    """In place of a reference."""


def _of(known: list[Any], rows: Sequence[int | None], n: int) -> list[Any]:
    """What is known of some rows."""
    return [x for row in rows if row for x in known[(row - 1) * n : row * n]]


def _moments(entries: list[Tensor]) -> list[Tensor]:
    """The moments among the states' entries, a first and a second one for each state."""
    return list(chain.from_iterable(zip(*(entries[k::WIDTH] for k in range(len(MOMENTS))), strict=True)))


def _memory(entries: list[Tensor]) -> tuple[list[int], list[int], list[int]]:
    """The addresses of the states' entries, and the moments' sizes and versions."""
    tensors = local_tensors(entries)
    moments = _moments(tensors)
    return addresses(tensors), list(map(Tensor.numel, moments)), _versions(moments)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where plain tensors begin; 0 for fake ones."""
    if tensors and is_fake(tensors[0]):
        return [0] * len(tensors)
    return list(map(Tensor.data_ptr, tensors))


def _versions(moments: list[Tensor]) -> list[int]:
    try:
        return list(map(attrgetter("_version"), moments))
    except RuntimeError:  # inference tensors have none
        return [0 if x.is_inference() else x._version for x in moments]
