"""The two baselines against their formulas, written out here in float64 and without their code."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import all_params, assert_same, gradients, model, parameters, snapshot, step_with, take_steps
from lamb16 import Lamb, PublishedLamb16

BASELINES = (Lamb, PublishedLamb16)
HYPER = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
both = pytest.mark.parametrize("baseline", BASELINES)


def lamb_formula(p: Tensor, grads: list[Tensor], bias_correction: bool = False, sign: int = 1) -> Tensor:
    """Weights after LAMB's steps with ``HYPER``."""
    p = p.detach().double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        g = sign * grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        scale_m, scale_v = (1 - 0.8**t, 1 - 0.95**t) if bias_correction else (1, 1)
        u = (m / scale_m) / ((v / scale_v).sqrt() + 1e-6) + 0.1 * p
        p = p - 0.01 * p.norm() / u.norm() * u
    return p


def published_formula(p: Tensor, grads: list[Tensor], sign: int = 1) -> Tensor:
    """Weights after the published rule's steps with ``HYPER``; in float32, since the codes depend on every bit of m."""
    p, eps = p.detach().float(), 1e-6
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for grad in grads:
        g = sign * grad.float()
        m, v = 0.8 * m + (1 - 0.8) * g, 0.95 * v + (1 - 0.95) * g * g
        u = m / (v.sqrt() + eps) + 0.1 * p
        norms = [(x * x).clamp(eps, 1).double().sum().sqrt() for x in (p, u)]
        p = p - 0.01 * min((norms[0] / norms[1] * 1e-3 / 0.01).item() ** 0.382, 2.0) * u
        v = v.clamp(0, 10)
        scale_m, scale_v = ((x * x).clamp(0, 10).sum().sqrt() / x.numel() + eps for x in (m, v))
        m = (m / scale_m).clamp(-15, 15).to(torch.float8_e4m3fn).float() * scale_m
        v = (v / scale_v).clamp(max=57344).to(torch.float8_e5m2).float() * scale_v
    return p


