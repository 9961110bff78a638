"""The scalar state of all tensors on a device, in three tables of which the state entries are views."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .hyper import MOMENT_DTYPES
from .remainder import CHECKSUM, REMAINDER, checksums, float32_weights, no_remainder
from .remainder import resized as resized_remainder
from .sharding.layout import like, local
from .step import cpu_copying, fp8, update
from .step.fp8 import E4M3, E5M2
from .step.update import State
from .wrapped import is_fake

MOMENTS = ("exp_avg_codes", "exp_avg_sq_codes")
TABLES: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: ("exp_avg_scale", "exp_avg_sq_scale", "exp_avg_max", "exp_avg_sq_max"),
    torch.int32: ("step", "salt"),
    torch.int64: ("weight_sum", "update_sum", "mask_count", "param_checksum"),
}
SCALARS = tuple(name for names in TABLES.values() for name in names)
ENTRIES = (*MOMENTS, *SCALARS)
MAXIMA = ("exp_avg_max", "exp_avg_sq_max")
# What version 0.1 did not have, and what follows from codes, weights and size: see complete.
DERIVED = (*MAXIMA, "weight_sum", "update_sum", "mask_count", "param_checksum")
COMPLETE = set(DERIVED)
# What versions before 0.2 called the entries, as torch's Adam calls its moments, which these are not.
OLD_NAMES = {
    "exp_avg": "exp_avg_codes",
    "exp_avg_sq": "exp_avg_sq_codes",
    "exp_avg_norm": "exp_avg_scale",
    "exp_avg_sq_norm": "exp_avg_sq_scale",
}
ALL_ENTRIES, WIDTH = itemgetter(*ENTRIES), len(ENTRIES)
CHUNK = 1 << 13  # elements that are read at once where something is derived, at least


class Store:
    """Tables with a row per tensor and a column per scalar; row 0 is padding.

    A state whose entries are not this store's views (after loading or unpickling, or when someone replaced one, or its
    memory) is read in again. 56 bytes per tensor. Nothing of the states is kept alive. So what is known of one is known
    by what cannot be taken for another's: its moments by weak references, its scalars by their places in the tables.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.columns: list[Tensor] = []
        self.rows: dict[int, int] = {}  # id of a state -> row: 1, 2, ...
        self.order: list[int] = []  # of all rows
        self.free: list[int] = []  # rows of states that are gone
        # What the states held when they were read, of each the moments and WIDTH addresses; and what the last step left
        # as the moments' versions, by which it is found out who else writes to them.
        self.moments: list[Callable[[], Any]] = []
        self.addresses: list[int] = []
        self.sizes: list[int] = []
        self.versions: list[int] = []

    def changed(self, states: Sequence[dict[str, Any]], homes: Sequence[int] | None = None) -> list[int]:
        """Which of these are new, or have an entry that was replaced or was given other memory: their places.

        With ``homes`` also those that are not in these rows.
        """
        rows = list(map(self.rows.get, map(id, states)))
        try:
            entries = list(chain.from_iterable(map(ALL_ENTRIES, states)))
            found = _moments(entries), *_memory(entries)
        except (AttributeError, KeyError, TypeError):  # an entry is missing, or no tensor
            if len(states) == 1:
                return [0]
            own = [None] * len(states) if homes is None else [[home] for home in homes]
            return [k for k, state in enumerate(states) if self.changed([state], own[k])]
        if None in rows:
            old = [k for k, row in enumerate(rows) if row is not None]
            again = self.changed([states[k] for k in old], None if homes is None else [homes[k] for k in old])
            return sorted({*range(len(rows))} - {*old} | {old[k] for k in again})
        everything = rows == self.order
        moments, *seen = [x if everything else _of(x, rows, n) for x, n in self._known()]
        there = [x() for x in moments]
        if (homes is None or rows == homes) and all(map(is_, found[0], there)) and list(found[1:]) == seen:
            return []
        pairs: list[tuple[Any, Any]] = [
            (list(map(is_, found[0], there)), [True] * len(there)),
            *zip(found[1:], seen, strict=True),
        ]
        widths = [n for _, n in self._known()]
        if homes is not None:
            pairs, widths = [*pairs, (rows, homes)], [*widths, 1]
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
        self, states: Sequence[dict[str, Any]], changed: Sequence[dict[str, Any]], live: Collection[dict[str, Any]]
    ) -> list[int]:
        """Make the scalars of those states that have changed views of the tables; returns the rows of all.

        ``live`` are all states there are.
        """
        self._forget_all_but(live)
        count = len(self.order)
        for state in changed:
            if id(state) not in self.rows:
                if not self.free:
                    self.order.append(len(self.order) + 1)
                    self.free.append(self.order[-1])
                self.rows[id(state)] = self.free.pop(0)
        if changed:
            for known, n in self._known():
                known += [_nothing if known is self.moments else -1] * (n * (len(self.order) - count))
            places = self._places(changed)
            if len(self.order) > count or not all(places):
                self._renew(count, live, changed)
                places = [False] * len(places)
            self._read(changed, places)
        return [self.rows[id(state)] for state in states]

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
            set(map(type, own)) == {Tensor} and addresses(own) == [self.addresses[place + k] for place in first]
            for k, own in values.items()
        ]

    def _renew(self, count: int, live: Collection[dict[str, Any]], changed: Sequence[dict[str, Any]]) -> None:
        """New tables, to which the scalars of the first ``count`` rows move; those of ``changed`` states are read then.

        Whoever has kept entries that were replaced, or states that were taken out, finds in them what was there.
        """
        columns: list[Tensor] = []
        for dtype, names in TABLES.items():
            columns += torch.zeros(len(self.order) + 1, len(names), dtype=dtype, device=self.device).unbind(1)
        for new, column in zip(columns, self.columns, strict=False):
            new[: len(column)] = column
        self.columns = columns
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

    def state(self, home: Tensor) -> State:
        """The tables for the step functions; ``home`` int64 says which rows."""
        return State._make([*self.columns, home])


