"""Reading a state dict into an optimizer: what it holds is checked as a whole before anything is changed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .checks.foreign import warn_of_rates
from .checks.state import check_state, check_state_dict, check_unknown_states, warn_of_other_moments
from .codes import REMAINDER, as_bytes, remainder_from_bytes
from .convert import OWN, Foreign, added, as_lamb16, check_foreign, keys_of, own_group, share, unwrapped
from .entries import ENTRIES, SCALARS, find_largest, init_state, renamed
from .hyper import NAMES, check_hyperparameters
from .matching import Match, match
from .moments import MOMENTS, dtypes, in_float8, raw
from .parameters import Parameters
from .ready import add_up
from .remainder import is_exact
from .sharding.layout import like_param, local, placement


def matched(
    state_dict: dict[str, Any], parameters: Parameters, strict: bool
) -> tuple[list[list[str]], Match, dict[Any, Any]]:
    """The parameters' names, which saved group and state belongs to which, and the states by today's names."""
    check_state_dict(state_dict)
    names = parameters.names()
    named = all("param_names" in group for group in parameters.groups)
    found = match(state_dict["param_groups"], names, named, strict)
    check_unknown_states(state_dict)
    return names, found, {key: renamed(unwrapped(state)) for key, state in state_dict["state"].items()}


def checked_groups(
    own: list[dict[str, Any]], saved: list[dict[str, Any]], states: dict[Any, Any], sources: list[int | None]
) -> list[dict[str, Any]]:
    """This optimizer's groups with the hyperparameters of the saved ones that they have for a source."""
    ours = any(isinstance(state, dict) and set(MOMENTS) & set(state) for state in states.values())
    groups: list[dict[str, Any]] = []
    rates = {}
    for old, k in zip(own, sources, strict=True):
        new: dict[str, Any] = {} if k is None else saved[k]
        others = k is not None and not ours and not set(OWN) & set(new)
        if others:
            new = own_group(new, f"group {k}")
        kept = old if k is None else {name: old[name] for name in NAMES}
        check_hyperparameters(kept | new, f".load_state_dict (group {k})", running=True)
        group = {key: deepcopy(value) for key, value in (kept | new).items() if key not in ("params", "param_names")}
        group["params"] = old["params"]
        for names in (saved[k] if k is not None else old, old):
            if "param_names" in names:
                group["param_names"] = list(names["param_names"])
        if others:
            rates[len(groups)] = float(old["lr"]), float(group["lr"])
        groups.append(group)
    warn_of_rates(rates)
    return groups


def checked_states(
    saved: list[dict[str, Any]],
    states: dict[Any, Any],
    groups: list[dict[str, Any]],
    names: list[list[str]],
    found: Match,
    strict: bool,
) -> dict[Any, Foreign]:
    """Refuse what cannot be loaded; returns those states that another optimizer made.

    With ``strict=False`` those of another shape are taken out of ``found``.
    """
    foreign = {}
    saved_group = {key: group for group in saved for key in group["params"]}
    for key, state in states.items():
        if key not in found.positions:
            continue
        k, i = found.positions[key]
        p, name = groups[k]["params"][i], names[k][i]
        other = keys_of(state)
        first = state.get((other or MOMENTS)[0]) if isinstance(state, dict) else None
        if not strict and isinstance(first, Tensor) and first.shape != p.shape:
            found.loaded.mismatched_keys.append(name)
            del found.positions[key]
        elif other:
            foreign[key] = check_foreign(state, saved_group[key], p, name)
        else:
            check_state(state, p, name, groups[k]["moment_dtype"])
    return foreign


def read_state(
    parameters: Parameters,
    states: dict[Any, Any],
    foreign: dict[Any, Foreign],
    groups: list[dict[str, Any]],
    found: Match,
) -> dict[Any, Any]:
    """The saved states keyed by this optimizer's parameters, copied to their devices and sharded as they are."""
    warn_of_other_moments(groups, parameters.groups)
    share(list(foreign.values()))
    targets = {key: (groups[k]["params"][i], groups[k]) for key, (k, i) in found.positions.items()}
    placed = set(found.positions.values())
    state = {
        p: parameters.states[p]
        for k, group in enumerate(groups)
        for i, p in enumerate(group["params"])
        if (k, i) not in placed and _fits(parameters.states.get(p, {}), group)
    }
    known = [key for key in states if key in targets]
    loaded: dict[Any, dict[str, Any]] = {}
    for key in known:
        p, group = targets[key]
        float8, value = in_float8(group), states[key]
        if key in foreign:
            k, i = found.positions[key]
            value = as_lamb16(foreign[key], parameters.salt(parameters.groups[k], i), float8)
        exact = is_exact(p, group)
        loaded[key] = init_state(
            p, int(value["salt"]) & 0xFFFFFFFF, float8, _memory_for(p, parameters.states.get(p, {}), group), exact
        )
        if exact and REMAINDER in value:
            remainder = like_param(p, as_bytes(REMAINDER, value[REMAINDER]))
            local(loaded[key][REMAINDER]).copy_(remainder_from_bytes(remainder))
        for entry in MOMENTS:
            part, target = like_param(p, as_bytes(entry, value[entry])), local(loaded[key][entry])
            raw(target.view(-1)).copy_(raw(part.reshape(-1)))
        for entry in set(SCALARS) & set(value) - {"salt"}:
            scalar = loaded[key][entry]
            scalar.fill_(float(value[entry]) if scalar.is_floating_point() else int(value[entry]))
        find_largest(loaded[key])
    unnamed, incomplete = parameters.unnamed(), [key for key in known if "weight_sum" not in states[key]]
    params = {key: targets[key][0] for key in incomplete}
    weights = {p: local(p) for key, p in params.items() if key in foreign and id(p) in unnamed}
    add_up({p: loaded[key] for key, p in params.items()}, weights)
    for key, value in states.items():
        if key in targets:
            p = targets[key][0]
            state[p] = loaded[key] | foreign_entries(added(value) if key in foreign else value, p.device)
        elif key not in found.keys:  # of no parameter
            state[key] = value
    return state


def _fits(state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Whether this is a state with the moments' dtypes of the group."""
    found = [x.dtype for x in map(state.get, MOMENTS) if isinstance(x, Tensor)]
    return found == list(dtypes(in_float8(group)))


def _memory_for(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[Tensor] | None:
    """The moments that are there, if a state of this parameter can be copied into them.

    Not if others hold their memory: a state dict that someone kept, or other tensors in one buffer.
    """
    moments: list[Any] = [state.get(name) for name in MOMENTS]
    for x, dtype in zip(moments, dtypes(in_float8(group)), strict=True):
        if not isinstance(x, Tensor) or x.is_inference():
            return None
        mine, own = local(x), local(p)
        if (x.shape, mine.shape, mine.dtype, mine.device) != (p.shape, own.shape, dtype, own.device):
            return None
        if not mine.is_contiguous() or placement(x) != placement(p) or not _is_held_alone(mine):
            return None
    return moments


def _is_held_alone(x: Tensor) -> bool:
    """Whether nothing but a tensor, of which this is a detached view, holds its memory."""
    return int(torch._C._storage_Use_Count(x.untyped_storage()._cdata)) <= 3  # these two, and the storage object


def foreign_entries(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copies of the entries that others added to a state, as Lookahead does; tensors on the parameter's device."""
    added = {key: value for key, value in state.items() if key not in (*ENTRIES, REMAINDER)}
    return {
        key: value.detach().to(device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
        for key, value in added.items()
    }
