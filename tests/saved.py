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


def save(how: str, folder: str, kind: str = "") -> None:
    """Three steps and a checkpoint, of the kinds of the tests' faults."""
    made = model, optimizer = make(how)
    if kind == "another optimizer":
        made = model, torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[assignment]
    if kind == "more layers":
        model = parallelize(network(extra=True), how)
        made = model, Lamb16(named(model), **HYPER, compile=False)
    steps(made, 0, 3)
    if kind == "another dtype":
        made = model.bfloat16(), optimizer
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
    path = Path(folder) / "checkpoint"
    if kind == "not seen by a rank" and torch.distributed.get_rank() == 1:
        path = Path(folder) / "elsewhere"
    error = message(checkpoint.load, path, *made)
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


def cannot_be_saved(how: str, folder: str) -> list[str]:
    """Into a folder below a file, and where there is a checkpoint already."""
    made = make(how)
    (Path(folder) / "file").touch()
    (Path(folder) / "there").mkdir(exist_ok=True)
    torch.distributed.barrier()
    return [message(checkpoint.save, Path(folder) / name, *made) for name in ("file/checkpoint", "there")]


def with_unused_parameter(how: str, folder: str, steps_before: int) -> tuple[Found, Found, list[float]]:
    """A parameter that never has a gradient, and a scheduler; saved after a backward pass and loaded into new ones."""
    model, optimizer = make(how)
    model[2].bias.requires_grad_(False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(steps_before):
        step_without(model, step)
        optimizer.step()
        scheduler.step()
    step_without(model, steps_before)
    checkpoint.save(Path(folder) / "checkpoint", model, optimizer, scheduler=scheduler)
    model[2].bias.requires_grad_(True)
    new_model, new = make(how)
    new_scheduler = torch.optim.lr_scheduler.ExponentialLR(new, 0.5)
    checkpoint.load(Path(folder) / "checkpoint", new_model, new, scheduler=new_scheduler)
    before, after = all_of((model, optimizer)), all_of((new_model, new))
    return before, after, [new.param_groups[0]["lr"], new_scheduler.last_epoch, bool(new.state.get(new_model[2].bias))]


def step_without(model: nn.Module, step: int) -> None:
    given(model, step)
    model[2].bias.grad = None


def with_frozen_parameter(how: str, folder: str) -> tuple[Found, Found]:
    """A parameter that was stepped three times and is frozen when the checkpoint is saved and loaded."""
    made, new = make(how), make(how)
    steps(made, 0, 3)
    for model, optimizer in (made, new):
        optimizer.zero_grad()
        model[2].bias.requires_grad_(False)
    checkpoint.save(Path(folder) / "checkpoint", *made)
    checkpoint.load(Path(folder) / "checkpoint", *new)
    assert not new[0][2].bias.requires_grad
    return all_of(made), all_of(new)
