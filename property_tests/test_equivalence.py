"""The step, eager and compiled, agrees with the slow reference bit for bit: weights, codes, scales, counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bits import assert_same_bits
from compare import DEVICE, assert_same_state, make, patched, run, run_beside_reference
from helpers import step_with
from lamb16 import reference
from lamb16.entries import MOMENTS, SCALARS
from lamb16.reference import Hyper, State
from lamb16.step.fp8 import wrapped
from strategies import LAST_STEP, Case, cases

CONTROL = Case(
    shapes=[(2049,), (70, 3)],
    hyper={"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.999), "caution": True},
    kinds=[["normal", "normal"]] * 4,
    exponent=-2,
    weight_exponent=-1,
)


@given(case=cases())
def test_step_equals_reference(compile: bool, case: Case) -> None:
    run_beside_reference(case, compile)


def final(case: Case, compile: bool) -> list[torch.Tensor]:
    """Weights and all state tensors at the end of a run."""
    params, optimizer = run(case, compile)
    states = [optimizer.state[p][name] for p in params if p in optimizer.state for name in optimizer.state[p]]
    return [*params, *(x.view(torch.uint8) if x.element_size() == 1 else x for x in states)]


def assert_same_run(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(x, y, f"tensors {i} of both runs")


@given(case=cases(max_steps=4))
def test_eager_equals_compiled(case: Case) -> None:
    """Also with gradients that no reference is asked about: the two forms leave the same bits."""
    assert_same_run(final(case, compile=False), final(case, compile=True))


@given(case=cases(kinds=["normal", "lognormal", "sparse"], max_steps=3), threads=st.integers(1, 3))
def test_the_number_of_threads_does_not_show(compile: bool, case: Case, threads: int) -> None:
    before = torch.get_num_threads()
    expected = final(case, compile)
    torch.set_num_threads(threads)
    try:
        assert_same_run(final(case, compile), expected)
    finally:
        torch.set_num_threads(before)


@given(case=cases(kinds=["normal", "lognormal", "sparse"]))
def test_determinism(compile: bool, case: Case) -> None:
    """The same run gives the same bits, and no random generator is touched."""
    before = torch.get_rng_state()
    assert_same_run(final(case, compile), final(case, compile))
    assert torch.equal(before, torch.get_rng_state())


@given(case=cases(kinds=["normal", "lognormal", "outliers", "sparse"], dtypes=(torch.float32,)))
def test_reference_equality_with_flush_to_zero(compile: bool, flush_denormal: None, case: Case) -> None:
    """fp8 subnormals survive flush-to-zero: no float32 subnormal stands for one."""
    run_beside_reference(case, compile)


@given(case=cases(kinds=["normal", "lognormal", "sparse"], dtypes=(torch.float32,), moment_dtypes=("float8",)))
def test_flush_to_zero_changes_nothing(compile: bool, flush_denormal: None, case: Case) -> None:
    """The same bits with flush-to-zero on and off, as long as the gradients' squares are normal numbers."""
    case = replace(case, exponent=max(case.exponent, -6))
    with_flush = final(case, compile)
    torch.set_flush_denormal(False)
    without = final(case, compile)
    torch.set_flush_denormal(True)
    assert_same_run(with_flush, without)


def test_the_control_case_passes(compile: bool) -> None:
    run_beside_reference(CONTROL, compile)


def _other_beta2(p, grad, state, h):
    return reference.step(p, grad, state, replace(h, betas=(h.betas[0], h.betas[1] - 1e-5)))


def _no_weight_decay(p, grad, state, h):
    return reference.step(p, grad, state, replace(h, weight_decay=0.0))


def _other_salt(p, grad, state, h):
    p, new, stats = reference.step(p, grad, replace(state, salt=state.salt ^ 1), h)
    return p, replace(new, salt=state.salt), stats


def _words_stand_still(p, grad, state, h):
    p, new, stats = reference.step(p, grad, replace(state, step=0), h)
    return p, replace(new, step=state.step + 1), stats


def _ulp(p, grad, state, h):
    p, new, stats = reference.step(p, grad, state, h)
    return torch.nextafter(p, torch.tensor(torch.inf)), new, stats


def _other_weight_floor(p, grad, state, h):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "WEIGHT_FLOOR", h.eps)
        return reference.step(p, grad, state, h)


def _no_nesterov(p, grad, state, h):
    return reference.step(p, grad, state, replace(h, nesterov=False))


def _norms_of_this_step(p, grad, state, h):
    weight_sum = reference.clamped_sum(p.float() * 1.01, reference.WEIGHT_FLOOR)
    return reference.step(p, grad, replace(state, weight_sum=weight_sum), h)


def _first_norm_stays(p, grad, state, h):
    return reference.step(p, grad, replace(state, update_sum=p.numel() << 20), h)


def _scale_from_the_maximum(p, grad, state, h):
    """Of one moment that is known to be smaller than its bound: half the scale, and codes for it."""
    p, new, stats = reference.step(p, grad, state, h)
    return p, replace(new, exp_avg_scale=new.exp_avg_scale / 2), stats


def _bound_from_the_scale(p, grad, state, h):
    return reference.step(p, grad, replace(state, exp_avg_max=state.exp_avg_scale * 448), h)


