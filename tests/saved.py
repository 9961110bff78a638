"""Saving and loading on several ranks. `ranks.py` runs these."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from helpers import assert_same
from lamb16 import Lamb16, checkpoint
from parallel import given, named, network, parallelize
from ranks import group
from refused import message
from sharded import HYPER, Found, found

MODES = {
    "sharded": {},
    "sharded, flattened": {"flatten_optimizer_state_dict": True},
    "sharded, on the CPU": {"cpu_offload": True},
    "full": {"full_state_dict": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},  # rank 0 has it
    "full, from rank 0": {"full_state_dict": True},
}  # full and flattened fails in torch's loader, for torch's own optimizers too
FROM_RANK_0 = ("full, on the CPU", "full, from rank 0")

Made = tuple[nn.Module, Lamb16]


def make(how: str, hidden: int = 64) -> Made:
    model = parallelize(network(hidden), how)
    return model, Lamb16(named(model), **HYPER, compile=False)


def steps(made: Made, first: int, last: int) -> None:
    model, optimizer = made
    for step in range(first, last):
        optimizer.zero_grad()
        given(model, step)
        optimizer.step()


def all_of(made: Made) -> Found:
    model, optimizer = made
    return found([p for _, p in named(model)], optimizer)


def uninterrupted(how: str, last: int) -> Found:
    made = make(how)
    steps(made, 0, last)
    return all_of(made)


def through_state_dict(how: str, mode: str) -> Found:
    """Three steps, the state dict into a new optimizer over the same parameters, three steps."""
    made = model, optimizer = make(how)
    steps(made, 0, 3)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**MODES[mode]))
    options = MODES[mode]
    if mode in FROM_RANK_0:
        options = options | {"broadcast_from_rank0": True}
        state = state if torch.distributed.get_rank() == 0 else {}
    new = Lamb16(named(model), lr=0.5, compile=False, seed=5)
    new.zero_grad()  # torch makes room for a state only where there are no gradients
    set_optimizer_state_dict(model, new, state, options=StateDictOptions(**options))
    assert_same(all_of((model, new)), all_of(made))
    steps((model, new), 3, 6)
    return all_of((model, new))


def save(how: str, folder: str, foreign: bool = False) -> None:
    """Three steps and a checkpoint; a foreign one is AdamW's."""
    made = model, _ = make(how)
    if foreign:
        made = model, torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[assignment]
    steps(made, 0, 3)
    checkpoint.save(Path(folder) / "checkpoint", *made)


def load(how: str, folder: str) -> tuple[Found, Found]:
    """What was loaded, and three steps later."""
    made = make(how)
    checkpoint.load(Path(folder) / "checkpoint", *made)
    loaded = all_of(made)
    steps(made, 3, 6)
    return loaded, all_of(made)


def through_dcp(how: str, folder: str, asynchronous: bool) -> Found:
    """DCP's own functions, without lamb16.checkpoint."""
    made = model, optimizer = make(how)
    steps(made, 0, 3)
    state = {"model": dcp_state.get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if asynchronous:
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)
    made = model, optimizer = make(how)
    state = {"model": dcp_state.get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    dcp_state.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    steps(made, 3, 6)
    return all_of(made)


def fails_to_load(how: str, folder: str, kind: str, stepped: bool) -> str:
    """The message; a model and optimizer that fail to load a checkpoint are what they were."""
    made = make(how, hidden=32) if kind == "another model" else make(how)
    if stepped:
        steps(made, 0, 2)
    before = all_of(made)
    error = message(checkpoint.load, Path(folder) / "checkpoint", *made)
    assert_same(all_of(made), before)
    return error


def is_killed(rank: int, folder: str) -> None:
    """Two ranks save once, and again; the second time rank 1 is killed after its first tensors."""
    with group(rank, 2, f"{folder}/store", seconds=20):
        made = make("FSDP2 on 2")
        steps(made, 0, 3)
        checkpoint.save(Path(folder) / "checkpoint", *made)
        steps(made, 3, 6)
        with killed_while_writing() if rank == 1 else mock.MagicMock():
            checkpoint.save(Path(folder) / "next", *made)


def killed_while_writing() -> Any:
    from torch.distributed.checkpoint import filesystem

    original: Callable[..., Any] = filesystem._write_item
    calls = []

    def write(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return mock.patch.object(filesystem, "_write_item", write)
