"""State size, dtypes, and what holds for stored moments whatever the gradients were."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compare import DEVICE, make, run
from lamb16 import Lamb16
from lamb16.reference import f32
from strategies import Case, cases, shape_lists

SCALARS = 16  # bytes a tensor: two float32 norms, step, salt


def _storages(optimizer: Lamb16) -> dict[int, int]:
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}


@given(shapes=shape_lists)
def test_state_is_two_bytes_a_parameter(compile: bool, shapes) -> None:
    """As tensors and as allocated memory: 2 bytes a parameter, 16 a tensor, and one spare slot of 16."""
    case = Case(shapes, {"lr": 0.1, "weight_decay": 0.1}, kinds=[["normal"] * len(shapes)] * 2)
    params, optimizer = run(case, compile)
    numel = sum(p.numel() for p in params)
    assert set(optimizer.state) == set(params)
    logical = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())
    assert logical == 2 * numel + SCALARS * len(params)
    assert sum(_storages(optimizer).values()) == 2 * numel + SCALARS * (len(params) + 1)


@given(case=cases(moment_dtypes=("float8",)))
def test_dtypes_and_shapes(compile: bool, case: Case) -> None:
    params, optimizer = run(case, compile)
    for p in params:
        if p not in optimizer.state:
            continue
        state = optimizer.state[p]
        assert list(state) == ["step", "exp_avg", "exp_avg_norm", "exp_avg_sq", "exp_avg_sq_norm", "salt"]
        assert p.dtype == case.dtype
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.float8_e4m3fn, torch.float8_e5m2)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        assert state["step"].dtype == state["salt"].dtype == torch.int32
        for name in ("exp_avg_norm", "exp_avg_sq_norm"):
            assert state[name].dtype == torch.float32
            assert state[name].shape == ()
            assert math.frexp(state[name].item())[0] == 0.5, "a norm is a power of two"
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
            v = optimizer.state[p]["exp_avg_sq"].float().cpu()
            assert (v[positive] > 0).all()
            assert torch.isfinite(v).all()
            assert torch.isfinite(optimizer.state[p]["exp_avg"].float()).all()


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


def bound(betas: tuple[float, float]) -> float:
    """C, written out here: the code under test is not asked."""
    beta1, beta2 = betas
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def extremal(betas: tuple[float, float], steps: int, seed: int) -> list[torch.Tensor]:
    """Gradients for which |m| = C·sqrt(v) in the limit: the equality case of Cauchy–Schwarz."""
    signs = torch.randn(300, generator=torch.Generator().manual_seed(seed)).sign()
    return [signs * 1e-3 * (betas[1] / betas[0]) ** t for t in range(steps)]


BETAS = st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.5, 0.9), (0.95, 0.9999), (0.9, 0.99)])


@given(
    exponents=st.lists(st.integers(-8, 8), min_size=1, max_size=40),
    betas=BETAS,
    bias_correction=st.booleans(),
    growing=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_updates_stay_below_the_bound(compile: bool, exponents, betas, bias_correction, growing, seed) -> None:
    """|m| <= C·sqrt(v) holds for every update, though both moments are rounded between the steps."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(300, generator=generator) * 10.0**exponent for exponent in exponents]
    if growing:
        grads = extremal(betas, 60, seed)
    p = torch.nn.Parameter(torch.zeros(300, device=DEVICE))
    optimizer = Lamb16(
        [p], lr=1.0, betas=betas, eps=1e-30, bias_correction=bias_correction, compile=compile, trust_clip=1e9
    )
    for t, ratio in enumerate(largest_ratio(p, optimizer, grads), 1):
        corrected = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if bias_correction else 1.0
        assert ratio <= bound(betas) * corrected * (1 + 1e-5)


def test_without_the_bound_updates_exceed_it(monkeypatch) -> None:
    """Negative control: rounding does break the inequality, so the property above can fail."""
    assert bound((0.9, 0.999)) == pytest.approx(7.2703, rel=1e-4)
    monkeypatch.setattr("lamb16.update.inverse_bound", lambda beta1, beta2: 0.0)
    p = torch.nn.Parameter(torch.zeros(300, device=DEVICE))
    optimizer = Lamb16([p], lr=1.0, eps=1e-30, bias_correction=False, compile=False, trust_clip=1e9)
    assert max(largest_ratio(p, optimizer, extremal((0.9, 0.999), 80, 0))) > 1.05 * bound((0.9, 0.999))
