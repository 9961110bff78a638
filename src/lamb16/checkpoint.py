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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

UNFINISHED = ".saving"  # ends the name of the folder that is written to


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **others: Any) -> None:
    """Write a checkpoint into the new folder ``path``; a collective.

    The folder appears with its last byte: it is written under another name, ``path`` with ``.saving``, and renamed.
    Keep the previous checkpoint until this returns. ``others`` are objects with a ``state_dict``, as a scheduler.

    Raises:
        ValueError: ``path`` exists.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    path = Path(path)
    unfinished = _unfinished(path)
    if path.exists():
        raise ValueError(f"lamb16.checkpoint.save: {path} exists; save every checkpoint into a folder of its own")
    _barrier()  # no rank looks after another has begun
    if _rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        unfinished.mkdir(parents=True)
    _barrier()
    with _alone_is_fine():
        dcp_save(_state(model, optimizer, others), checkpoint_id=unfinished)
    if _rank() == 0:
        unfinished.rename(path)
    _barrier()


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **others: Any) -> None:
    """Read a checkpoint that :func:`save` wrote, on any number of ranks, into the same kind of model; a collective.

    Raises:
        ValueError: there is no complete checkpoint, a part of it cannot be read, or it is of another model or
            optimizer. Nothing is changed then, on any rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    path = Path(path)
    if not (path / ".metadata").is_file():
        hint = f"; {path.name}{UNFINISHED} is one that was not finished" if _unfinished(path).exists() else ""
        raise ValueError(f"lamb16.checkpoint.load: there is no checkpoint in {path}{hint}")
    with _room(optimizer):
        state = _copied(_state(model, optimizer, others))
        try:
            with _alone_is_fine():
                dcp_load(state, checkpoint_id=path)
        except CheckpointException as error:
            raise ValueError(
                f"lamb16.checkpoint.load: {path} is damaged, or not of this model and optimizer; load another one "
                f"({_first_cause(error)})"
            ) from error
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    set_model_state_dict(model, state["model"])
    for name, other in others.items():
        other.load_state_dict(state[name])


@contextlib.contextmanager
def _room(optimizer: Optimizer) -> Iterator[None]:
    """Around loading. torch makes room for a state by a step that changes nothing, where there are no gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    gradients, fresh = [p.grad for p in params], not optimizer.state
    for p in params:
        p.grad = None
    try:
        yield
    except Exception:
        if fresh:
            optimizer.state.clear()
        raise
    finally:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient


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


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _barrier() -> None:
    if _distributed():
        torch.distributed.barrier()