# Hundreds of states are looked at in every step: the loops of these functions are those of ``map``.


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's parts; plain tensors need no detached copies."""
    return tensors if set(map(type, tensors)) <= {Tensor} else [x if type(x) is Tensor else local(x) for x in tensors]


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
    tensors = _plain(entries)
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


def init_state(
    param: Tensor, salt: int, float8: bool, moments: Sequence[Tensor] | None = None, exact: bool = False
) -> dict[str, Any]:
    """The state of a parameter before its first step; codes and moments are contiguous and spread as it is.

    ``moments`` are taken as they are in place of new zeros. The sum of the weights is that of this rank's part.
    """
    scales = (E4M3.smallest_scale(), E5M2.smallest_scale()) if float8 else (1.0, 1.0)
    dtypes = MOMENT_DTYPES["float8" if float8 else "float32"]
    device, shape = param.device, local(param).shape
    if moments is None:
        moments = [like(param, torch.zeros(shape, dtype=dtype, device=device)) for dtype in dtypes]
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.int32, device=device),
        "exp_avg_codes": moments[0],
        "exp_avg_scale": torch.tensor(scales[0], dtype=torch.float32, device=device),
        "exp_avg_sq_codes": moments[1],
        "exp_avg_sq_scale": torch.tensor(scales[1], dtype=torch.float32, device=device),
        "salt": torch.tensor(fp8.wrapped(salt), dtype=torch.int32, device=device),
        "exp_avg_max": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg_sq_max": torch.zeros((), dtype=torch.float32, device=device),
    }
    if exact:
        state[REMAINDER] = no_remainder(param)
    complete(param, state)
    return state


def renamed(state: Any) -> Any:
    """A state by today's names; one that another optimizer made is left as it is."""
    if not isinstance(state, dict) or "exp_avg_norm" not in state:
        return state
    return {OLD_NAMES.get(key, key): value for key, value in state.items()}


def complete(param: Tensor, state: dict[str, Any]) -> bool:
    """Add the entries that a state of version 0.1 has not; returns whether the sum of the weights was added."""
    numel, device = param.numel(), param.device
    if state.keys() >= COMPLETE:
        return False
    if not set(MAXIMA) <= set(state):
        find_largest(state)
    for name, value in (("update_sum", numel << 20), ("mask_count", numel), ("param_checksum", 0)):
        if name not in state:
            state[name] = torch.tensor(value, dtype=torch.int64, device=device)
    if "weight_sum" in state:
        return False
    state["weight_sum"] = weight_sum(local(param))
    return True


