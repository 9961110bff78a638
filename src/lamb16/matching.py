"""Which entry of a saved state dict belongs to which parameter of an optimizer, and which groups are the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from .checks.state import check_groups, check_groups_match, check_names_match


class Loaded(NamedTuple):
    """What ``load_state_dict`` left out, by parameter name (or position); all empty with ``strict=True``.

    ``missing_keys``: parameters of the optimizer that the state dict does not know; ``unexpected_keys``: the reverse;
    ``mismatched_keys``: both know them, with other shapes; ``kept_groups``: the members of each group whose members
    are no group of the state dict. Such parameters keep their state, such groups their hyperparameters.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]
    kept_groups: list[list[str]]


class Match(NamedTuple):
    """``keys``: those of the saved groups' ``params``; ``positions``: group and position here of those that are known.

    ``sources``: for every group here the saved group that has the same members, None where there is none.
    """

    keys: set[Any]
    positions: dict[Any, tuple[int, int]]
    sources: list[int | None]
    loaded: Loaded


def match(saved: Sequence[dict[str, Any]], names: Sequence[Sequence[str]], named: bool, strict: bool) -> Match:
    """Match saved groups with this optimizer's, whose parameters have these names.

    By name, whatever the order and the grouping, where both sides have names; else by position.

    Raises:
        ValueError: names or groups differ, and ``strict``; by position also if not.
    """
    theirs = _names(saved, set(chain.from_iterable(names))) if named and _unique(names) else None
    if theirs is None:
        check_groups(saved, [{"params": own} for own in names])
        places = [(k, i) for k, own in enumerate(names) for i in range(len(own))]
        keys = list(chain.from_iterable(group["params"] for group in saved))
        return Match(set(keys), dict(zip(keys, places, strict=True)), [*range(len(saved))], Loaded([], [], [], []))
    here = {name: (k, i) for k, own in enumerate(names) for i, name in enumerate(own)}
    there = {
        name: key
        for group, own in zip(saved, theirs, strict=True)
        for name, key in zip(own, group["params"], strict=True)
    }
    missing, unexpected = [x for x in here if x not in there], [x for x in there if x not in here]
    if strict:
        check_names_match(missing, unexpected)
    waiting: dict[frozenset[str], list[int]] = {}
    for k, own in enumerate(theirs):
        waiting.setdefault(frozenset(own), []).append(k)
    sources = [waiting[key].pop(0) if waiting.get(key) else None for key in map(frozenset, names)]
    kept = [k for k, source in enumerate(sources) if source is None]
    if strict:
        check_groups_match(kept, len(saved), names)
    positions = {key: here[name] for name, key in there.items() if name in here}
    loaded = Loaded(missing, unexpected, [], [list(names[k]) for k in kept])
    return Match(set(there.values()), positions, sources, loaded)


def _names(saved: Sequence[dict[str, Any]], here: set[str]) -> list[list[str]] | None:
    """The names of saved groups' members; None where they have none.

    Keys that are names come from ``torch.distributed.checkpoint.state_dict``, whose loader brings the keys into this
    optimizer's order, but not ``param_names``.
    """
    if any("params" not in group for group in saved):
        return None
    keys = [key for group in saved for key in group["params"]]
    if keys and all(isinstance(key, str) for key in keys):
        names = [list(group["params"]) for group in saved] if here & set(keys) else None
    else:
        names = [list(group.get("param_names", ())) for group in saved]
        if [len(own) for own in names] != [len(group["params"]) for group in saved]:
            names = None
    return names if names is not None and _unique(names) else None


def _unique(names: Sequence[Sequence[str]]) -> bool:
    flat = list(chain.from_iterable(names))
    return len(flat) == len(set(flat))