def _truncated(original):
    def clamped_sum(x, floor):
        return int(((x * x).clamp(reference.f32(floor), 1.0).double() * 2**20).floor().sum())

    return clamped_sum


def _share_of_this_step(p, grad, state, h):
    return reference.step(p, grad, replace(state, mask_count=p.numel()), h)


def _no_caution(p, grad, state, h):
    return reference.step(p, grad, state, replace(h, caution=False))


WRONG = [
    _other_beta2, _no_weight_decay, _other_salt, _words_stand_still, _other_weight_floor, _ulp, _no_nesterov,
    _norms_of_this_step, _first_norm_stays, _scale_from_the_maximum, _bound_from_the_scale,
    patched("clamped_sum", _truncated), _share_of_this_step, _no_caution,
]  # fmt: skip


def _count_wraps(p, grad, state, h):
    p, new, stats = reference.step(p, grad, state, h)
    return p, replace(new, step=wrapped(state.step + 1)), stats


def _words_repeat_at_the_end(p, grad, state, h):
    p, new, stats = reference.step(p, grad, state, h)
    return p, replace(new, salt=state.salt), stats


def _words_go_on_at_the_end(p, grad, state, h):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "LAST_STEP", 2**31)
        p, new, stats = reference.step(p, grad, state, h)
    ends = new.step >= LAST_STEP
    return p, replace(new, step=min(new.step, LAST_STEP), salt=(state.salt + ends) % 2**32), stats


@pytest.mark.parametrize("wrong", [_count_wraps, _words_repeat_at_the_end, _words_go_on_at_the_end])
def test_a_wrong_end_of_the_count_fails(compile: bool, wrong) -> None:
    """The count of steps stays at its end, and what comes of it is finite; the salt goes on."""
    case = replace(CONTROL, counts={"step": LAST_STEP - 1, "salt": 2**32 - 1})
    run_beside_reference(case, compile)
    params, optimizer = run(case, compile)
    assert all(torch.isfinite(p).all() for p in params)
    assert [[int(s["step"]), int(s["salt"])] for s in optimizer.state.values()] == [[LAST_STEP, 2]] * 2
    with pytest.raises(AssertionError, match="differ"):
        run_beside_reference(case, compile, rule=wrong)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_fails(compile: bool, wrong) -> None:
    """Negative control: each of these must not pass the comparison above."""
    with pytest.raises(AssertionError, match="differ"):
        run_beside_reference(CONTROL, compile, rule=wrong)


def test_the_bound_is_exercised(compile: bool) -> None:
    """Sixty steps of growing gradients reach C, where the reference without it would differ."""
    case = Case([(300,), (2049,)], {"lr": 0.01, "weight_decay": 0.1}, kinds=[["growing", "growing"]] * 60, exponent=-3)
    run_beside_reference(case, compile)

    def unbounded(p, grad, state, h):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "inverse_bound", lambda *_: 0.0)
            return reference.step(p, grad, state, h)

    with pytest.raises(AssertionError, match="weights differ"):
        run_beside_reference(case, compile, rule=unbounded)


@pytest.mark.parametrize(
    ("moment_dtype", "key", "damage"),
    [
        ("float32", "exp_avg_codes", math.nan),
        ("float32", "exp_avg_sq_codes", math.nan),
        ("float32", "exp_avg_sq_codes", math.inf),
        ("float8", "exp_avg_scale", 2.0**121),  # the largest code, 208 and more, then decodes to infinity
    ],
)
def test_a_damaged_moment_is_skipped(compile: bool, moment_dtype: str, key: str, damage: float) -> None:
    """No step leaves such a state; a checkpoint may hold it."""
    case = Case([(5,)], {"lr": 0.1}, kinds=[["normal"]] * 2, moment_dtype=moment_dtype)
    params, optimizer = make(case, compile)
    params[0].grad = case.gradients(0, case.weights())[0].to(DEVICE)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0][key].fill_(damage)
    optimizer.load_state_dict(saved)
    mine = optimizer.state[params[0]]
    codes = {name: mine[name].cpu().clone() for name in MOMENTS}
    codes = codes if moment_dtype == "float32" else {name: x.view(torch.uint8) for name, x in codes.items()}
    state = State(**codes, **{name: mine[name].item() for name in SCALARS})
    before = params[0].detach().cpu().clone()
    hyper = Hyper(**case.hyper, moment_dtype=moment_dtype)
    assert reference.step(before, params[0].grad.cpu(), state, hyper)[2].skipped
    optimizer.step()
    assert optimizer.skipped == 1
    assert_same_bits(params[0], before)
    if moment_dtype == "float32":  # codes that decode to infinity are not encoded back to themselves
        if DEVICE.type == "cuda":  # whose arithmetic has one NaN, 0x7fffffff, whatever it is given
            found = {name: mine[name].cpu() for name in MOMENTS}
            mine = mine | {name: torch.where(x.isnan(), torch.nan, x) for name, x in found.items()}
        assert_same_state("damaged", params[0], mine, before, state)


def test_skipping_is_exercised(compile: bool) -> None:
    case = Case([(2049,), (5,)], {"lr": 0.1, "weight_decay": 0.1}, kinds=[["normal", "inf"], ["nan", "normal"]])
    assert run_beside_reference(case, compile) == 2
    params, optimizer = make(case, compile)
    before = [p.detach().clone() for p in params]
    step_with(optimizer, case.gradients(0, before))
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
