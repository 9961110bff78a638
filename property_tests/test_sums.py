"""Sums are integers: no order, split or number of threads shows; clipping is torch's, with an exact norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bits import assert_same_bits, same_bits
from compare import DEVICE, make, run
from helpers import step_with
from lamb16 import Lamb16, entries, reference
from lamb16.step import floats
from strategies import GRADIENTS, Case, cases, gradient, shape_lists

FINITE = [kind for kind in GRADIENTS if kind not in ("inf", "nan")]


def values(numel: int, exponent: int, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent


@given(numel=st.integers(0, 5000), exponent=st.integers(-12, 4), seed=st.integers(0, 2**20), floor=st.integers(-16, 0))
def test_a_sum_does_not_depend_on_order_or_split(numel: int, exponent: int, seed: int, floor: int) -> None:
    x = values(numel, exponent, seed)
    whole = reference.clamped_sum(x, 10.0**floor)
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
    parts = torch.tensor_split(x[order], [numel // 3, numel // 2])
    assert sum(reference.clamped_sum(part, 10.0**floor) for part in parts) == whole
    units = floats.units(x * x, torch.tensor(10.0**floor, dtype=torch.float32)) - floats.EIGHT_BITS
    assert int(units[order].sum(dtype=torch.int64)) == whole


@given(numel=st.integers(0, 3000), exponent=st.integers(-3, 2), seed=st.integers(0, 2**20))
def test_the_first_sum_of_weights_is_the_references(numel: int, exponent: int, seed: int) -> None:
    x = values(numel, exponent, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "CHUNK", 1000)
        assert int(entries.weight_sum(x.to(DEVICE))) == reference.init(x, 0).weight_sum


def test_float_sums_do_depend_on_the_order() -> None:
    """Negative control."""
    x = values(3000, 0, 0)
    assert float((x * x).sum()) != float((x * x)[torch.randperm(3000)].sum()) or float(x.sum()) != float(
        x.flip(0).sum()
    )


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_stays_alone(compile: bool, bad: float) -> None:
    """It counts as 1, and neither the tensor's other weights nor other tensors see it."""
    case = Case([(5,), (2100,)], {"lr": 0.01, "weight_decay": 0.1}, kinds=[["normal", "normal"]] * 3)
    params, optimizer = make(case, compile)
    for p in params:
        p.data.view(-1)[2] = bad
    clean, others = make(case, compile)
    for p in clean:
        p.data.view(-1)[2] = 1.0  # counts as 1 too
    for step in range(2):
        for group in (params, clean):
            for p, grad in zip(group, case.gradients(step, case.weights()), strict=True):
                p.grad = grad.to(DEVICE)
                p.grad.view(-1)[2] = 0.0
        optimizer.step()
        others.step()
        for p, q in zip(params, clean, strict=True):
            same = torch.arange(p.numel(), device=p.device) != 2
            if step == 0:
                assert_same_bits(p.detach()[same], q.detach()[same])
            assert torch.isfinite(p[same]).all()
            assert not torch.isfinite(p[2])
            assert 0 <= optimizer.state[p]["weight_sum"] <= p.numel() << 20
            assert 0 <= optimizer.state[p]["update_sum"] <= p.numel() << 20


# -- clipping ----------------------------------------------------------------------------------------------------


def clipped(case: Case, max_norm: float, compile: bool) -> tuple[list[torch.nn.Parameter], Lamb16]:
    params, optimizer = make(case, compile)
    optimizer.max_grad_norm = max_norm
    return params, optimizer


@given(case=cases(kinds=[*GRADIENTS], max_steps=3), max_norm=st.sampled_from([1e-3, 0.5, 1.0, 100.0, math.inf]))
def test_a_clipped_step_is_the_references(compile: bool, case: Case, max_norm: float) -> None:
    """The norm and the bits, also with tensors whose gradients are not finite."""
    params, optimizer = clipped(case, max_norm, compile)
    hyper = reference.Hyper(**case.hyper, **case.words)
    weights = case.weights()
    states: list[reference.State | None] = [None] * len(params)
    for step in range(len(case.kinds)):
        grads = case.gradients(step, weights)
        step_with(optimizer, [None if grad is None else grad.clone() for grad in grads])
        norm = reference.grad_norm([g for g in grads if g is not None])
        if any(g is not None for g in grads):
            assert optimizer.grad_norm.item() == norm
        factor = reference.clip_factor(norm, max_norm)
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            salt = optimizer._parameters.salt(optimizer.param_groups[0], i)  # decay alone changes the state's
            state = states[i] or reference.init(weights[i], salt, **case.words)
            weights[i], states[i], _ = reference.step(weights[i], grad, state, hyper, factor)
            assert_same_bits(p, weights[i], f"step {step}, tensor {i}: weights")
            assert_same_bits(p.grad, grad, "the gradients before and after the step")


@given(
    shapes=shape_lists,
    kinds=st.lists(st.sampled_from(FINITE), min_size=5, max_size=5),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**20),
)
def test_the_norm_is_torchs(shapes, kinds, exponent: int, seed: int) -> None:
    """Within rounding of ``clip_grad_norm_``'s, which is a float32 sum; here against float64."""
    generator = torch.Generator().manual_seed(seed)
    grads = [gradient(k, torch.empty(s), exponent, generator) for s, k in zip(shapes, kinds, strict=False)]
    norm = reference.grad_norm(grads)
    exact = torch.cat([g.reshape(-1).double() for g in grads]).norm().item()
    assert norm == pytest.approx(exact, rel=1e-5, abs=1e-44)


def test_clipping_equals_clipping_before_the_step(compile: bool) -> None:
    case = Case(
        [(2049,), (70, 3)], {"lr": 0.01, "weight_decay": 0.1}, moment_dtype="float32", kinds=[["normal"] * 2] * 4
    )
    inside, optimizer = clipped(case, 0.7, compile)
    before, plain = make(case, compile)
    untouched, _ = run(case, compile)
    for step in range(4):
        for params in (inside, before):
            for p, grad in zip(params, case.gradients(step, case.weights()), strict=True):
                p.grad = grad.to(DEVICE)
        total = torch.nn.utils.clip_grad_norm_(before, 0.7)
        optimizer.step()
        plain.step()
        assert optimizer.grad_norm.item() == pytest.approx(total.item(), rel=1e-5)
    for p, q, other in zip(inside, before, untouched, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
        state, expected = optimizer.state[p], plain.state[q]
        assert torch.allclose(state["exp_avg_codes"], expected["exp_avg_codes"], rtol=1e-4, atol=1e-7)
        assert not torch.allclose(state["exp_avg_codes"], torch.zeros(()), atol=1e-5)
        assert not same_bits(p, other), "control: without clipping the weights are others"


def test_the_norm_is_the_same_in_any_order_and_split() -> None:
    grads = [values(3000, k - 2, k) for k in range(4)]
    cut = [part for g in grads for part in torch.tensor_split(g.flip(0), 7)]
    assert reference.grad_norm(grads) == reference.grad_norm(cut[::-1])
