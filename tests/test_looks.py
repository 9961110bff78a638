"""What programs do between steps is seen by the one look, each thing by a part of it that cannot be left out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers import all_params, assert_same, gradients, parameters, snapshot
from lamb16 import Lamb16
from lamb16.step import graph_code, recording
from lamb16.step.graph_code import generated_call
from lamb16.step.kinds import Graph, Kind

BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
CPU = torch.device("cpu")


def stepped(compile: bool, steps: int = 4, **options: Any) -> Lamb16:
    """As many steps as it takes until a step looks at nothing twice."""
    dtype = torch.bfloat16 if "param_rounding" in options else torch.float32
    optimizer = Lamb16(parameters(dtype=dtype), **BASE | options, compile=compile)
    for t in range(steps):
        step(optimizer, t)
    return optimizer


def step(optimizer: Lamb16, t: int) -> None:
    params = all_params(optimizer)
    for p, g in zip(params, gradients(params, t), strict=True):
        p.grad = g
    optimizer.step()


# -- what programs do ------------------------------------------------------------------------------------------------

KEPT: list[Any] = []  # what was replaced: that steps which do not look write to memory that is there


def first(optimizer: Lamb16) -> tuple[Tensor, dict[str, Any]]:
    p = all_params(optimizer)[1]
    return p, optimizer.state[p]


def replaced_scalar(optimizer: Lamb16) -> None:
    _, state = first(optimizer)
    KEPT.append(state["update_sum"])
    state["update_sum"] = state["update_sum"] * 9


def scalar_with_other_memory(optimizer: Lamb16) -> None:
    _, state = first(optimizer)
    KEPT.append(state["step"].data)
    state["step"].data = state["step"] + 5


def replaced_moment(optimizer: Lamb16) -> None:
    _, state = first(optimizer)
    KEPT.append(state["exp_avg_codes"])
    state["exp_avg_codes"] = torch.zeros_like(state["exp_avg_codes"].view(torch.uint8)).view(torch.float8_e4m3fn)


def written_codes(optimizer: Lamb16) -> None:
    _, state = first(optimizer)
    state["exp_avg_codes"].view(torch.uint8).fill_(1)  # small: a scale that goes by what was there is too large


def moved_weights(optimizer: Lamb16) -> None:
    p, _ = first(optimizer)
    KEPT.append(p.data)
    p.data = p.data.clone()


def replaced_remainder(optimizer: Lamb16) -> None:
    _, state = first(optimizer)
    KEPT.append(state["param_remainder"])
    state["param_remainder"] = state["param_remainder"].flip(0)


def no_state(optimizer: Lamb16) -> None:
    p, state = first(optimizer)
    KEPT.append(dict(state))
    del optimizer.state[p]


def another_rounding(optimizer: Lamb16) -> None:
    optimizer.param_groups[0]["param_rounding"] = "nearest"


def nothing(_: Lamb16) -> None:
    pass


def strided_gradient(optimizer: Lamb16) -> None:
    p, _ = first(optimizer)
    assert p.grad is not None
    p.grad = torch.stack([p.grad, p.grad + 1], -1)[..., 0]


def weight_as_gradient(optimizer: Lamb16) -> None:
    """Of a parameter that is stepped before this one."""
    p, _ = first(optimizer)
    p.grad = all_params(optimizer)[2].detach().view(-1)[: p.numel()]


NOWHERE = "lamb16.step.native.look", mock.Mock(return_value=0)  # addresses
ALIKE = "lamb16.step.known.Known._alike", mock.Mock(return_value=True)
GOOD = "lamb16.step.known.are_good", mock.Mock(return_value=True)
VERSIONS = "lamb16.store._versions", lambda moments: [0] * len(moments)
KEY = "lamb16.stepping._key", mock.Mock(return_value=[1])
STATES = "lamb16.store.Store.same", mock.Mock(return_value=True)

# What is done before the gradients are there, and after that; and which part of the look sees it.
CASES: dict[str, tuple[Callable[[Lamb16], None], Callable[[Lamb16], None], tuple[str, Any], dict[str, Any]]] = {
    "a scalar is replaced": (replaced_scalar, nothing, NOWHERE, {}),
    "a scalar has other memory": (scalar_with_other_memory, nothing, NOWHERE, {}),
    "a moment is replaced": (replaced_moment, nothing, STATES, {}),
    "codes are written to": (written_codes, nothing, VERSIONS, {}),
    "weights are moved": (moved_weights, nothing, NOWHERE, {}),
    "remainders are replaced": (replaced_remainder, nothing, NOWHERE, {"param_rounding": "exact"}),
    "a group's option is changed": (another_rounding, nothing, KEY, {"param_rounding": "stochastic"}),
    "a gradient has strides": (nothing, strided_gradient, ALIKE, {}),
    "a gradient is a weight": (nothing, weight_as_gradient, GOOD, {}),
}


def after(case: str, compile: bool, *, careful: bool) -> Any:
    """What each of two more steps leaves; ``careful``: of an optimizer that takes every step for its first."""
    before, handed, _, options = CASES[case]
    optimizer, found = stepped(compile, **options), []
    for t in (5, 6):
        if careful:
            optimizer._stepper.clear()
        if t == 5:
            before(optimizer)
        params = all_params(optimizer)
        for p, g in zip(params, gradients(params, t), strict=True):
            assert p.grad is not None
            p.grad.copy_(g)
        if t == 5:
            handed(optimizer)
        optimizer.step()
        found.append(snapshot(optimizer))
    return found


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    KEPT.clear()


@pytest.mark.parametrize("case", CASES)
def test_what_is_done_between_steps_is_seen(case: str, compile_mode: bool) -> None:
    for found, expected in zip(*(after(case, compile_mode, careful=x) for x in (False, True)), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_each_part_of_the_look_is_needed(case: str) -> None:
    """The negative control: without the part that sees it, what is done makes a difference."""
    path, without = CASES[case][2]
    expected = after(case, True, careful=True)
    with mock.patch(path, without):
        found = after(case, True, careful=False)
    assert not all(map(_equal, found, expected))


def onto_a_gradient(compile: bool, *, careful: bool) -> dict[str, Any]:
    """What a step leaves before which weights move to where the gradient is of a parameter that is stepped later."""
    params = parameters([(4096,), (2048,)])
    optimizer = Lamb16(params, **BASE, compile=compile)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    for _ in range(4):
        optimizer.step()
    if careful:
        optimizer._stepper.clear()
    KEPT.append(params[1].data)
    params[1].data = params[0].grad[:2048]  # type: ignore[index]
    optimizer.step()
    return snapshot(optimizer)


def test_weights_that_move_onto_a_gradient_are_seen(compile_mode: bool) -> None:
    assert_same(onto_a_gradient(compile_mode, careful=False), onto_a_gradient(compile_mode, careful=True))


def test_weights_that_move_onto_a_gradient_are_not_seen_without_a_look() -> None:
    with mock.patch("lamb16.stepping.are_good", return_value=True):
        found = onto_a_gradient(True, careful=False)
    assert not _equal(found, onto_a_gradient(True, careful=True))


def test_weights_may_move_before_every_step(compile_mode: bool) -> None:
    """Plans and states are not looked at anew, the bits are the same, and memory that is shared is still refused."""
    moving, still = stepped(compile_mode), stepped(compile_mode)
    params = all_params(moving)
    with mock.patch("lamb16.stepping.Stepper._prepare", side_effect=AssertionError):
        for t in (5, 6):
            for p in params:
                KEPT.append(p.data)
                p.data = p.data.clone()
            step(moving, t)
            step(still, t)
            assert_same(snapshot(moving), snapshot(still))
    params[0].data = params[2].data.view(-1)[-params[0].numel() :].view_as(params[0])
    with pytest.raises(ValueError, match="memory"):
        step(moving, 7)


def test_a_state_that_is_gone_is_made_anew(compile_mode: bool) -> None:
    optimizer = stepped(compile_mode)
    no_state(optimizer)
    step(optimizer, 5)
    p, state = first(optimizer)
    assert int(state["step"]) == 1
    assert [int(optimizer.state[q]["step"]) for q in all_params(optimizer) if q is not p] == [5, 5]


# -- recording -------------------------------------------------------------------------------------------------------


def test_launches_that_do_something_else_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """One argument less far in memory: the record is found to be wrong, with one warning, and the code is called."""
    original = recording.record

    def wrong(*arguments: Any) -> Any:
        found = original(*arguments)
        for _, values in found.kernels:
            k = next(k for k in reversed(range(len(values))) if isinstance(values[k], recording.Mark))
            values[k] = values[k]._replace(offset=values[k].itemsize)
        return found

    code = graph_code.compile_once(Graph("inspect"), Kind(CPU))
    assert isinstance(code, graph_code.Code)
    assert code.launches is not None
    graph_code.warn_once.cache_clear()
    with mock.patch.object(graph_code, "record", wrong):
        assert graph_code._launches(code, Graph("inspect"), Kind(CPU)) is None
        assert graph_code._launches(code, Graph("inspect"), Kind(CPU)) is None
    assert caplog.text.count("cannot be recorded with this version of torch; it is slower") == 1
    graph_code.warn_once.cache_clear()


def test_code_that_does_more_than_launch_is_not_recorded() -> None:
    code = graph_code.compile_once(Graph("inspect"), Kind(CPU))
    assert isinstance(code, graph_code.Code)
    call = code.function if hasattr(code.function, "__func__") else generated_call(code.function)
    module = call.__func__.__globals__
    name = next(name for name in module if name.startswith("cpp_fused"))
    inputs = [3, torch.ones(3, 1024), torch.zeros(3, dtype=torch.int32)]
    assert len(recording.record(call, inputs).kernels) == 1
    for other in (torch.add, lambda *_: 0.5):
        with mock.patch.dict(module, {name: other}), pytest.raises(recording.Unrecordable):
            recording.record(call, inputs)


def test_numbers_are_computed_from_other_inputs() -> None:
    size = recording.Number.make(6, lambda inputs: inputs[0])
    found = (7 + size * 2 - 1) // 4 % 5
    assert int(found) == (7 + 12 - 1) // 4 % 5
    assert isinstance(found, recording.Number)
    assert found.of([30]) == (7 + 60 - 1) // 4 % 5


def test_nothing_is_kept_alive_by_what_is_recorded() -> None:
    optimizer = stepped(True)
    params = all_params(optimizer)
    watched = [weakref.ref(x) for p in params for x in (p.grad, optimizer.state[p]["exp_avg_codes"])]
    storages = [weakref.ref(p.untyped_storage()) for p in params]
    optimizer.state.clear()
    for p in params:
        p.grad = None
    optimizer.param_groups[0]["params"] = []
    del params, p
    gc.collect()
    assert not any(x() for x in watched)
    del storages


def _equal(found: Any, expected: Any) -> bool:
    try:
        assert_same(found, expected)
    except AssertionError:
        return False
    return True
