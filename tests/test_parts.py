"""Steps of sets of parameters that come for the first time: parts of plans that are there."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bits import assert_same_bits, raw
from helpers import DEVICE, gradients, parameters
from lamb16 import Lamb16
from lamb16.entries import MOMENTS, SCALARS
from lamb16.remainder import REMAINDER
from lamb16.step.parts import Part
from lamb16.step.remembered import Remembered

SHAPES = [(7, 3), (2100,), (3, 1024), (5, 5, 41), (), (1024,), (0,), (2049,), (64, 64), *[(17,)] * 70]
BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
# On CUDA one call steps sixteen tensors, so `divisible` finds no parts: a set that is new gets plans, with these bits.
PARTS = DEVICE.type == "cpu"


def is_part(optimizer: Lamb16) -> bool:
    return all(isinstance(plan, Part) for plan in optimizer._stepper.last)


def step(optimizer: Lamb16, t: int, chosen: set[int] | None = None, bad: int = -1) -> None:
    """Step the parameters at these positions, all by default; the gradient of one (``bad``) has a NaN."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for k, (p, g) in enumerate(zip(params, gradients(params, t), strict=True)):
        p.grad = g if chosen is None or k in chosen else None
        if k == bad:
            g.view(-1)[:1] = float("nan")
    optimizer.step()


def everything(optimizer: Lamb16) -> list[Tensor]:
    """Weights, states and what can be read of a step, as bits."""
    found = [p.detach() for p in optimizer.state]
    found += [raw(state[key]) for state in optimizer.state.values() for key in sorted(state)]
    found += [x for stats in optimizer.layer_stats().values() for x in stats.values()]
    found.append(torch.tensor(optimizer.skipped))
    return found if optimizer.grad_norm is None else [*found, optimizer.grad_norm]


def trained(sets: list[set[int] | None], parts: bool, **options: Any) -> Lamb16:
    params = parameters(SHAPES, torch.bfloat16 if "param_rounding" in options else torch.float32)
    optimizer = Lamb16([(str(k), p) for k, p in enumerate(params)], **BASE | options)
    seen = []
    with mock.patch.object(Remembered, "part", Remembered.part if parts else lambda *_: None):
        for t, chosen in enumerate(sets):
            step(optimizer, t, chosen, bad=t % 5)
            seen.append(is_part(optimizer))
    assert any(seen) == (parts and PARTS)
    return optimizer


@pytest.mark.parametrize("compile_mode", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5},
        {"caution": True},
        {"moment_dtype": "float32"},
        {"param_rounding": "exact", "max_grad_norm": 0.5},
    ],
    ids=str,
)
def test_a_part_has_the_bits_of_plans_of_its_own(options: dict[str, Any], compile_mode: bool) -> None:
    rng = random.Random(0)
    sets = [None if t in (0, 4) else {k for k in range(len(SHAPES)) if rng.random() < 0.5} for t in range(8)]
    with_parts, without = (trained(sets, x, compile=compile_mode, **options) for x in (True, False))
    assert with_parts.layer_stats().keys() == without.layer_stats().keys()
    for x, y in zip(everything(with_parts), everything(without), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not PARTS, reason="plans have parts on the CPU only: on CUDA one call steps many tensors")
def test_a_set_that_comes_again_has_plans_of_its_own() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    kinds = []
    for t, chosen in enumerate([None, {0, 1}, {1, 2}, {0, 1}, {1, 2}, None, {0, 1}]):
        step(optimizer, t, chosen)
        kinds.append(is_part(optimizer))
    assert kinds == [False, True, True, False, False, False, False]


def test_what_has_no_gradient_is_not_written_to() -> None:
    optimizer = Lamb16(parameters(dtype=torch.bfloat16), **BASE, param_rounding="exact", compile=False)
    step(optimizer, 0)
    left_out = [p for k, p in enumerate(optimizer.param_groups[0]["params"]) if k != 1]
    moments = [optimizer.state[p][key] for p in left_out for key in (*MOMENTS, REMAINDER)]
    scalars = [optimizer.state[p][key] for p in left_out for key in SCALARS]
    before = [raw(x) for x in (*left_out, *moments, *scalars)]
    versions = [x._version for x in (*left_out, *moments)]
    step(optimizer, 1, {1})
    assert is_part(optimizer) == PARTS
    for x, y in zip((*left_out, *moments, *scalars), before, strict=True):
        assert_same_bits(raw(x), y)
    assert [x._version for x in (*left_out, *moments)] == versions


def test_a_parameter_in_another_group_is_in_no_part() -> None:
    params = parameters()
    optimizer = Lamb16([{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.5}], compile=False)
    step(optimizer, 0)
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())
    before = params[1].detach().clone()
    step(optimizer, 1, {1})
    assert not is_part(optimizer)
    assert (params[1] - before).abs().max() > 0.02  # as the rate of the second group has it


def test_replaced_states_are_seen_in_parts() -> None:
    first, second = (Lamb16(parameters(), **BASE, compile=False) for _ in range(2))
    for optimizer in (first, second):
        step(optimizer, 0)
    for state in first.state.values():
        state["exp_avg_codes"] = state["exp_avg_codes"].clone()
    p = first.param_groups[0]["params"][1]
    first.state[p] = {key: value.clone() for key, value in first.state[p].items()}
    for t, chosen in enumerate([{0, 1}, {1, 2}, {1}, {0, 2}, None], 1):
        for optimizer in (first, second):
            step(optimizer, t, chosen)
    assert all(torch.equal(x, y) for x, y in zip(everything(first), everything(second), strict=True))


def test_remainders_that_are_missing_or_replaced_are_seen_in_parts() -> None:
    first, second = (
        Lamb16(parameters(dtype=torch.bfloat16), **BASE, param_rounding="exact", compile=False) for _ in range(2)
    )
    for optimizer in (first, second):
        step(optimizer, 0)
    missing, replaced, _ = first.state.values()
    zeroed = next(iter(second.state.values()))
    assert zeroed[REMAINDER].any()
    del missing[REMAINDER]
    zeroed[REMAINDER].zero_()
    replaced[REMAINDER] = replaced[REMAINDER].clone()
    for t, chosen in enumerate([{0, 1}, {0}, None], 1):
        for optimizer in (first, second):
            step(optimizer, t, chosen)
            assert is_part(optimizer) == (PARTS and chosen is not None)
    assert all(torch.equal(x, y) for x, y in zip(everything(first), everything(second), strict=True))


def test_another_rounding_is_no_part() -> None:
    optimizer = Lamb16(parameters(dtype=torch.bfloat16), **BASE, param_rounding="exact", compile=False)
    step(optimizer, 0)
    group = optimizer.param_groups[0]
    group["param_rounding"] = "stochastic"
    step(optimizer, 1, {0, 1})
    assert not is_part(optimizer)
    assert [REMAINDER in optimizer.state[p] for p in group["params"]] == [False, False, True]