def weights_after(optimizer: torch.optim.Optimizer, steps: int = 5) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Per parameter: its weights at the start, after the steps, and its gradients."""
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    grads = [gradients(params, t) for t in range(steps)]
    take_steps(optimizer, range(steps))
    return [(a, p.detach(), [g[i] for g in grads]) for i, (a, p) in enumerate(zip(start, params, strict=True))]


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_lamb_follows_its_formula(bias_correction: bool, maximize: bool) -> None:
    optimizer = Lamb(parameters(), **HYPER, bias_correction=bias_correction, maximize=maximize)
    for start, found, grads in weights_after(optimizer):
        expected = lamb_formula(start, grads, bias_correction, -1 if maximize else 1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("maximize", [False, True])
def test_published_follows_its_formula(maximize: bool) -> None:
    optimizer = PublishedLamb16(parameters(), **HYPER, maximize=maximize)
    for start, found, grads in weights_after(optimizer):
        expected = published_formula(start, grads, -1 if maximize else 1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_published_clamps_large_moments() -> None:
    optimizer = PublishedLamb16(parameters(), **HYPER)
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    grads = [[1e3 * g for g in gradients(params, t)] for t in range(3)]
    for step in grads:
        step_with(optimizer, step)
    for i, p in enumerate(params):
        expected = published_formula(start[i], [step[i] for step in grads])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)


@both
def test_weight_decay_and_direction_count(baseline: Any) -> None:
    """The two tests above could not fail if these made no difference."""
    plain = snapshot_after(baseline(parameters(), **HYPER))
    assert not torch.equal(plain, snapshot_after(baseline(parameters(), **HYPER | {"weight_decay": 0.0})))
    assert not torch.equal(plain, snapshot_after(baseline(parameters(), **HYPER, maximize=True)))


def snapshot_after(optimizer: torch.optim.Optimizer) -> Tensor:
    take_steps(optimizer, range(2))
    return torch.cat([p.detach().flatten() for p in all_params(optimizer)])


def test_lamb_has_no_trust_ratio_where_a_norm_is_zero() -> None:
    p = nn.Parameter(torch.zeros(5))
    p.grad = torch.ones(5)
    optimizer = Lamb([p], lr=0.1)
    optimizer.step()
    assert optimizer.layer_stats()["0"]["trust_ratio"] == 1
    assert (p < 0).all()


def test_published_clips_the_trust_ratio() -> None:
    p = nn.Parameter(torch.ones(50))
    p.grad = torch.full((50,), 1e-12)
    optimizer = PublishedLamb16([p], lr=1e-9)
    optimizer.step()
    assert optimizer.layer_stats()["0"]["trust_ratio"] == 2


def test_published_saturates_the_first_moment_of_a_wide_layer() -> None:
    p = nn.Parameter(torch.zeros(100_000))
    generator = torch.Generator().manual_seed(0)
    scale = (1.5 * torch.randn(p.shape, generator=generator)).exp()
    optimizer = PublishedLamb16([p])
    exact = torch.zeros_like(p)
    for _ in range(20):
        p.grad = torch.randn(p.shape, generator=generator) * scale
        exact = 0.9 * exact + 0.1 * p.grad
        optimizer.step()
    state = optimizer.state[p]
    codes = state["exp_avg"].float()
    assert (codes.abs() == 15).float().mean() > 0.5
    assert (codes * state["exp_avg_norm"]).norm() < 0.05 * exact.norm()


def test_published_stores_no_infinity() -> None:
    p = nn.Parameter(torch.zeros(1_000_000))
    p.grad = torch.zeros_like(p)
    p.grad[0] = 1e4
    optimizer = PublishedLamb16([p])
    optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg_sq"][0].float() == 57344
    assert all(torch.isfinite(state[key].float()).all() for key in ("exp_avg", "exp_avg_sq", "exp_avg_norm"))


@both
def test_state_has_the_stated_dtypes(baseline: Any) -> None:
    optimizer = baseline(parameters(dtype=torch.bfloat16), **HYPER)
    take_steps(optimizer, range(1))
    published = baseline is PublishedLamb16
    for p in all_params(optimizer):
        dtypes = {key: value.dtype for key, value in optimizer.state[p].items()}
        names = ("step", "exp_avg", "exp_avg_sq") + (("exp_avg_norm", "exp_avg_sq_norm") if published else ())
        codes = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float8_e5m2} if published else {}
        assert dtypes == dict.fromkeys(names, torch.float32) | codes


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_take_float32_steps(baseline: Any, dtype: torch.dtype) -> None:
    """The first step is the one of float32 weights with the same values, rounded once."""
    half = baseline(parameters(dtype=dtype), **HYPER)
    full = baseline([nn.Parameter(p.detach().float()) for p in all_params(half)], **HYPER)
    for p, q, grad in zip(all_params(half), all_params(full), gradients(all_params(half), 0), strict=True):
        p.grad, q.grad = grad, grad.float()
    half.step()
    full.step()
    for p, q in zip(all_params(half), all_params(full), strict=True):
        assert torch.equal(p, q.to(dtype))


@both
def test_tensors_without_a_gradient_stay_and_gradients_are_not_modified(baseline: Any) -> None:
    optimizer = baseline(parameters(), **HYPER, maximize=True)
    first, *others = all_params(optimizer)
    before = first.detach().clone()
    for p, grad in zip(others, gradients(others, 0), strict=True):
        p.grad = grad
    kept = [p.grad.clone() for p in others]
    optimizer.step()
    assert torch.equal(first, before)
    assert first not in optimizer.state
    assert all(torch.equal(p.grad, grad) for p, grad in zip(others, kept, strict=True))
    assert set(optimizer.layer_stats()) == {"1", "2"}


@both
def test_scalar_and_empty_tensors(baseline: Any) -> None:
    optimizer = baseline([nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0, 3))], **HYPER)
    take_steps(optimizer, range(2))
    scalar, empty = all_params(optimizer)
    assert scalar != 1
    assert empty not in optimizer.state


@both
def test_closure_runs_with_gradients_enabled(baseline: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = baseline([p], **HYPER)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (p < 1).all()


@both
def test_layer_stats_go_by_name(baseline: Any) -> None:
    network = model()
    optimizer = baseline(network.named_parameters(), **HYPER)
    take_steps(optimizer, range(1))
    stats = optimizer.layer_stats()
    assert set(stats) == {name for name, _ in network.named_parameters()}
    assert all(set(row) == {"weight_norm", "update_norm", "trust_ratio"} for row in stats.values())
    assert all(value.shape == () for row in stats.values() for value in row.values())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resumed_run_repeats_an_uninterrupted_one(baseline: Any, dtype: torch.dtype) -> None:
    """Half-precision weights show a state that loading has cast to their dtype."""
    whole = baseline(parameters(dtype=dtype), **HYPER)
    take_steps(whole, range(3))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = baseline([nn.Parameter(p.detach().clone()) for p in all_params(whole)])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(snapshot(whole), snapshot(resumed))
    take_steps(whole, range(3, 6))
    take_steps(resumed, range(3, 6))
    assert_same(snapshot(whole), snapshot(resumed))


@both
def test_a_loaded_state_is_a_copy(baseline: Any) -> None:
    whole = baseline(parameters(), **HYPER)
    take_steps(whole, range(2))
    before = snapshot(whole)
    other = baseline(parameters())
    other.load_state_dict(whole.state_dict())
    take_steps(other, range(2, 4))
    assert_same(snapshot(whole), before)


@both
def test_deepcopy(baseline: Any) -> None:
    optimizer = baseline(parameters(), **HYPER)
    take_steps(optimizer, range(2))
    assert_same(snapshot(optimizer), snapshot(copy.deepcopy(optimizer)))


INVALID = {"lr": -1.0, "betas": (0.9, 1.0), "eps": 0.0, "weight_decay": float("nan"), "maximize": 1}
INVALID_PUBLISHED = {"trust_scale": -0.5, "trust_lr": 0.0, "trust_clip": 0.0}
CASES = [(b, n, v) for b in BASELINES for n, v in INVALID.items()]
CASES += [(Lamb, "bias_correction", "yes"), *((PublishedLamb16, n, v) for n, v in INVALID_PUBLISHED.items())]


@pytest.mark.parametrize(("baseline", "name", "value"), CASES)
def test_bad_hyperparameters_are_named(baseline: Any, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        baseline(parameters(), **{name: value})
    with pytest.raises(ValueError, match=rf"parameter group 0.*{name}"):
        baseline([{"params": parameters(), name: value}])


@both
@pytest.mark.parametrize(
    ("tensor", "word"), [(torch.ones(3, dtype=torch.cfloat), "complex"), (torch.eye(3).to_sparse(), "sparse")]
)
def test_unusable_parameters_are_refused_by_name(baseline: Any, tensor: Tensor, word: str) -> None:
    optimizer = baseline([("good", nn.Parameter(torch.ones(2)))])
    with pytest.raises(TypeError, match=f"embedding.weight is {word}"):
        optimizer.add_param_group({"params": [("embedding.weight", nn.Parameter(tensor))]})
    assert len(optimizer.param_groups) == 1


@both
def test_sparse_gradients_are_refused_by_name(baseline: Any) -> None:
    p = nn.Parameter(torch.eye(3))
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"embedding\.weight"):
        baseline([("embedding.weight", p)]).step()
    assert torch.equal(p, torch.eye(3))
