"""States as a step is to have them: what is missing is made, what others have left is checked and repaired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_memory
from .codes import CODES, as_fp8
from .entries import ALL_ENTRIES, DERIVED, ENTRIES, MOMENTS, SCALARS, WIDTH, complete, find_largest, init_state, renamed
from .hyper import MOMENT_DTYPES
from .parameters import Parameters
from .remainder import REMAINDER, fitted, has_remainder, is_exact
from .sharding.exchange import whole_sums
from .sharding.layout import is_sharded, like, local
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
    made = {
        p: init_state(p, salt, group["moment_dtype"] == "float8", exact=is_exact(p, group))
        for p, group, salt in missing
    }
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
    missing = set(ENTRIES) - set(DERIVED) - set(state)
    if missing:
        raise ValueError(
            f"Lamb16: the state of parameter {name} has no {sorted(missing)}; delete optimizer.state[parameter] to "
            "start anew, or load a state with Lamb16.load_state_dict"
        )
    for key in set(SCALARS) & set(state):
        value = state[key]
        if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.numel() != 1):
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is {value!r}, expected one number; load states with "
                "Lamb16.load_state_dict, cut and extend parameters with optimizer.resize(p, index, new_p)"
            )
    float8 = group["moment_dtype"] == "float8"
    for key, dtype in CODES.items():
        wanted = dtype if float8 else torch.float32
        if not isinstance(state[key], Tensor):
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is {state[key]!r}, expected a tensor; delete "
                "optimizer.state[parameter] to start anew, or load a state with Lamb16.load_state_dict"
            )
        codes = as_fp8(key, state[key]) if float8 else state[key]
        if is_sharded(codes) != is_sharded(p):
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is not sharded over the ranks as the parameter is; load states "
                "with Lamb16.load_state_dict, or with torch.distributed.checkpoint.state_dict"
            )
        if codes.shape != p.shape or local(codes).shape != local(p).shape:
            raise ValueError(
                f"Lamb16: parameter {name} has shape {tuple(p.shape)}, but its state was made for "
                f"{tuple(codes.shape)}; change a parameter's rows with optimizer.resize(p, index, new_p), or "
                "delete optimizer.state[parameter]"
            )
        if codes.dtype != wanted:
            raise ValueError(
                f"Lamb16: {key} of parameter {name} is {codes.dtype}, but its group has "
                f"moment_dtype={group['moment_dtype']!r}, which needs {wanted}; moment_dtype cannot change after "
                "the first step, and states must be loaded with Lamb16.load_state_dict"
            )
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


def add_up(states: dict[Tensor, dict[str, Any]]) -> None:
    """Make the sums of split parameters' weights those of whole ones; all ranks must be here with the same ones."""
    split = {p: state for p, state in states.items() if is_sharded(p)}
    for device in {p.device for p in split}:
        own = {p: state for p, state in split.items() if p.device == device}
        sums = [state["weight_sum"] for state in own.values()]
        whole_sums(list(own), sums, [int(state["salt"]) & 0xFFFFFFFF for state in own.values()])


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
    for k, dtype in enumerate(MOMENT_DTYPES[group["moment_dtype"]]):
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
    dtype = tensor.dtype
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.to(device).contiguous().view(dtype)
