"""State size, dtypes, and what holds for stored moments whatever the gradients were."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compare import DEVICE, make, run
from helpers import step_with
from lamb16 import Lamb16
from lamb16.entries import ENTRIES
from lamb16.reference import E4M3_MAX, E5M2_MAX, f32
from lamb16.remainder import REMAINDER
from strategies import GRADIENTS, Case, cases, shape_lists

SCALAR_BYTES = 56  # per tensor: four float32, two int32, four int64


def _storages(optimizer: Lamb16) -> dict[int, int]:
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}


@given(shapes=shape_lists)
def test_state_is_two_bytes_per_parameter(compile: bool, shapes) -> None:
    """As tensors and as allocated memory: 2 bytes per parameter, 48 per tensor, and one row of padding of 48."""
    case = Case(shapes, {"lr": 0.1, "weight_decay": 0.1}, kinds=[["normal"] * len(shapes)] * 2)
    params, optimizer = run(case, compile)
    numel = sum(p.numel() for p in params)
    assert set(optimizer.state) == set(params)
    each = 4 if case.dtype == torch.bfloat16 and case.param_rounding == "exact" else 2
    logical = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())
    assert logical == each * numel + SCALAR_BYTES * len(params)
    assert sum(_storages(optimizer).values()) == each * numel + SCALAR_BYTES * (len(params) + 1)


@given(case=cases(moment_dtypes=("float8",)))
def test_dtypes_and_shapes(compile: bool, case: Case) -> None:
    params, optimizer = run(case, compile)
    for p in params:
        if p not in optimizer.state:
            continue
        state = optimizer.state[p]
        exact = case.dtype == torch.bfloat16 and case.param_rounding == "exact"
        assert set(state) == {*ENTRIES, REMAINDER} if exact else set(ENTRIES)
        assert not exact or (state[REMAINDER].dtype, state[REMAINDER].shape) == (torch.int16, p.shape)
        assert p.dtype == case.dtype
        assert (state["exp_avg_codes"].dtype, state["exp_avg_sq_codes"].dtype) == (
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
        assert state["exp_avg_codes"].shape == state["exp_avg_sq_codes"].shape == p.shape
        assert state["step"].dtype == state["salt"].dtype == torch.int32
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            assert state[name].dtype == torch.float32
            assert state[name].shape == ()
            assert math.frexp(state[name].item())[0] == 0.5, "a scale is a power of two"
        assert all(type(x) is torch.Tensor for x in state.values())


@given(case=cases(kinds=["normal", "lognormal", "sparse", "outliers", "tiny", "subnormal"], moment_dtypes=("float8",)))
def test_second_moment_is_never_zero_where_it_was_positive(compile: bool, case: Case) -> None:
    """Codes are finite, and V != 0 wherever a gradient's square has ever been seen."""
    params, optimizer = make(case, compile)
    seen = [torch.zeros(p.shape, dtype=torch.bool) for p in params]
    for step in range(len(case.kinds)):
        for i, (p, grad) in enumerate(zip(params, case.gradients(step, case.weights()), strict=True)):
            p.grad = None if grad is None else grad.to(DEVICE)
            if grad is not None and torch.isfinite(grad).all():
                seen[i] |= (grad.float() ** 2) * f32(1 - case.hyper["betas"][1]) > 0
        optimizer.step()
    for p, positive in zip(params, seen, strict=True):
        if p in optimizer.state:
            v = optimizer.state[p]["exp_avg_sq_codes"].float().cpu()
            assert (v[positive] > 0).all()
            assert torch.isfinite(v).all()
            assert torch.isfinite(optimizer.state[p]["exp_avg_codes"].float()).all()