def resized(state: dict[str, Any], index: Tensor, old: Tensor, new: Tensor) -> dict[str, Any]:
    """The state of ``old`` for ``new``, whose rows come from the rows ``index``; those below 0 are new, with moments 0.

    Step, salt and scales stay; the largest codes and the weights' sum are found anew; the last update's sum and count
    become those of as many elements like the old ones on average.
    """
    rows, fresh = index.clamp(min=0), index < 0
    moments = []
    for name in MOMENTS:
        codes = state[name]
        raw = codes.view(torch.uint8) if codes.element_size() == 1 else codes
        if old.shape[0]:
            cut = raw.index_select(0, rows)
            cut[fresh] = 0
        else:
            cut = raw.new_zeros(new.shape)
        moments.append(cut.view(codes.dtype))
    float8 = moments[0].dtype != torch.float32
    found = init_state(new, int(state["salt"]) & 0xFFFFFFFF, float8, moments)
    for name in ("step", "exp_avg_scale", "exp_avg_sq_scale"):
        found[name].fill_(float(state[name]) if name != "step" else int(state[name]))
    if old.numel():
        for name in ("update_sum", "mask_count"):
            found[name].fill_(int(state[name]) * new.numel() // old.numel())
    find_largest(found)
    if REMAINDER in state:
        found[REMAINDER] = resized_remainder(state, index, old, new)
        found[CHECKSUM].fill_(checksums([new])[0])
        found["weight_sum"].copy_(weight_sum(float32_weights({"": (new, found)})[""]))
    return found


def find_largest(*states: dict[str, Any], store: Store | None = None) -> None:
    """Set the maxima to those of the codes (or float32 moments) that the states hold, of this rank's part.

    What lies in the tables of ``store`` stays there, so that they need not be made anew.
    """
    for name, maximum, fmt in zip(MOMENTS, MAXIMA, (E4M3, E5M2), strict=True):
        for plain in {state[name].dtype == torch.float32 for state in states}:
            own = [state for state in states if (state[name].dtype == torch.float32) == plain]
            moments = _plain([state[name] for state in own])
            tops = torch.stack(list(map(_largest, moments))) if plain else _largest_codes(moments, fmt)
            if store is None or not store.put(maximum, own, tops):
                for state, top in zip(own, tops.unbind(0), strict=True):
                    state[maximum] = top


def _largest(moment: Tensor) -> Tensor:
    if not moment.numel():
        return torch.zeros((), dtype=torch.float32, device=moment.device)
    least, most = torch.aminmax(moment)
    return torch.maximum(least.abs(), most.abs())


def _largest_codes(codes: list[Tensor], fmt: fp8.Format) -> Tensor:
    """The largest magnitudes, float32. As unsigned bytes negative codes are above the others, as signed ones below."""
    top = cpu_copying.largest(codes)
    if top is None:
        found = []
        for dtype in (torch.uint8, torch.int8):
            nothing = torch.zeros((), dtype=dtype, device=codes[0].device)
            found.append(torch.stack([x.view(dtype).max() if x.numel() else nothing.to(x.device) for x in codes]))
        top = torch.maximum(found[0] & 0x7F, found[1].clamp(min=0).view(torch.uint8))
    return fp8.decode(top, fmt)


def weight_sum(weights: Tensor) -> Tensor:
    """Σ clamp(p², 0.01, 1) in units of 2^-20, 0-d int64."""
    total = torch.zeros((), dtype=torch.int64, device=weights.device)
    for part in _parts(weights.detach().reshape(-1)):
        part = part.float()
        counted = update.units(part * part, update.WEIGHT_FLOOR_BITS) - update.EIGHT_BITS
        total += counted.sum(dtype=torch.int64)
    return total


def _parts(flat: Tensor) -> tuple[Tensor, ...]:
    """A flat tensor in at most 2,048 parts, so that what is made of one is small beside it."""
    return torch.split(flat, max(CHUNK, flat.numel() >> 11))
