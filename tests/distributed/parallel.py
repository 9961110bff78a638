"""A small network trained in the ways that torch has for several ranks, and in one process. `ranks.py` runs these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lamb16 import Lamb16, release_gradients
from sharded import HYPER, Found, found

MESHES: dict[str, tuple[int, ...]] = {
    "one process": (),
    "FSDP2 on 2": (2,),
    "FSDP2 on 3": (3,),
    "FSDP2 on 4": (4,),
    "HSDP": (2, 2),
    "TP": (2,),
    "TP and FSDP2": (2, 2),
    "DDP": (2,),
}
EXACT = ("FSDP2 on 2", "FSDP2 on 4", "HSDP", "DDP")  # of equal batches the mean is exact for powers of two


def network(hidden: int = 64, extra: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(48, hidden), nn.Tanh(), nn.LayerNorm(hidden), nn.Linear(hidden, 6)]
        return nn.Sequential(*layers, *([nn.Linear(6, 6)] if extra else []))


def parallelize(model: nn.Sequential, how: str) -> nn.Module:
    """The model in the named way, with what the rank holds as its parameters."""
    sizes = MESHES[how]
    if how == "DDP":
        return DistributedDataParallel(model)
    if not sizes:
        return model
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "model")[-len(sizes) :])
    if how.startswith("TP"):
        plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, mesh["model"], plan)
    if how != "TP":
        shard_all(model, mesh["data"] if how.startswith("TP") else mesh)
    return model


def shard_all(model: nn.Sequential, mesh: Any) -> None:
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters with the names of the model in one process."""
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()]


def loss_of(model: nn.Module, step: int) -> Tensor:
    """On every rank the same batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 48, generator=generator)
    return F.cross_entropy(model(x), x[:, :6].argmax(1))


def backward(model: nn.Module, step: int) -> None:
    loss_of(model, step).backward()


def accumulate(model: nn.Module, step: int) -> None:
    """Two batches; FSDP2 and DDP communicate with the second one only."""
    for k in (0, 1):
        last = k == 1
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        (loss_of(model, 2 * step + k) / 2).backward()


def clip(model: nn.Module, step: int) -> None:
    backward(model, step)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert (norm.full_tensor() if isinstance(norm, DTensor) else norm) > 0.1


def given(model: nn.Module, step: int) -> None:
    """Gradients that do not depend on how the ranks' are summed, after a backward pass that makes their places."""
    backward(model, step)
    for i, (_, p) in enumerate(named(model)):
        generator = torch.Generator().manual_seed(100 * step + i)
        set_gradient(p, torch.randn(p.shape, generator=generator) * 10.0 ** (i - 3))


def set_gradient(p: Tensor, whole: Tensor) -> None:
    if not isinstance(p, DTensor):
        p.grad = whole
        return
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].contiguous()
    p.grad = DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=whole.stride()
    )


GRADIENTS: dict[str, Callable[[nn.Module, int], None]] = {
    "backward": backward,
    "accumulate": accumulate,
    "clip": clip,
    "given": given,
}


def train(how: str, gradients: str, compile: bool, steps: int, names: bool = True) -> Found:
    """Weights and states, whole, after some steps; without names there is another optimizer on the first rank."""
    model = parallelize(network(), how)
    params = named(model)
    if not names and torch.distributed.get_rank() == 0:
        probe = nn.Parameter(torch.ones(3))
        probe.grad = torch.ones(3)
        Lamb16([probe], compile=False).step()
    optimizer = Lamb16(params if names else model.parameters(), **HYPER, compile=compile)
    for step in range(steps):
        optimizer.zero_grad()
        GRADIENTS[gradients](model, step)
        optimizer.step()
    return found([p for _, p in params], optimizer)


def train_released(
    how: str, compile: bool, steps: int, bucket_bytes: int, gradients: str = "backward"
) -> tuple[Found, int]:
    """The same with gradients that are released, and how many of these are there after all backward passes."""
    model = parallelize(network(), how)
    params = named(model)
    optimizer = Lamb16(params, **HYPER, compile=compile)
    release_gradients(model, optimizer, bucket_bytes=bucket_bytes)
    left = 0
    for step in range(steps):
        GRADIENTS[gradients](model, step)
        left += sum(p.grad is not None for _, p in params)
        optimizer.step()
        assert len(optimizer.layer_stats()) == len(params)
    return found([p for _, p in params], optimizer), left


def train_scaled(how: str, amp_scaling: bool, steps: int) -> tuple[Found, int, float]:
    """With a GradScaler; in step 2 one rank's loss is infinite."""
    model = parallelize(network(), how)
    params = named(model)
    optimizer = Lamb16(params, **HYPER, amp_scaling=amp_scaling, compile=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        scaler.scale(loss * torch.inf if step == 2 and last else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return found([p for _, p in params], optimizer), optimizer.skipped, scaler.get_scale()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """One group per parameter, so that its name stays with it when ZeroRedundancyOptimizer deals them out."""
    return [{"params": [p], "param_names": [name]} for name, p in named(model)]


def train_zero(compile: bool, steps: int, resume_at: int | None = None) -> list[Tensor]:
    """DDP and ZeroRedundancyOptimizer; with ``resume_at`` through a state dict into a new optimizer after that step."""
    model = DistributedDataParallel(network())
    optimizer = make_zero(model, compile)
    for step in range(steps):
        if step == resume_at:
            optimizer = reloaded(optimizer, make_zero(model, compile))
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def make_zero(model: nn.Module, compile: bool) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(groups_of(model), optimizer_class=Lamb16, **HYPER, compile=compile)


def reloaded(old: ZeroRedundancyOptimizer, new: ZeroRedundancyOptimizer) -> ZeroRedundancyOptimizer:
    """The new one with the old one's state, which rank 0 gathers and hands round."""
    old.consolidate_state_dict(to=0)
    box: Sequence[Any] = [old.state_dict() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    new.load_state_dict(box[0])
    return new
