"""Steps of any set of parameters: one plan per kind serves them all."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bits import assert_same_bits, raw
from helpers import gradients, parameters
from lamb16 import Lamb16, stepping
from lamb16.entries import MOMENTS, SCALARS
from lamb16.remainder import REMAINDER
from lamb16.step.row_plan import RowPlan

SHAPES = [(7, 3), (2100,), (3, 1024), (5, 5, 41), (), (1024,), (0,), (2049,), (64, 64), *[(17,)] * 70]
BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
LOOK, RECORD = "lamb16.step.known.Known.look", "lamb16.step.compiled.Compiled.record"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for every step that looked at everything."""
    seen: list[None] = []
    original = stepping.Stepper._prepare

    def prepare(*arguments: Any) -> Any:
        seen.append(None)
        return original(*arguments)

    monkeypatch.setattr(stepping.Stepper, "_prepare", prepare)
    return seen


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


def trained(sets: list[set[int] | None], **options: Any) -> Lamb16:
    params = parameters(SHAPES, torch.bfloat16 if "param_rounding" in options else torch.float32)
    optimizer = Lamb16([(str(k), p) for k, p in enumerate(params)], **BASE | options)
    for t, chosen in enumerate(sets):
        step(optimizer, t, chosen, bad=t % 5)
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
def test_steps_of_any_set_have_the_bits_of_steps_that_look_at_everything(
    options: dict[str, Any], compile_mode: bool, prepared: list[None]
) -> None:
    """And, compiled, of what calls the generated code in place of its launches."""
    rng = random.Random(0)
    sets = [None if t in (0, 4) else {k for k in range(len(SHAPES)) if rng.random() < 0.5} for t in range(8)]
    quick = trained(sets, compile=compile_mode, **options)
    assert len(prepared) == 1
    with mock.patch(LOOK, return_value=False):
        careful = trained(sets, compile=compile_mode, **options)
    with mock.patch(RECORD, return_value=False):
        called = trained(sets, compile=compile_mode, **options)
    for other in (careful, called):
        assert quick.layer_stats().keys() == other.layer_stats().keys()
        for x, y in zip(everything(quick), everything(other), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_compiled_steps_launch_what_was_recorded() -> None:
    optimizer = trained([None])
    (plan,) = optimizer._stepper.plans.values()
    assert isinstance(plan, RowPlan)
    assert plan.program is not None


def test_a_parameter_that_comes_to_have_gradients_is_known_before(prepared: list[None]) -> None:
    """All that is trained is in the plan from the first step on; only its state is made later."""
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    for t, chosen in enumerate([{0}, {0}, {1}, {0, 1}, {1}]):
        step(optimizer, t, chosen)
    plans = set(map(id, optimizer._stepper.plans.values()))
    assert len(prepared) == 2, "at the first step, and when the second state is made"
    step(optimizer, 5)
    assert set(map(id, optimizer._stepper.plans.values())) == plans


def test_frozen_parameters_take_no_room() -> None:
    params = parameters()
    params[2].requires_grad_(False)
    optimizer = Lamb16(params, **BASE, compile=False)
    for p, g in zip(params[:2], gradients(params[:2], 0), strict=True):
        p.grad = g
    optimizer.step()
    (plan,) = optimizer._stepper.plans.values()
    assert plan.ids == list(map(id, params[:2]))
    params[2].requires_grad_(True)
    step(optimizer, 1)
    (plan,) = optimizer._stepper.plans.values()
    assert plan.ids == list(map(id, params))


def test_tensors_that_share_memory_are_refused_in_every_set() -> None:
    """Two that overlap are stepped, each by itself, and refused together, also after that."""
    memory = torch.linspace(-1, 1, 40)
    optimizer = Lamb16([nn.Parameter(memory[:30]), nn.Parameter(memory[10:])], **BASE, compile=False)
    params = optimizer.param_groups[0]["params"]
    for chosen in ([0], [1], [0], [1]):
        for k, p in enumerate(params):
            p.grad = torch.ones_like(p) if k in chosen else None
        optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()


def test_what_has_no_gradient_is_not_written_to() -> None:
    optimizer = Lamb16(parameters(dtype=torch.bfloat16), **BASE, param_rounding="exact", compile=False)
    step(optimizer, 0)
    left_out = [p for k, p in enumerate(optimizer.param_groups[0]["params"]) if k != 1]
    moments = [optimizer.state[p][key] for p in left_out for key in (*MOMENTS, REMAINDER)]
    scalars = [optimizer.state[p][key] for p in left_out for key in SCALARS]
    before = [raw(x) for x in (*left_out, *moments, *scalars)]
    versions = [x._version for x in (*left_out, *moments)]
    step(optimizer, 1, {1})
    for x, y in zip((*left_out, *moments, *scalars), before, strict=True):
        assert_same_bits(raw(x), y)
    assert [x._version for x in (*left_out, *moments)] == versions


def test_a_parameter_in_another_group_is_stepped_by_that_group() -> None:
    params = parameters()
    optimizer = Lamb16([{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.5}], compile=False)
    step(optimizer, 0)
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())
    before = params[1].detach().clone()
    step(optimizer, 1, {1})
    assert (params[1] - before).abs().max() > 0.02  # as the rate of the second group has it


def test_replaced_states_are_seen_in_other_sets() -> None:
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


def test_remainders_that_are_missing_or_replaced_are_seen_in_other_sets() -> None:
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
    assert all(torch.equal(x, y) for x, y in zip(everything(first), everything(second), strict=True))


def test_another_rounding_is_another_kind() -> None:
    optimizer = Lamb16(parameters(dtype=torch.bfloat16), **BASE, param_rounding="exact", compile=False)
    step(optimizer, 0)
    group = optimizer.param_groups[0]
    group["param_rounding"] = "stochastic"
    step(optimizer, 1, {0, 1})
    assert [REMAINDER in optimizer.state[p] for p in group["params"]] == [False, False, True]
