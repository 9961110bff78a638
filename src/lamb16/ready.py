"""States as a step is to have them: what is missing is made, what others have left is checked and repaired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks.state import check_live_state
from .checks.tensors import check_memory
from .codes import REMAINDER, as_fp8
from .entries import ALL_ENTRIES, WIDTH, bit_sum, complete, find_largest, init_state, renamed
from .moments import MOMENTS, dtypes, in_float8, raw
from .parameters import Parameters
from .remainder import fitted, has_remainder, is_exact
from .sharding.exchange import whole_sums
from .sharding.layout import is_sharded, like, local
from .step import fp8
from .step.kinds import Kind
from .store import Store
from .wrapped import PLAIN

Members = Mapping[Kind, Sequence[tuple[Tensor, dict[str, Any]]]]  # parameters with their groups
SHAPE, DTYPE, DEVICE = map(attrgetter, ("shape", "dtype", "device"))


class New(NamedTuple):
    """Parameters whose states hold the sum of this rank's weights: ``made``, or ``completed`` from older ones."""

    made: list[Tensor]
    completed: list[Tensor]

    def roll_back(self, states: dict[Any, Any]) -> None:
        """Leave the states as they were before a step that could not be taken."""
        for p in self.made:
            states.pop(p, None)
        for p in self.completed:
            states[p].pop("weight_sum", None)


def unknown(parameters: Parameters, stores: dict[torch.device, Store], members: Members) -> set[int]:
    """The parameters, by id, with states that no store holds, or that were made for a parameter of another kind."""
    found: set[int] = set()
    for kind, pairs in members.items():
        there = [(p, state) for p, _ in pairs if (state := parameters.states.get(p))]
        store = stores.setdefault(kind.device, Store(kind.device))
        found.update(id(there[k][0]) for k in store.changed([state for _, state in there]))
        params, own = [p for p, _ in there], [state for _, state in there]
        group = pairs[0][1]  # the others have its moment_dtype and, where it matters, its param_rounding
        if not are_ready(params, own, group):
            found.update(id(p) for p, state in there if not are_ready([p], [state], group))
    return found