@given(case=cases(kinds=[k for k in GRADIENTS if k not in ("inf", "nan")], moment_dtypes=("float8",), max_steps=12))
def test_no_code_exceeds_the_bound_of_its_scale(compile: bool, case: Case) -> None:
    """For any history: what is encoded is at most the format's largest value, and the maximum is that of the codes."""
    params, optimizer = make(case, compile)
    for step in range(len(case.kinds)):
        before = {p: dict(optimizer.state[p]) for p in params if p in optimizer.state}
        old = {
            p: (s["exp_avg_codes"].float() * s["exp_avg_scale"], s["exp_avg_sq_codes"].float() * s["exp_avg_sq_scale"])
            for p, s in before.items()
        }
        skipped = optimizer.skipped
        step_with(optimizer, case.gradients(step, case.weights()))
        for p in params:
            if p.grad is None or not p.numel() or optimizer.skipped > skipped:
                continue
            state, g = optimizer.state[p], p.grad.float()
            beta1, beta2 = case.hyper["betas"]
            m, v = old.get(p, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = f32(beta1) * m + f32(1 - beta1) * g, f32(beta2) * v + f32(1 - beta2) * (g * g)
            assert (m.abs() / state["exp_avg_scale"]).max() <= E4M3_MAX
            assert (v / state["exp_avg_sq_scale"]).max() <= E5M2_MAX
            for name, largest in (("exp_avg", E4M3_MAX), ("exp_avg_sq", E5M2_MAX)):
                decoded = state[f"{name}_codes"].float().abs().max()
                assert decoded <= largest
                assert decoded == state[f"{name}_max"] or not (g.any() or m.any())


def test_a_scale_of_half_the_bound_is_exceeded() -> None:
    """Negative control: one binade less, and the first step with a new largest gradient overflows the codes."""
    p = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = Lamb16([p], lr=0.1, compile=False)
    p.grad = torch.tensor([448.0, 1.0, -3.0], device=DEVICE) / f32(1 - 0.9)
    optimizer.step()
    assert 448 * (1 - 1e-6) <= 448.0 / optimizer.state[p]["exp_avg_scale"] <= E4M3_MAX


def largest_ratio(p: torch.nn.Parameter, optimizer: Lamb16, grads: list[torch.Tensor]) -> list[float]:
    """The largest |u| of every step: with weight decay 0, lr 1 and weights of 0 before it, a step is p = -r·u."""
    found = []
    for grad in grads:
        p.data.zero_()
        p.grad = grad.to(DEVICE)
        optimizer.step()
        ratio = optimizer.layer_stats()["0"]["trust_ratio"].item()
        found.append((p.detach().abs().max() / ratio).item())
    return found


def bound(betas: tuple[float, float], t: int, corrected: bool, nesterov: bool) -> float:
    """C after t steps by summing Cauchy–Schwarz's terms, step by step: the code under test is not asked."""
    beta1, beta2 = betas
    c1, c2, c3 = (1 - beta1**t, 1 - beta2**t, 1 - beta1 ** (t + 1)) if corrected else (1, 1, 1)
    a, b = (beta1 / c3, (1 - beta1) / c1) if nesterov else (1 / c1, 0)
    weights = [a * (1 - beta1) * beta1**k + (b if k == 0 else 0) for k in range(2000)]
    squares = [(1 - beta2) * beta2**k / c2 for k in range(2000)]
    return math.sqrt(math.fsum(w * w / s for w, s in zip(weights, squares, strict=True) if w))


def extremal(betas: tuple[float, float], steps: int, seed: int) -> list[torch.Tensor]:
    """Gradients for which |m| = C·sqrt(v) in the limit: the equality case of Cauchy–Schwarz."""
    signs = torch.randn(300, generator=torch.Generator().manual_seed(seed)).sign()
    return [signs * 1e-3 * (betas[1] / betas[0]) ** t for t in range(steps)]


BETAS = st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.5, 0.9), (0.95, 0.9999), (0.9, 0.99), (0.0, 0.9)])


@given(
    exponents=st.lists(st.integers(-8, 8), min_size=1, max_size=40),
    betas=BETAS,
    corrected=st.booleans(),
    nesterov=st.booleans(),
    growing=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_updates_stay_below_the_bound(compile: bool, exponents, betas, corrected, nesterov, growing, seed) -> None:
    """|d| <= C holds for every update, though both moments are rounded between the steps."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(300, generator=generator) * 10.0**exponent for exponent in exponents]
    if growing and betas[0]:
        grads = extremal(betas, 60, seed)
    p = torch.nn.Parameter(torch.zeros(300, device=DEVICE))
    optimizer = Lamb16(
        [p], lr=1.0, betas=betas, eps=1e-30, bias_correction=corrected, nesterov=nesterov, compile=compile,
        trust_clip=1e9,
    )  # fmt: skip
    for t, ratio in enumerate(largest_ratio(p, optimizer, grads), 1):
        assert ratio <= bound(betas, t, corrected, nesterov) * (1 + 1e-5)


@pytest.mark.parametrize(("nesterov", "limit"), [(False, 7.2703), (True, 8.4151)])
def test_without_the_bound_updates_exceed_it(monkeypatch: pytest.MonkeyPatch, nesterov: bool, limit: float) -> None:
    """Negative control: rounding does break the inequality, so the property above can fail."""
    betas = (0.9, 0.999)
    assert bound(betas, 10**9, False, nesterov) == pytest.approx(limit, rel=1e-4)
    monkeypatch.setattr("lamb16.step.factors.inverse_bound", lambda beta1, *_: torch.zeros_like(beta1))
    p = torch.nn.Parameter(torch.zeros(300, device=DEVICE))
    optimizer = Lamb16([p], lr=1.0, eps=1e-30, bias_correction=False, nesterov=nesterov, compile=False, trust_clip=1e9)
    ratios = largest_ratio(p, optimizer, extremal(betas, 80, 0))
    assert max(ratios) > 1.03 * bound(betas, 80, False, nesterov)
