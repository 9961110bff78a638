"""What the ranks of the distributed tests do, and the same in one process. No test here: `ranks.py` runs these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from helpers import CODES
from lamb16 import Lamb16, remainder
from lamb16.sharding.layout import like

Found = dict[str, Tensor]
MAXIMA = ("exp_avg_max", "exp_avg_sq_max")

# Uneven in every dimension, rows and packed rows, one that is smaller than a mesh, one that is empty.
SHAPES = ((7, 3), (2101,), (130, 70), (6, 50, 40), (3,), (0, 4), (64, 48), (2, 3, 1030))
HYPER: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.01}
CAUTIOUS = 2  # the tensors before this one are updated with caution

# Mesh, and for every mesh axis the dimension that it splits, None to replicate.
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {
    "one rank": ((1,), (0,)),
    "rows over 2": ((2,), (0,)),
    "rows over 3": ((3,), (0,)),
    "rows over 4": ((4,), (0,)),
    "columns over 2": ((2,), (1,)),
    "columns over 3": ((3,), (1,)),
    "columns over 4": ((4,), (1,)),
    "last dimension over 3": ((3,), (2,)),
    "replicated over 2": ((2,), (None,)),
    "HSDP": ((2, 2), (None, 0)),
    "replicated within": ((2, 2), (0, None)),
    "rows and columns": ((2, 2), (0, 1)),
    "columns and rows": ((2, 2), (1, 0)),
    "columns and last": ((2, 2), (1, 2)),
}


def placements_of(shape: Sequence[int], dims: Sequence[int | None]) -> list[Any]:
    """Tensors with fewer dimensions are split along their first one instead; once, or the chunks would be uneven."""
    placed: list[Any] = []
    for dim in dims:
        wanted = None if dim is None else dim if dim < len(shape) else 0
        placed.append(Replicate() if wanted is None or Shard(wanted) in placed else Shard(wanted))
    return placed


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradient(i: int, step: int) -> Tensor:
    """Of very different sizes; tensor 2 has zeros at first, tensor 3 once a NaN, near its end."""
    generator = torch.Generator().manual_seed(100 * step + i)
    grad = torch.randn(SHAPES[i], generator=generator) * 10.0 ** (i - 5)
    if i == 2 and step < 2:
        grad.zero_()
    if i == 3 and step == 4:
        grad[-1, -1, -1] = torch.nan
    return grad


def grouped(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:CAUTIOUS], "caution": True}, {"params": params[CAUTIOUS:], "nesterov": False}]


def step_halves(placement: str | None, rounding: str, compile: bool, steps: int) -> Found:
    """bfloat16 weights, on a mesh or (None) in one process; somebody changes a part of one tensor on the way."""
    shard = sharder(placement) if placement else lambda tensor: tensor
    params = [nn.Parameter(shard(w.bfloat16())) for w in weights()]
    optimizer = Lamb16(grouped(params), **HYPER, param_rounding=rounding, compile=compile)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = shard(gradient(i, step).bfloat16())
        optimizer.max_grad_norm = clip_at(step)
        if step == 3:
            changed = torch.where(torch.arange(2101) < 5, 0.5, weights()[1]).bfloat16()
            params[1].data.copy_(shard(changed))
        optimizer.step()
    exact = optimizer.float32_weights()
    return found(params, optimizer) | {f"{name}.float32": whole(x) for name, x in exact.items()}


def step_with_a_plain_one(rounding: str) -> Tensor:
    """A split tensor, and a plain bfloat16 one that has a gradient on the first rank only; returns the split one."""
    shard = sharder("rows over 2")
    a, b = nn.Parameter(shard(weights()[2])), nn.Parameter(torch.ones(40).bfloat16())
    optimizer = Lamb16([("a", a), ("b", b)], **HYPER, param_rounding=rounding, compile=False)
    for step in range(3):
        a.grad = shard(gradient(6, step)[:1].new_ones(a.shape))
        b.grad = torch.ones_like(b) if torch.distributed.get_rank() == 0 else None
        optimizer.step()
    return whole(a.detach())


def step_whole(compile: bool, steps: int) -> Found:
    """One process, plain tensors."""
    params = [nn.Parameter(w) for w in weights()]
    optimizer = Lamb16(grouped(params), **HYPER, compile=compile)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(i, step)
        optimizer.max_grad_norm = clip_at(step)
        optimizer.step()
    return found(params, optimizer)


def clip_at(step: int) -> float | None:
    """Every second step clips."""
    return None if step % 2 else 1.0


def sharder(placement: str) -> Callable[[Tensor], DTensor]:
    """Spreads whole tensors, which every rank has, over the ranks."""
    sizes, dims = PLACEMENTS[placement]
    mesh = init_device_mesh("cpu", sizes)
    return lambda tensor: distribute_tensor(tensor, mesh, placements_of(tensor.shape, dims), src_data_rank=None)


def step_sharded(placement: str, compile: bool, steps: int) -> tuple[Found, dict[str, int]]:
    """The same on a mesh; returns the gathered tensors, and what this rank had."""
    shard = sharder(placement)
    params = [nn.Parameter(shard(w)) for w in weights()]
    optimizer = Lamb16(grouped(params), **HYPER, compile=compile)
    collectives, sent = [], []
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = shard(gradient(i, step))
        optimizer.max_grad_norm = clip_at(step)
        with Collectives() as seen:
            optimizer.step()
        collectives.append(seen.count)
        sent.append(seen.bytes)
    local = [p.to_local() for p in params]
    assert [optimizer.state[p]["exp_avg_codes"].to_local().shape for p in params] == [x.shape for x in local]
    had = {
        "elements": sum(x.numel() for x in local),
        "bytes": sum(optimizer.state[p][key].to_local().untyped_storage().nbytes() for p in params for key in CODES),
        "collectives": collectives,
        "sent": sent,
        "skipped": optimizer.skipped,
    }
    return found(params, optimizer), had


class Collectives:
    """Counts the calls of all_reduce, and the bytes that they reduce."""

    def __enter__(self) -> Collectives:
        self.count, self.bytes, self.original = 0, 0, torch.distributed.all_reduce

        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return self.original(tensor, *args, **kwargs)

        torch.distributed.all_reduce = counting
        return self

    def __exit__(self, *_: object) -> None:
        torch.distributed.all_reduce = self.original


def found(params: Sequence[Tensor], optimizer: Lamb16) -> Found:
    """Weights and states, whole on every rank, as bytes."""
    entries: Found = {}
    for i, p in enumerate(params):
        entries[f"{i}.weight"] = whole(p.detach())
        for key, value in optimizer.state.get(p, {}).items():
            entries[f"{i}.{key}"] = whole(largest(value) if key in MAXIMA and isinstance(p, DTensor) else value)
    return entries


def largest(value: Tensor) -> Tensor:
    """Of what every rank has: its own part's largest moment."""
    value = value.clone()
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value


