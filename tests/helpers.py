"""Small models, gradients, snapshots and the walk along the slow reference that the tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from bits import assert_same_bits, difference, raw
from lamb16 import capi, reference
from lamb16.entries import SCALARS
from lamb16.remainder import REMAINDER

DEVICE = torch.device(os.environ.get("LAMB16_TEST_DEVICE", "cpu"))  # of Lamb16; the reference runs on the CPU

# One thread in the tests and in the processes that they start: several would wait for each other for most of the time
# where as many tests run as there are cores. Those that more threads matter to set them.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A packed row, rows of 1,024 and packed ones, rows of 1,024 only.
SHAPES = ((7, 3), (2100,), (64, 48))
CODES = ("exp_avg_codes", "exp_avg_sq_codes")
HYPER_NAMES = [field.name for field in fields(reference.Hyper)]


def missing(names: Iterable[str], *left_out: str) -> set[str]:
    """The hyperparameters that are neither among these names nor left out on purpose."""
    return set(HYPER_NAMES) - set(names) - set(left_out)


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Normal random weights, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]
    return [nn.Parameter(w.to(DEVICE, dtype)) for w in start]


def edited_c_source(folder: Path, old: str, new: str) -> Path:
    """A copy of the C reference with one thing changed, for negative controls."""
    source = capi.sources()[0].read_text()
    assert source.count(old) == 1, f"{old!r} is not in the C source once"
    path = folder / "lamb16.c"
    path.write_text(source.replace(old, new))
    return path


def model(seed: int = 0) -> nn.Module:
    """A small network whose parameters have names."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 3)).to(DEVICE)


def gradients(params: Sequence[Tensor], t: int) -> list[Tensor]:
    """The gradients of step ``t``, contiguous, of the parameters' shapes and dtypes."""
    generator = torch.Generator().manual_seed(1000 + t)
    return [(torch.randn(p.shape, generator=generator, dtype=torch.float32) * 0.1).to(p) for p in params]


def all_params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_steps(optimizer: torch.optim.Optimizer, steps: Sequence[int] | range) -> None:
    """One step for each number with the gradients of that number, on all parameters."""
    params = all_params(optimizer)
    for t in steps:
        step_with(optimizer, gradients(params, t))


def step_with(optimizer: torch.optim.Optimizer, grads: Sequence[Tensor | None]) -> None:
    """One step with these gradients of all parameters, moved to where they are; None for no gradient."""
    for p, grad in zip(all_params(optimizer), grads, strict=True):
        p.grad = grad if grad is None or grad.device == p.device else grad.to(p.device)
    optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The bytes of all weights and states, and the groups' hyperparameters."""
    found: dict[str, Any] = {}
    for i, p in enumerate(all_params(optimizer)):
        found[f"{i}.weight"] = raw(p)
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{i}.{key}"] = raw(value)
    for k, group in enumerate(optimizer.param_groups):
        found[f"group {k}"] = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name in HYPER_NAMES
        }
    return found


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The entries of two snapshots that are not the same bits."""

    def same(x: Any, y: Any) -> bool:
        return not difference(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)

    return sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or not same(a[key], b[key]))


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a
    assert differing(a, b) == [], how(a, b)


def how(a: dict[str, Any], b: dict[str, Any]) -> str:
    """How the entries of two snapshots differ."""
    both = {key: (a.get(key), b.get(key)) for key in differing(a, b)}
    lines = [
        f"{key}: {difference(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else f'{x} against {y}'}"
        for key, (x, y) in both.items()
    ]
    return "\n".join(lines)


def hyper_of(group: dict[str, Any]) -> reference.Hyper:
    """The reference's hyperparameters for a parameter group."""
    values = {name: group[name] for name in HYPER_NAMES}
    return reference.Hyper(**values | {"lr": float(values["lr"])})


def follow(
    start: Tensor, grads: Sequence[Tensor], hyper: reference.Hyper | Sequence[reference.Hyper], salt: int
) -> tuple[Tensor, reference.State]:
    """Weights and state after the reference's steps; one ``hyper`` for all of them or one each."""
    hypers = [hyper] * len(grads) if isinstance(hyper, reference.Hyper) else hyper
    state = reference.init(start.cpu(), salt & 0xFFFFFFFF, hypers[0].moment_dtype, hypers[0].param_rounding)
    p = start.cpu().clone(memory_format=torch.contiguous_format)
    for grad, h in zip(grads, hypers, strict=True):
        p, state, _ = reference.step(p, grad.cpu(), state, h)
    return p, state


def assert_follows_reference(
    optimizer: torch.optim.Optimizer, hypers: Sequence[reference.Hyper] | None = None, steps: int = 3
) -> None:
    """Take steps on all parameters and hold weights and states to the reference's bits.

    ``hypers``, one per parameter, is what the optimizer is expected to use; else what its groups say.
    """
    params = all_params(optimizer)
    if hypers is None:
        hypers = [hyper_of(group) for group in optimizer.param_groups for _ in group["params"]]
    start = [p.detach().clone() for p in params]
    take_steps(optimizer, range(steps))
    for i, p in enumerate(params):
        grads = [gradients(params, t)[i] for t in range(steps)]
        weights, state = follow(start[i], grads, hypers[i], int(optimizer.state[p]["salt"]))
        assert_matches(optimizer, p, weights, state)


def assert_matches(optimizer: torch.optim.Optimizer, p: Tensor, weights: Tensor, state: reference.State) -> None:
    """Hold one parameter and its state to the reference's bits."""
    mine = optimizer.state[p]
    assert_same_bits(raw(p), raw(weights), "bytes of the weights")
    for key in CODES:
        assert_same_bits(raw(mine[key]), raw(getattr(state, key)), f"bytes of {key}")
    assert (REMAINDER in mine) == (state.param_remainder is not None)
    if state.param_remainder is not None:
        assert_same_bits(mine[REMAINDER], state.param_remainder, REMAINDER)
    for key in set(SCALARS) - {"salt"}:
        assert mine[key].item() == getattr(state, key), key


# One of every kind, for an optimizer of lr 0.01.
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.7**epoch),
    "LambdaLR to zero": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: max(0.0, 1 - epoch / 3)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.05, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


def change_manifest(folder: Path, *keys: str | int, value: object) -> None:
    """Set one entry of an exported step's manifest."""
    path = folder / "manifest.json"
    content = at = json.loads(path.read_text())
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(content))
