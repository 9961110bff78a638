"""The scalar state of all tensors on a device, in three tables of which the state entries are views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import fp8, update
from .fp8 import E4M3, E5M2
from .hyper import MOMENT_DTYPES
from .sharding import like, local
from .update import State

MOMENTS = ("exp_avg_codes", "exp_avg_sq_codes")
TABLES: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: ("exp_avg_scale", "exp_avg_sq_scale", "exp_avg_max", "exp_avg_sq_max"),
    torch.int32: ("step", "salt"),
    torch.int64: ("weight_sum", "update_sum", "mask_count"),
}
SCALARS = tuple(name for names in TABLES.values() for name in names)
ENTRIES = (*MOMENTS, *SCALARS)
MAXIMA = ("exp_avg_max", "exp_avg_sq_max")
# What version 0.1 did not have, and what follows from codes, weights and size: see complete.
DERIVED = (*MAXIMA, "weight_sum", "update_sum", "mask_count")
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
    memory) is read in again. 48 bytes per tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.columns: list[Tensor] = []
        self.states: list[dict[str, Any]] = []  # of rows 1, 2, ...
        # What the states held when they were read, WIDTH entries of each; where that was in memory; and what the last
        # step left as the moments' versions, by which it is found out who else writes to them.
        self.entries: list[Tensor] = []
        self.addresses: list[int] = []
        self.sizes: list[int] = []
        self.versions: list[int] = []
        self.rows: dict[int, int] = {}  # id of a state (which is kept alive) -> row

    def holds(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether nothing of these states has been replaced, nor given other memory."""
        rows = list(map(self.rows.get, map(id, states)))
        if None in rows:
            return False
        try:
            entries = list(chain.from_iterable(map(ALL_ENTRIES, states)))
        except KeyError:
            return False
        everything = rows == list(self.rows.values())

        def seen(what: list[Any], width: int = len(MOMENTS)) -> list[Any]:
            if everything:
                return what
            return [x for row in rows if row for x in what[(row - 1) * width : row * width]]

        if not all(map(is_, entries, seen(self.entries, WIDTH))):
            return False
        return _memory(entries) == (seen(self.addresses, WIDTH), seen(self.sizes), seen(self.versions))

    def adopt(self, states: Sequence[dict[str, Any]]) -> list[int]:
        """Make every state's scalars views of the tables; returns their rows."""
        if not self.holds(states):
            for state in states:
                if id(state) not in self.rows:
                    self.states.append(state)
                    self.rows[id(state)] = len(self.states)
            self._read()
        return [self.rows[id(state)] for state in states]

    def _read(self) -> None:
        self.columns, views = [], []
        for dtype, names in TABLES.items():
            table = torch.zeros(len(self.states) + 1, len(names), dtype=dtype, device=self.device)
            for k, name in enumerate(names):
                values = [torch.as_tensor(s[name], dtype=dtype, device=self.device).view(()) for s in self.states]
                torch.stack(values, out=table[1:, k])
            self.columns += table.unbind(1)
            views += [column[1:].unbind(0) for column in table.unbind(1)]
        for state, scalars in zip(self.states, zip(*views, strict=True), strict=True):
            state.update(zip(SCALARS, scalars, strict=True))
        self.entries = list(chain.from_iterable(map(ALL_ENTRIES, self.states)))
        self.addresses, self.sizes, self.versions = _memory(self.entries)

    def stepped(self, rows: Sequence[int]) -> None:
        """Note that the moments of these rows have been written to by a step."""
        width = len(MOMENTS)
        found = _versions(
            _plain([x for row in rows for x in self.entries[(row - 1) * WIDTH : (row - 1) * WIDTH + width]])
        )
        for k, row in enumerate(rows):
            self.versions[(row - 1) * width : row * width] = found[k * width : (k + 1) * width]

    def state(self, home: Tensor) -> State:
        """The tables for the step functions; ``home`` int64 says which rows."""
        return State._make([*self.columns, home])


# Hundreds of states are looked at in every step: the loops of these functions are those of ``map``.


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's parts; plain tensors need no detached copies."""
    return tensors if set(map(type, tensors)) <= {Tensor} else [x if type(x) is Tensor else local(x) for x in tensors]


def _memory(entries: list[Tensor]) -> tuple[list[int], list[int], list[int]]:
    """The addresses of the states' entries, and the moments' sizes and versions."""
    tensors = _plain(entries)
    moments = list(chain.from_iterable(zip(*(tensors[k::WIDTH] for k in range(len(MOMENTS))), strict=True)))
    return addresses(tensors), list(map(Tensor.numel, moments)), _versions(moments)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where tensors are in memory; 0 for fake ones, which are nowhere."""
    if FakeTensor in set(map(type, tensors)):
        return [0 if isinstance(x, FakeTensor) else x.data_ptr() for x in tensors]
    return list(map(Tensor.data_ptr, tensors))


def _versions(moments: list[Tensor]) -> list[int]:
    try:
        return list(map(attrgetter("_version"), moments))
    except RuntimeError:  # inference tensors have none
        return [0 if x.is_inference() else x._version for x in moments]


def init_state(param: Tensor, salt: int, float8: bool) -> dict[str, Any]:
    """The state of a parameter before its first step; codes and moments are contiguous and spread as it is.

    The sum of the weights is that of this rank's part.
    """
    scales = (E4M3.smallest_scale(), E5M2.smallest_scale()) if float8 else (1.0, 1.0)
    dtypes = MOMENT_DTYPES["float8" if float8 else "float32"]
    device, shape = param.device, local(param).shape
    moments = [like(param, torch.zeros(shape, dtype=dtype, device=device)) for dtype in dtypes]
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.int32, device=device),
        "exp_avg_codes": moments[0],
        "exp_avg_scale": torch.tensor(scales[0], dtype=torch.float32, device=device),
        "exp_avg_sq_codes": moments[1],
        "exp_avg_sq_scale": torch.tensor(scales[1], dtype=torch.float32, device=device),
        "salt": torch.tensor(fp8.wrapped(salt), dtype=torch.int32, device=device),
        "exp_avg_max": torch.zeros((), device=device),
        "exp_avg_sq_max": torch.zeros((), device=device),
    }
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
    if not set(MAXIMA) <= set(state):
        find_largest(state)
    for name, value in (("update_sum", numel << 20), ("mask_count", numel)):
        if name not in state:
            state[name] = torch.tensor(value, dtype=torch.int64, device=device)
    if "weight_sum" in state:
        return False
    state["weight_sum"] = weight_sum(local(param))
    return True


def find_largest(state: dict[str, Any]) -> None:
    """Set the maxima to those of the codes (or float32 moments) that the state holds, of this rank's part."""
    for name, maximum, fmt in zip(MOMENTS, MAXIMA, (E4M3, E5M2), strict=True):
        moment = local(state[name]).reshape(-1)
        largest = torch.zeros((), device=moment.device)
        for part in _parts(moment):
            if part.numel():
                top = part.abs().max() if part.dtype == torch.float32 else (part.view(torch.uint8) & 0x7F).max()
                largest = torch.maximum(largest, top if part.dtype == torch.float32 else fp8.decode(top, fmt))
        state[maximum] = largest


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