def whole(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, gathered; gloo does not know fp8."""
    if isinstance(tensor, DTensor):
        if tensor.element_size() == 1:
            tensor = like(tensor, tensor.to_local().view(torch.uint8))
        tensor = remainder.as_bytes(tensor)
        tensor = tensor.full_tensor()
    return tensor.detach().contiguous().view(-1).view(torch.uint8).clone()


def adamw_state() -> dict[str, Any]:
    """Weights and AdamW's state after two steps."""
    params = [nn.Parameter(w) for w in weights()]
    optimizer = torch.optim.AdamW(params, lr=0.01)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = gradient(i, step)
        optimizer.step()
    return {"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}


def convert_sharded(placement: str) -> tuple[Found, str]:
    """AdamW's sharded state in Lamb16, gathered; and what each rank says where one rank's part is damaged."""
    shard, state = sharder(placement), adamw_state()
    params = [nn.Parameter(shard(w)) for w in state["weights"]]
    optimizer = Lamb16(params, compile=False)
    saved = state["optimizer"]
    for own in saved["state"].values():
        own.update({key: shard(own[key]) for key in ("exp_avg", "exp_avg_sq")})
    optimizer.load_state_dict(saved)
    states = {f"{i}.{key}": x for i, p in enumerate(params) for key, x in optimizer.state[p].items()}
    found = {key: whole(x) for key, x in states.items() if not key.endswith("max")}
    if torch.distributed.get_rank() == 0:
        saved["state"][2]["exp_avg"].to_local()[0, 0] = torch.nan
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        return found, str(error)
    return found, "nothing"
