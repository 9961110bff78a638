"""Checkpoints of a model and its optimizer on any number of ranks, that are complete or not there.

Thin wrappers around ``torch.distributed.checkpoint`` (DCP), which does the work: every rank writes its shards, and a
checkpoint loads on any other number of ranks. What they add: a save that is interrupted leaves no checkpoint behind
that looks like one, and a load that fails has changed nothing (DCP alone writes into the live tensors as it reads).
With one process they work without a process group.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .checks.checkpoint import check_complete, check_new, check_same_keys
from .codes import REMAINDER
from .entries import DERIVED, OLD_NAMES
from .hyper import NAMES
from .parameters import Parameters
from .sharding.exchange import first_text

UNFINISHED = ".saving"  # ends the name of the folder that is written to


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **others: Any) -> None:
    """Write a checkpoint into the new folder ``path``; a collective.

    The folder appears with its last byte: it is written under another name, ``path`` with ``.saving``, and renamed.
    Keep the previous checkpoint until this returns. ``others`` are objects with a ``state_dict``, as a scheduler.

    Raises:
        ValueError: ``path`` exists, or cannot be written to.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    path = Path(path)
    unfinished = _unfinished(path)

    def begin() -> None:
        if _rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            unfinished.mkdir(parents=True)

    def finish() -> None:
        if _rank() == 0:
            unfinished.rename(path)

    _together(lambda: check_new(path))
    _together(begin)
    with _alone_is_fine():
        dcp_save(_state(model, optimizer, others), checkpoint_id=unfinished)
    _together(finish)


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **others: Any) -> None:
    """Read a checkpoint that :func:`save` wrote, on any number of ranks, into the same kind of model; a collective.

    Needs room for a second copy of this rank's part of the model and of the optimizer's state. Checkpoints of version
    0.1 load too. Parameters that are frozen by now get the state that they had. ``others`` are loaded last, by their
    own ``load_state_dict``.

    Raises:
        ValueError: there is no complete checkpoint, a part of it cannot be read, or it is of another model or
            optimizer. Nothing is changed then, on any rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    path = Path(path)
    saved: dict[str, Any] = {}
    _together(lambda: saved.update(_saved(path)))
    with _room(optimizer):
        state = _state(model, optimizer, others)  # the optimizer's is new, the rest is copied
        state = {key: value if key == "optimizer" else _copied(value) for key, value in state.items()}
        _together(lambda: _forget_unsaved(state, saved, path))
        try:
            with _alone_is_fine():
                dcp_load(state, checkpoint_id=path)
        except CheckpointException as error:
            raise ValueError(
                f"lamb16.checkpoint.load: {path} is damaged; load another one ({_first_cause(error)})"
            ) from error
        # Not strict: a parameter that had no state yet has none again.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    set_model_state_dict(model, state["model"])
    for name, other in others.items():
        other.load_state_dict(state[name])


def _saved(path: Path) -> dict[str, Any]:
    """What a checkpoint says it holds, by DCP's keys."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    check_complete(path, _unfinished(path))
    try:
        return FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"lamb16.checkpoint.load: {path} is damaged; load another one ({error})") from error


def _forget_unsaved(state: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    """Leave the optimizer states out that the checkpoint does not have: those of parameters that were never stepped.

    Raises ValueError if anything else is missing, if there is more in the checkpoint, or if shapes or dtypes differ.
    DCP ignores what is not asked for, and casts.
    """
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    states, stateful = state["optimizer"]["state"], {_parameter_key(key) for key in saved}
    for name in list(states):
        if f"optimizer.state.{name}" not in stateful:
            del states[name]
    _ask_as_saved(state["optimizer"], saved)
    own, _ = flatten_state_dict(state)
    others = {f"optimizer.state.{name}": name for name in state["model"] if name not in states}
    missing = [key for key in own if key not in saved]
    surplus = [key for key in saved if key not in own and key.startswith(("model.", "optimizer."))]
    left_out = sorted({others[_parameter_key(key)] for key in surplus if _parameter_key(key) in others})
    surplus = [key for key in surplus if _parameter_key(key) not in others]
    unlike = [key for key in own if key in saved and _kind(own[key]) != _kind(saved[key])]
    check_same_keys(path, missing, surplus, unlike)
    if left_out:
        warnings.warn(
            f"lamb16.checkpoint.load: the optimizer does not have {', '.join(left_out)}: their states are not loaded",
            stacklevel=4,
        )


def _ask_as_saved(own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Rename states' entries to what they were before version 0.2, and let groups have the entries of the saved ones.

    ``load_state_dict`` knows the old names, and derives or keeps what is not there.
    """
    old_names = {new: old for old, new in OLD_NAMES.items()}
    for name, state in list(own["state"].items()):
        key = f"optimizer.state.{name}"
        if f"{key}.exp_avg_norm" in saved:
            state = {old_names.get(entry, entry): value for entry, value in state.items()}
        optional = (*DERIVED, REMAINDER)
        own["state"][name] = {x: value for x, value in state.items() if x not in optional or f"{key}.{x}" in saved}
    for k, group in enumerate(own["param_groups"]):
        prefix = f"optimizer.param_groups.{k}."
        found = {key.removeprefix(prefix) for key in saved if key.startswith(prefix)}
        for name in {*NAMES, "param_names"} & set(group) - found:
            del group[name]
        for name in found - set(group):
            group[name] = None


def _parameter_key(key: str) -> str:
    """The key of the parameter that an entry of a state belongs to."""
    return key.rpartition(".")[0]


def _kind(value: Any) -> tuple[Any, Any]:
    """Shape and dtype of a tensor, or of what a checkpoint says of one; None for anything else."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return getattr(value, "size", None), getattr(getattr(value, "properties", None), "dtype", None)


@contextlib.contextmanager
def _room(optimizer: Optimizer) -> Iterator[None]:
    """Around loading: the optimizer has no state and no gradients, which is where torch makes room for a state.

    It does so by a step that changes nothing else. After an error the old state is back.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    gradients, before = [p.grad for p in params], dict(optimizer.state)
    judged = [group["params"][i] for group, i in Parameters(optimizer.param_groups, {}, 0).judged()]
    frozen = [p for p in judged if not p.requires_grad]
    offloaded = getattr(optimizer, "offloaded", None)
    for p in params:
        p.grad = None
    for p in frozen:
        p.requires_grad_(True)  # or torch makes no room for its state, and does not hand it on
    optimizer.state.clear()
    try:
        yield
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(before)
        if offloaded is not None:
            optimizer.offload(offloaded)  # type: ignore[attr-defined]
        raise
    finally:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        for p in frozen:
            p.requires_grad_(False)


def _state(model: nn.Module, optimizer: Optimizer, others: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    own = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return own | {name: other.state_dict() for name, other in others.items()}


def _copied(state: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.detach().clone() if isinstance(state, torch.Tensor) else state


def _first_cause(error: Any) -> str:
    """What the first of the ranks that failed says."""
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    """DCP warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _rank() -> int:
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    return 0 if alone else torch.distributed.get_rank()


def _together(action: Callable[[], None]) -> None:
    """Do what may fail on one rank; then all raise a ValueError. No rank returns before all have done it."""
    cause, text = None, None
    try:
        action()
    except (OSError, ValueError) as error:
        cause, text = error, str(error)
    first = first_text(text)
    if first is not None:
        rank, found = first
        raise ValueError(found if text else f"{found} (on rank {rank})") from cause