def ready_states(
    parameters: Parameters,
    stores: dict[torch.device, Store],
    grads: dict[int, Tensor],
    changed: set[int],
    new: New,
    inference: bool,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Check those states of parameters with gradients that have changed, by the parameters' ids, and repair them.

    Missing ones are created. Nothing is changed before all has been checked and ``prepare`` called.
    """
    missing: list[tuple[Tensor, dict[str, Any], int]] = []
    live: list[tuple[Tensor, dict[str, Any]]] = []
    written: list[Tensor] = []
    called: list[tuple[dict[str, Any], int, tuple[str, ...]]] = []
    for group in parameters.groups:
        there = [(i, p, parameters.states.get(p)) for i, p in enumerate(group["params"]) if id(p) in grads]
        pairs = [(p, state) for _, p, state in there if state and id(p) in changed]
        ready = are_ready([p for p, _ in pairs], [state for _, state in pairs], group)
        for i, p, state in there:
            keys = (*MOMENTS, REMAINDER) if is_exact(p, group) else MOMENTS
            called.append((group, i, keys if state else ()))
            written.append(p if type(p) in PLAIN else local(p))
            if not state:
                missing.append((p, group, parameters.salt(group, i)))
                continue
            if id(p) in changed:
                state = state if ready else checked_live_state(parameters, p, group, i)
                live.append((p, state))
            written += [x if type(x) is Tensor else local(x) for x in map(state.get, keys)]

    def names() -> list[str]:
        params = [(f"parameter {parameters.name(group, i)}", keys) for group, i, keys in called]
        return [name for param, keys in params for name in (param, *(f"{key} of {param}" for key in keys))]

    check_memory(written, names, inference)
    prepare()
    repair(parameters.states, stores, live, new)
    made = {p: init_state(p, salt, in_float8(group), exact=is_exact(p, group)) for p, group, salt in missing}
    new.made.extend(made)
    for p, state in made.items():
        parameters.states[p].update(state)


def checked_live_state(parameters: Parameters, p: Tensor, group: dict[str, Any], i: int) -> dict[str, Any]:
    """What a state is to hold: codes that another loader left as uint8, or elsewhere, are repaired in a copy.

    Raises ValueError for a state that does not fit its parameter.
    """
    state: dict[str, Any] = renamed(parameters.states[p])
    if are_ready([p], [state], group):
        return state
    state, name, exact = dict(state), parameters.name(group, i), is_exact(p, group)
    if not exact:
        state.pop(REMAINDER, None)
    check_live_state(state, p, name, group["moment_dtype"])
    for key in MOMENTS:
        codes = as_fp8(key, state[key]) if in_float8(group) else state[key]
        if not local(codes).is_contiguous() or codes.device != p.device:
            codes = like(p, _to(local(codes), p.device))
        if local(codes).is_inference():  # of a state that was loaded in inference mode
            codes = like(p, local(codes).clone())
        state[key] = codes
    if exact:
        state[REMAINDER] = fitted(p, state, name)
    return state


def repair(
    states: dict[Any, Any], stores: dict[torch.device, Store], live: list[tuple[Tensor, dict[str, Any]]], new: New
) -> None:
    """Put into states the entries that they are to hold, and what is derived from them where they have changed."""
    changed: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
    for p, repaired in live:
        state = states[p]
        if state.keys() - repaired.keys():  # old names
            state = states[p] = repaired
        if state is not repaired:
            state.update(repaired)
        if not (is_sharded(p) and stores[p.device].holds([state])):
            changed.setdefault(p.device, []).append((p, state))  # its codes may be others than the maxima are of
    for device, pairs in changed.items():
        find_largest(*(state for _, state in pairs), store=stores.get(device))
        new.completed.extend(p for p, state in pairs if complete(p, state))


def add_up(states: dict[Tensor, dict[str, Any]], unnamed: Mapping[Tensor, Tensor]) -> None:
    """Make the sums of split parameters' weights those of whole ones; all ranks must be here with the same ones.

    ``unnamed`` has the weights, this rank's part, of those parameters without names whose salts are new. These then
    follow from the whole tensors' weights too: they are the same on every rank and in every run of a program, and
    others in every optimizer.
    """
    for device in {p.device for p in states}:
        own = {p: state for p, state in states.items() if p.device == device}
        _add_up([p for p in own if is_sharded(p)], [x["weight_sum"] for p, x in own.items() if is_sharded(p)], own)
        chosen = [p for p in own if p in unnamed]
        if chosen:
            sums = [bit_sum(unnamed[p]) for p in chosen]
            split = [is_sharded(p) for p in chosen]
            _add_up(list(compress(chosen, split)), list(compress(sums, split)), own)
            salts = [states[p]["salt"] for p in chosen]
            total = torch.stack(sums)  # whose low bits are 0 for 512 ones as for zeros
            mixed = fp8.hash32(fp8.as_int32(total ^ (total >> 32)) ^ torch.stack(salts))
            torch._foreach_copy_(salts, list(mixed.unbind(0)))


def _add_up(params: list[Tensor], sums: list[Tensor], states: dict[Tensor, dict[str, Any]]) -> None:
    if params:
        whole_sums(params, sums, [int(states[p]["salt"]) & 0xFFFFFFFF for p in params])


def are_ready(params: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]) -> bool:
    """Whether these states have all entries and nothing of them is to be repaired; False for DTensors.

    The parameters are of this group, or of others with its ``moment_dtype`` and ``param_rounding``.
    """
    try:
        entries = list(chain.from_iterable(map(ALL_ENTRIES, states)))
    except KeyError:
        return False
    if not set(map(type, entries)) <= {Tensor} or any(map(is_sharded, set(map(type, params)) - PLAIN and params)):
        return False
    shapes, devices = list(map(SHAPE, params)), list(map(DEVICE, params))
    for k, dtype in enumerate(dtypes(in_float8(group))):
        moments = entries[k::WIDTH]
        if set(map(DTYPE, moments)) - {dtype} or list(map(SHAPE, moments)) != shapes:
            return False
        if list(map(DEVICE, moments)) != devices or not all(map(Tensor.is_contiguous, moments)):
            return False
        if any(map(Tensor.is_inference, moments)):
            return False
    for p, state in zip(params, states, strict=True):
        if not has_remainder(p, state) if is_exact(p, group) else REMAINDER in state:
            return False
    return all(set(map(Tensor.numel, entries[k::WIDTH])) <= {1} for k in range(len(MOMENTS), WIDTH))


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on ``device``; fp8 moves as bytes."""
    return raw(tensor).to(device).contiguous().view(tensor.dtype)
