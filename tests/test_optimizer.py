"""Lamb16 behaves as a torch.optim.Optimizer, with the reference's bits."""

import copy
import gc
import math
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from bits import assert_same_bits, raw
from helpers import (
    CODES,
    DEVICE,
    SCHEDULERS,
    SHAPES,
    all_params,
    assert_follows_reference,
    assert_matches,
    assert_same,
    differing,
    follow,
    gradients,
    hyper_of,
    missing,
    model,
    parameters,
    snapshot,
    step_with,
    take_steps,
)
from lamb16 import Lamb16, reference
from lamb16.entries import ENTRIES, SCALARS
from lamb16.reference import Hyper
from lamb16.step import row_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASE = {"lr": 0.01, "weight_decay": 0.1}
MAXIMA = ("exp_avg_max", "exp_avg_sq_max")  # of the codes
OVERRIDES = [
    {"lr": 0.05},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.0)},
    {"betas": (0.95, 0.9)},  # β1² > β2: no bound on |m| / sqrt(v)
    {"eps": 1e-3},
    {"weight_decay": 0.0},
    {"weight_decay": 0.5},
    {"trust_scale": 0.0},
    {"trust_scale": 1.0},
    {"trust_lr": 0.1},
    {"trust_clip": 0.25},
    {"bias_correction": False},
    {"nesterov": False},
    {"caution": True},
    {"maximize": True},
    {"moment_dtype": "float32"},
]


def test_every_hyperparameter_is_overridden_here() -> None:
    """param_rounding, which is nothing to float32 weights, in test_param_rounding.py."""
    assert missing([name for override in OVERRIDES for name in override], "param_rounding") == set()


# -- the rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_follows_the_reference(compile_mode: bool, dtype: torch.dtype) -> None:
    optimizer = Lamb16(parameters(dtype=dtype), **BASE, compile=compile_mode)
    assert_follows_reference(optimizer, steps=4)
    assert all(optimizer.state[p]["step"] == 4 for p in all_params(optimizer))


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
def test_a_group_overrides_a_hyperparameter(compile_mode: bool, override: dict) -> None:
    one, two = parameters(), parameters(seed=1)
    groups = [{"params": one}, {"params": two, **override}]
    optimizer = Lamb16(groups, **BASE, compile=compile_mode)
    expected = [Hyper(**BASE)] * len(one) + [Hyper(**BASE | override)] * len(two)
    assert_follows_reference(optimizer, expected, steps=2)


@pytest.mark.parametrize("override", [o for o in OVERRIDES if "moment_dtype" not in o], ids=str)
def test_a_hyperparameter_may_change_between_steps(override: dict) -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    take_steps(optimizer, [0])
    optimizer.param_groups[0].update(override)
    take_steps(optimizer, [1])
    for i, p in enumerate(params):
        grads = [gradients(params, t)[i] for t in (0, 1)]
        hypers = [Hyper(**BASE), Hyper(**BASE | override)]
        assert_matches(optimizer, p, *follow(start[i], grads, hypers, int(optimizer.state[p]["salt"])))


def test_betas_changed_in_place_are_honoured() -> None:
    by_list, by_tuple = (Lamb16(parameters(), **BASE, betas=[0.9, 0.99], compile=False) for _ in range(2))
    for optimizer in (by_list, by_tuple):
        take_steps(optimizer, [0])
    by_list.param_groups[0]["betas"][0] = 0.5
    by_tuple.param_groups[0]["betas"] = [0.5, 0.99]
    for optimizer in (by_list, by_tuple):
        take_steps(optimizer, [1])
    assert_same(snapshot(by_list), snapshot(by_tuple))


def test_a_replaced_group_dict_is_honoured() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    take_steps(optimizer, [0])
    before = [raw(p) for p in all_params(optimizer)]
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    take_steps(optimizer, [1])
    for p, old in zip(all_params(optimizer), before, strict=True):
        assert_same_bits(raw(p), old)


def test_eager_and_compiled_give_the_same_bits() -> None:
    shapes = [(5,), (1024,), (1025,), (2047,), (2048,), (3, 1000), (70, 70), (4096,)]
    groups = [{"params": parameters(shapes)}, {"params": parameters(shapes, seed=1), "bias_correction": False}]
    eager, compiled = (
        Lamb16([{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in groups], **BASE, **c)
        for c in ({"compile": False}, {})
    )
    for optimizer in (eager, compiled):
        take_steps(optimizer, range(5))
    assert_same(snapshot(eager), snapshot(compiled))


@pytest.mark.parametrize(("start", "counted"), [(0.0, 0.1), (-0.05, 0.1), (0.2, 0.2), (-3.0, 1.0)])
def test_a_weight_counts_with_a_magnitude_between_a_tenth_and_one(
    compile_mode: bool, start: float, counted: float
) -> None:
    params = [nn.Parameter(torch.full(shape, start, device=DEVICE)) for shape in SHAPES]
    optimizer = Lamb16(params, lr=0.0, compile=compile_mode)
    for step in range(2):  # from the weights themselves, then from what the step has summed
        take_steps(optimizer, [step])
        for i, p in enumerate(params):
            norm = optimizer.layer_stats()[str(i)]["weight_norm"].item()
            assert norm == pytest.approx(counted * p.numel() ** 0.5, rel=5e-5)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("form", ["nesterov", "plain", "uncorrected", "caution"])
def test_the_rule_is_the_textbook_formula(compile_mode: bool, maximize: bool, form: str) -> None:
    """Written out here in float64, with the norms of the step before."""
    lr, beta1, beta2, eps, decay, steps = 0.02, 0.8, 0.95, 1e-4, 0.3, 6
    corrected, nesterov, caution = form != "uncorrected", form != "plain", form == "caution"
    optimizer = Lamb16(
        parameters(),
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decay,
        bias_correction=corrected,
        nesterov=nesterov,
        caution=caution,
        maximize=maximize,
        moment_dtype="float32",
        compile=compile_mode,
    )
    params = all_params(optimizer)
    start = [p.detach().cpu().double() for p in params]
    take_steps(optimizer, range(steps))
    for i, param in enumerate(params):
        p, m, v = start[i], torch.zeros(param.shape).double(), torch.zeros(param.shape).double()
        update_norm, agreed = param.numel() ** 0.5, param.numel()
        for t in range(1, steps + 1):
            g = gradients(params, t - 1)[i].cpu().double() * (-1 if maximize else 1)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            c1, c2, c3 = (1 - beta1**t, 1 - beta2**t, 1 - beta1 ** (t + 1)) if corrected else (1, 1, 1)
            n = beta1 * m / c3 + (1 - beta1) * g / c1 if nesterov else m / c1
            d = n / ((v / c2).sqrt() + eps)
            if caution:
                d = torch.where(n * g > 0, d * param.numel() / agreed, 0.0)
                agreed = int((n * g > 0).sum())
            u = d + decay * p
            weight_norm = (p**2).clamp(0.01, 1).sum().sqrt()
            ratio = min(float(weight_norm / update_norm * 1e-3 / lr) ** 0.382, 2.0)
            update_norm = (u**2).clamp(eps, 1).sum().sqrt()
            p = p - lr * ratio * u
        assert torch.allclose(param.cpu().double() - start[i], p - start[i], rtol=1e-5, atol=2e-6)
        assert float((p - start[i]).abs().mean()) > 1e-2


def test_maximize_is_minimizing_with_negated_gradients() -> None:
    up = Lamb16(parameters(), **BASE, maximize=True, compile=False)
    down = Lamb16(parameters(), **BASE, compile=False)
    for t in range(3):
        for sign, optimizer in ((1, up), (-1, down)):
            step_with(optimizer, [grad * sign for grad in gradients(all_params(optimizer), t)])
    assert differing(snapshot(up), snapshot(down)) == ["group 0"]


def test_decay_alone_moves_the_weights_but_does_not_count_a_step(compile_mode: bool) -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=compile_mode)
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, before in zip(params, start, strict=True):
        weights, state = follow(before, [torch.zeros_like(before)], Hyper(**BASE), int(optimizer.state[p]["salt"]))
        assert_matches(optimizer, p, weights, state)
        assert optimizer.state[p]["step"] == 0
        assert bool((p.detach().abs() < before.abs()).all())


def test_a_hidden_step_leaves_no_trace(compile_mode: bool) -> None:
    visited, plain = (Lamb16(parameters(), **BASE, compile=compile_mode) for _ in range(2))
    for p in all_params(visited):
        p.grad = torch.zeros_like(p)
    visited.param_groups[0]["lr"] = 0.0
    visited.step()
    visited.param_groups[0]["lr"] = BASE["lr"]
    assert [raw(p).tolist() for p in all_params(visited)] == [raw(p).tolist() for p in all_params(plain)]
    assert len(visited.state) == len(all_params(visited))
    for optimizer in (visited, plain):
        take_steps(optimizer, range(2))
    assert_same(snapshot(visited), snapshot(plain))
    assert visited.skipped == 0


def test_zero_lr_moves_the_moments_only(compile_mode: bool) -> None:
    optimizer = Lamb16(parameters(), lr=0.0, weight_decay=0.1, compile=compile_mode)
    before = [raw(p) for p in all_params(optimizer)]
    take_steps(optimizer, range(2))
    for p, old in zip(all_params(optimizer), before, strict=True):
        assert_same_bits(raw(p), old)
        assert optimizer.state[p]["step"] == 2
        assert raw(optimizer.state[p]["exp_avg_codes"]).any()


# -- rounding salts ----------------------------------------------------------------------------------------------


def test_named_parameters_round_the_same_in_any_order() -> None:
    shapes, names = ((7, 3), (2100,), (64, 48)), ("a", "b", "c")
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        params = parameters(shapes)
        grads = gradients(params, 0)
        optimizer = Lamb16([(names[i], params[i]) for i in order], **BASE, compile=False)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        results.append({names[i]: [raw(optimizer.state[params[i]][key]) for key in CODES] for i in range(3)})
    for name in names:
        assert all(torch.equal(a, b) for a, b in zip(results[0][name], results[1][name], strict=True))


def test_parameters_without_names_round_by_position() -> None:
    a, b = parameters([(50, 40)]), parameters([(50, 40)])
    optimizer = Lamb16([{"params": a}, {"params": b}], **BASE, compile=False)
    grad = gradients(a, 0)[0]
    a[0].grad = b[0].grad = grad
    optimizer.step()
    codes = [raw(optimizer.state[p]["exp_avg_codes"]) for p in (a[0], b[0])]
    assert 0.2 < float((codes[0] != codes[1]).float().mean()) < 0.8  # other words, hence other neighbours


def test_the_seed_changes_the_rounding_and_nothing_else() -> None:
    runs = [Lamb16(parameters(), **BASE, seed=seed, compile=False) for seed in (0, 0, 1)]
    for optimizer in runs:
        take_steps(optimizer, [0])
    first, again, other = (snapshot(optimizer) for optimizer in runs)
    assert_same(first, again)
    changed = {f"{i}.{key}" for i in range(3) for key in (*CODES, "salt")}
    assert changed <= set(differing(first, other)) <= changed | {f"{i}.{key}" for i in range(3) for key in MAXIMA}


# -- learning rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_steer_the_step(name: str, tensor_lr: bool, compile_mode: bool) -> None:
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    optimizer = Lamb16(parameters([(7, 3), (64, 48)]), lr=lr, weight_decay=0.1, compile=compile_mode)
    scheduler = SCHEDULERS[name](optimizer)
    params = all_params(optimizer)
    start, hypers = [p.detach().clone() for p in params], []
    for t in range(5):
        hypers.append(hyper_of(optimizer.param_groups[0]))
        take_steps(optimizer, [t])
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len({(h.lr, h.betas) for h in hypers}) > 1
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor_lr
    for i, p in enumerate(params):
        grads = [gradients(params, t)[i] for t in range(5)]
        assert_matches(optimizer, p, *follow(start[i], grads, hypers, int(optimizer.state[p]["salt"])))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_gives_the_bits_of_the_float(shape: tuple[int, ...], compile_mode: bool) -> None:
    lr = torch.full(shape, 0.013)
    by_tensor = Lamb16(parameters(), lr=lr, weight_decay=0.1, compile=compile_mode)
    by_float = Lamb16(parameters(), lr=lr.item(), weight_decay=0.1, compile=compile_mode)
    for optimizer in (by_tensor, by_float):
        take_steps(optimizer, [0])
    lr.fill_(0.002)
    by_float.param_groups[0]["lr"] = lr.item()
    for optimizer in (by_tensor, by_float):
        take_steps(optimizer, [1, 2])
    assert_same(snapshot(by_tensor), snapshot(by_float))


def test_lr_may_turn_from_a_float_into_a_tensor_and_back() -> None:
    mixed, plain = (Lamb16(parameters(), lr=0.5, weight_decay=0.1, compile=False) for _ in range(2))
    for t, lr in enumerate([0.5, torch.tensor(0.25), 0.5, torch.tensor(0.5), 0.125]):
        mixed.param_groups[0]["lr"], plain.param_groups[0]["lr"] = lr, float(lr)
        for optimizer in (mixed, plain):
            take_steps(optimizer, [t])
    assert_same(snapshot(mixed), snapshot(plain))


# -- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_are_never_modified(compile_mode: bool) -> None:
    optimizer = Lamb16(parameters(), **BASE, maximize=True, compile=compile_mode)
    params = all_params(optimizer)
    grads = gradients(params, 0)
    grads[2] = grads[2].t().contiguous().t()
    before = [raw(g) for g in grads]
    step_with(optimizer, grads)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    for g, b in zip(grads, before, strict=True):
        assert_same_bits(raw(g), b)


def test_a_parameter_without_gradient_is_left_alone(compile_mode: bool) -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=compile_mode)
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    present = [(0, 1, 2), (0,), (), (1, 2), (0, 2)]
    for t, with_grad in enumerate(present):
        before = snapshot(optimizer)
        for i, grad in enumerate(gradients(params, t)):
            params[i].grad = grad if i in with_grad else None
        optimizer.step()
        assert {key.split(".")[0] for key in differing(before, snapshot(optimizer))} == set(map(str, with_grad))
    for i, p in enumerate(params):
        grads = [gradients(params, t)[i] for t, with_grad in enumerate(present) if i in with_grad]
        assert_matches(optimizer, p, *follow(start[i], grads, Hyper(**BASE), int(optimizer.state[p]["salt"])))


@pytest.mark.parametrize(
    ("dtype", "compile"), [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)], ids=str
)
def test_low_precision_parameters_with_float32_gradients(dtype: torch.dtype, compile: bool) -> None:
    optimizer = Lamb16(parameters(dtype=dtype), **BASE, compile=compile)
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    grads = [[g.float() * 1.001 for g in gradients(params, t)] for t in range(2)]
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad_dtype = torch.float32
            p.grad = g
        optimizer.step()
    for i, p in enumerate(params):
        expected = follow(start[i], [step[i] for step in grads], Hyper(**BASE), int(optimizer.state[p]["salt"]))
        assert_matches(optimizer, p, *expected)


def test_a_parameter_that_never_has_a_gradient_gets_no_state() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    params = all_params(optimizer)
    params[1].grad = gradients(params, 0)[1]
    optimizer.step()
    assert list(optimizer.state) == [params[1]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["small", "rows and packed rows", "rows"])
def test_a_non_finite_gradient_skips_its_tensor(bad: float, where: int, compile_mode: bool) -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=compile_mode)
    params = all_params(optimizer)
    take_steps(optimizer, range(2))
    before = snapshot(optimizer)
    for i, grad in enumerate(gradients(params, 2)):
        if i == where:
            grad.view(-1)[-1] = bad
        params[i].grad = grad
    optimizer.step()
    changed = {key.split(".")[0] for key in differing(before, snapshot(optimizer))}
    assert changed == set("012") - {str(where)}
    assert optimizer.skipped == 1
    take_steps(optimizer, [3])
    assert optimizer.skipped == 1
    start = parameters()
    for i, p in enumerate(params):
        grads = [gradients(params, t)[i] for t in range(4) if t != 2 or i != where]
        weights, state = follow(start[i].detach(), grads, Hyper(**BASE), int(optimizer.state[p]["salt"]))
        assert_matches(optimizer, p, weights, state)


def test_skips_add_up_over_tensors_and_steps(compile_mode: bool) -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=compile_mode)
    assert optimizer.skipped == 0
    for bad in ([0, 2], [1], [0, 1, 2]):
        for i, p in enumerate(all_params(optimizer)):
            p.grad = torch.full_like(p, math.nan if i in bad else 1.0)
        optimizer.step()
    assert optimizer.skipped == 6


# -- shapes and layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_empty_and_one_element_parameters(compile_mode: bool, dtype: torch.dtype) -> None:
    optimizer = Lamb16(parameters([(), (1,), (0,), (3, 0), (1, 1, 1), (2048,)], dtype), **BASE, compile=compile_mode)
    assert_follows_reference(optimizer)


@pytest.mark.parametrize("shape", [(), (1,), (0,)], ids=str)
def test_a_lone_tiny_parameter(compile_mode: bool, shape: tuple[int, ...]) -> None:
    assert_follows_reference(Lamb16(parameters([shape]), **BASE, compile=compile_mode))


@pytest.mark.parametrize("rows", [5, 50], ids=["small", "large"])
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
def test_transposed_tensors_give_the_bits_of_contiguous_ones(compile_mode: bool, which: str, rows: int) -> None:
    start, grads = parameters([(rows, 60)])[0].detach(), gradients(parameters([(rows, 60)]), 0)[0]
    results = []
    for transposed in (False, True):
        p = start.t().contiguous().t() if transposed and which != "gradient" else start.clone()
        optimizer = Lamb16([nn.Parameter(p)], **BASE, compile=compile_mode)
        (p,) = all_params(optimizer)
        stride = p.stride()
        for _ in range(2):
            p.grad = grads.t().contiguous().t() if transposed and which != "parameter" else grads.clone()
            optimizer.step()
        assert p.stride() == stride
        results.append(snapshot(optimizer))
    assert_same(*results)


@pytest.mark.parametrize("channels", [2, 40], ids=["small", "large"])
def test_channels_last_gives_the_bits_of_contiguous(compile_mode: bool, channels: int) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(parameters([(channels, 8, 3, 3)])[0].detach().contiguous(memory_format=memory_format))
        optimizer = Lamb16([p], **BASE, compile=compile_mode)
        for t in range(2):
            p.grad = gradients([p], t)[0].contiguous(memory_format=memory_format)
            optimizer.step()
        assert p.is_contiguous(memory_format=memory_format)
        results.append(snapshot(optimizer))
    assert_same(*results)


def test_a_strided_view_is_updated_in_place_and_nothing_beside_it(compile_mode: bool) -> None:
    base = parameters([(60, 100)])[0].detach()
    whole = base.clone()
    p = nn.Parameter(base[:, ::2])
    optimizer = Lamb16([p], **BASE, compile=compile_mode)
    assert_follows_reference(optimizer)
    assert p.data_ptr() == base.data_ptr()
    assert torch.equal(base[:, 1::2], whole[:, 1::2])
    assert not torch.equal(base[:, ::2], whole[:, ::2])


REPLACEMENTS = {
    "a copy": lambda x: x.clone(),
    "another layout, another memory": lambda x: x.t().contiguous().t(),
    "other values": lambda x: x * 0.5,
}


@pytest.mark.parametrize("shape", [(8, 6), (64, 48)], ids=str)
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_data_may_be_replaced_between_steps(compile_mode: bool, how: str, shape: tuple[int, ...]) -> None:
    replaced, changed = (Lamb16(parameters([shape]), **BASE, compile=compile_mode) for _ in range(2))
    for optimizer in (replaced, changed):
        take_steps(optimizer, [0])
    for p in all_params(replaced):
        p.data = REPLACEMENTS[how](p.data)
    for p in all_params(changed):
        p.data.copy_(REPLACEMENTS[how](p.data))
    for optimizer in (replaced, changed):
        take_steps(optimizer, [1, 2])
    assert_same(snapshot(replaced), snapshot(changed))


@pytest.mark.parametrize("size", [8, 64])
def test_data_may_become_a_transposed_view_of_its_own_memory(size: int) -> None:
    """The address stays, the strides do not."""
    optimizer = Lamb16(parameters([(size, size)]), **BASE, compile=False)
    (p,) = all_params(optimizer)
    start = p.detach().clone()
    take_steps(optimizer, [0])
    weights, state = follow(start, gradients([p], 0), Hyper(**BASE), int(optimizer.state[p]["salt"]))
    p.data = p.data.t()
    take_steps(optimizer, [1])
    weights, state, _ = reference.step(weights.t().contiguous(), gradients([p], 1)[0].cpu(), state, Hyper(**BASE))
    assert_matches(optimizer, p, weights, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    usual, other = (Lamb16(parameters(), **BASE, compile=False) for _ in range(2))
    take_steps(usual, range(2))
    torch.set_default_dtype(dtype)
    try:
        take_steps(other, range(2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(snapshot(usual), snapshot(other))


@pytest.mark.parametrize(
    "context",
    [torch.autocast(DEVICE.type, dtype=torch.bfloat16), torch.enable_grad()],
    ids=["autocast", "enable_grad"],
)
def test_the_surroundings_of_step_do_not_matter(context: torch.autocast) -> None:
    usual, inside = (Lamb16(parameters(), **BASE, compile=False) for _ in range(2))
    take_steps(usual, range(2))
    with context:
        take_steps(inside, range(2))
    assert_same(snapshot(usual), snapshot(inside))


# -- groups ------------------------------------------------------------------------------------------------------


def test_a_group_may_be_added_later(compile_mode: bool) -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=compile_mode)
    take_steps(optimizer, range(2))
    late = parameters([(40, 60), (5,)], seed=3)
    start = [p.detach().clone() for p in late]
    optimizer.add_param_group({"params": late, "weight_decay": 0.3, "betas": (0.8, 0.99)})
    take_steps(optimizer, [2, 3])
    params = all_params(optimizer)
    for i, p in enumerate(params):
        if i < 3:
            grads = [gradients(params[:3] if t < 2 else params, t)[i] for t in range(4)]
            weights, state = follow(parameters()[i].detach(), grads, Hyper(**BASE), int(optimizer.state[p]["salt"]))
        else:
            grads = [gradients(params, t)[i] for t in (2, 3)]
            hyper = Hyper(lr=0.01, weight_decay=0.3, betas=(0.8, 0.99))
            weights, state = follow(start[i - 3], grads, hyper, int(optimizer.state[p]["salt"]))
        assert_matches(optimizer, p, weights, state)


def test_parameters_of_several_dtypes_in_one_group(compile_mode: bool) -> None:
    params = [*parameters(), *parameters(dtype=torch.bfloat16, seed=1), *parameters(dtype=torch.float16, seed=2)]
    groups = [{"params": params}, {"params": parameters(seed=4), "moment_dtype": "float32"}]
    assert_follows_reference(Lamb16(groups, **BASE, compile=compile_mode))


def test_a_parameter_may_leave_its_group() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    take_steps(optimizer, [0])
    gone = optimizer.param_groups[0]["params"].pop(0)
    before = raw(gone)
    take_steps(optimizer, [1])
    assert_same_bits(raw(gone), before)
    assert [int(optimizer.state[p]["step"]) for p in all_params(optimizer)] == [2, 2]


# -- closures, hooks, zero_grad ----------------------------------------------------------------------------------


def test_a_closure_runs_once_under_enable_grad_and_its_loss_comes_back(compile_mode: bool) -> None:
    network, x = model(), torch.ones(4, 48, device=DEVICE)
    optimizer = Lamb16(network.named_parameters(), **BASE, compile=compile_mode)
    losses = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = network(x).square().mean()
        loss.backward()
        losses.append(loss)
        return loss

    for _ in range(3):
        with torch.no_grad():
            assert optimizer.step(closure) is losses[-1]
            assert not torch.is_grad_enabled()
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert optimizer.step() is None


def test_zero_grad_in_both_forms() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    take_steps(optimizer, [0])
    grads = [p.grad for p in all_params(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(all_params(optimizer), grads, strict=True))
    before = snapshot(optimizer)
    optimizer.step()  # zero gradients still decay the moments
    assert "0.exp_avg_codes" in differing(before, snapshot(optimizer))
    optimizer.zero_grad()
    assert all(p.grad is None for p in all_params(optimizer))
    before = snapshot(optimizer)
    optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_step_hooks_are_called_around_the_step() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", len(o.state))))
    post = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", len(o.state))))
    take_steps(optimizer, [0])
    post.remove()
    take_steps(optimizer, [1])
    assert seen == [("pre", 0), ("post", 3), ("pre", 3)]


# -- gradient scaling --------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["the scaler unscales", "the step unscales"])
def amp_scaling(request: pytest.FixtureRequest) -> bool:
    return request.param


def scaled_steps(optimizer: Lamb16, scaler: torch.amp.GradScaler, steps: range, bad: int | None = None) -> None:
    """Steps through ``scaler`` with the gradients of :func:`take_steps`, scaled; ``bad`` is a step with an inf."""
    params = all_params(optimizer)
    for t in steps:
        scale = scaler.scale(torch.ones((), device=DEVICE))
        grads = [g * scale for g in gradients(params, t)]
        if t == bad:
            grads[0].view(-1)[0] = math.inf
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        scaler.step(optimizer)
        left = grads if optimizer._step_supports_amp_scaling else [g / scale for g in grads]
        for p, g in zip(params, left, strict=True):
            assert_same_bits(raw(p.grad), raw(g))
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scaler.update()


@pytest.mark.parametrize("maximize", [False, True])
def test_scaled_gradients_give_the_bits_of_unscaled_ones(compile_mode: bool, amp_scaling: bool, maximize: bool) -> None:
    options = {**BASE, "maximize": maximize, "amp_scaling": amp_scaling, "compile": compile_mode}
    plain, scaled = (Lamb16(parameters(), **options) for _ in range(2))
    take_steps(plain, range(6))
    take_steps(scaled, range(1))
    scaled_steps(scaled, torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2), range(1, 5))
    take_steps(scaled, range(5, 6))
    assert_same(snapshot(plain), snapshot(scaled))


def test_a_found_inf_skips_every_tensor(compile_mode: bool, amp_scaling: bool) -> None:
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    optimizer = Lamb16(parameters(), **BASE, amp_scaling=amp_scaling, compile=compile_mode)
    scaled_steps(optimizer, scaler, range(2))
    before = snapshot(optimizer)
    scaled_steps(optimizer, scaler, range(2, 3), bad=2)
    assert_same(before, snapshot(optimizer))
    assert scaler.get_scale() == 512
    assert optimizer.skipped == (3 if amp_scaling else 0), "what the scaler skips is no step"
    scaled_steps(optimizer, scaler, range(3, 4))
    plain = Lamb16(parameters(), **BASE, compile=compile_mode)
    take_steps(plain, [0, 1, 3])
    assert_same(snapshot(plain), snapshot(optimizer))


@pytest.mark.parametrize("shape", [(3,), (4096,), (3000,)], ids=str)
def test_a_found_inf_counts_every_tensor_once(compile_mode: bool, shape: tuple[int, ...]) -> None:
    optimizer = Lamb16(parameters([shape]), **BASE, amp_scaling=True, compile=compile_mode)
    scaled_steps(optimizer, torch.amp.GradScaler(DEVICE.type), range(2), bad=1)
    assert optimizer.skipped == 1


def test_gradients_may_be_unscaled_and_clipped_before_the_step(amp_scaling: bool) -> None:
    clipped, plain = (Lamb16(parameters(), **BASE, amp_scaling=amp_scaling, compile=False) for _ in range(2))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    for t in range(2):
        params = all_params(clipped)
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g * scaler.scale(torch.ones((), device=DEVICE))
        scaler.unscale_(clipped)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(clipped)
        scaler.update()
        params = all_params(plain)
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        plain.step()
    assert_same(snapshot(clipped), snapshot(plain))


def test_clipping_with_a_gradient_scaler_is_clipping_without(compile_mode: bool, amp_scaling: bool) -> None:
    """The norm is that of the unscaled gradients; a factor of a power of two and the clip factor are one factor."""
    options = {**BASE, "max_grad_norm": 0.7, "amp_scaling": amp_scaling, "compile": compile_mode}
    plain, scaled = (Lamb16(parameters(), **options) for _ in range(2))
    take_steps(plain, range(3))
    norm = plain.grad_norm.item()
    scaled_steps(scaled, torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10), range(3))
    assert_same(snapshot(plain), snapshot(scaled))
    assert scaled.grad_norm.item() == pytest.approx(norm, rel=1e-12)


def test_float16_gradients_need_the_step_to_unscale_them(amp_scaling: bool) -> None:
    """The scaler divides no float16 gradients; the step takes them."""
    optimizer = Lamb16(parameters(dtype=torch.float16), **BASE, amp_scaling=amp_scaling, compile=False)
    plain = Lamb16(parameters(dtype=torch.float16), **BASE, compile=False)
    take_steps(plain, range(2))
    expected = nullcontext() if amp_scaling else pytest.raises(ValueError, match="unscale FP16 gradients")
    with expected:
        scaled_steps(optimizer, torch.amp.GradScaler(DEVICE.type, init_scale=2.0), range(2))
        assert_same(snapshot(optimizer), snapshot(plain))


def test_amp_scaling_survives_copies_and_is_checked(amp_scaling: bool) -> None:
    optimizer = Lamb16(parameters(), **BASE, amp_scaling=amp_scaling)
    for other in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._step_supports_amp_scaling is amp_scaling
    assert Lamb16(parameters())._step_supports_amp_scaling is False, "as trainers expect"
    with pytest.raises(ValueError, match="amp_scaling=1 is invalid"):
        Lamb16(parameters(), amp_scaling=1)
    with pytest.raises(ValueError, match="amp_scaling cannot be set in a parameter group"):
        Lamb16([{"params": parameters(), "amp_scaling": not amp_scaling}], amp_scaling=amp_scaling)


def test_grad_norm_is_over_all_groups_kinds_and_finite_tensors(compile_mode: bool) -> None:
    params = [*parameters([(7,), (2100,)]), *parameters([(9,)], dtype=torch.bfloat16), *parameters([(4,)], seed=1)]
    groups = [{"params": params[:1]}, {"params": params[1:], "caution": True}]
    optimizer = Lamb16(groups, **BASE, compile=compile_mode)
    assert optimizer.grad_norm is None
    take_steps(optimizer, [0])
    assert optimizer.grad_norm is None
    optimizer.max_grad_norm = math.inf
    for p, g in zip(params, gradients(params, 1), strict=True):
        p.grad = g
    params[3].grad[0] = math.nan
    optimizer.step()
    exact = torch.cat([p.grad.double().view(-1) for p in params[:3]]).norm().item()
    assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-6)
    assert (optimizer.grad_norm.shape, optimizer.grad_norm.dtype) == ((), torch.float64)
    assert optimizer.skipped == 1
    before = optimizer.grad_norm.item()
    plain = Lamb16(parameters(), **BASE, max_grad_norm=math.inf, compile=compile_mode)
    unclipped = Lamb16(parameters(), **BASE, compile=compile_mode)
    for each in (plain, unclipped):
        take_steps(each, range(2))
    assert_same(snapshot(plain), snapshot(unclipped))
    optimizer.max_grad_norm = None
    take_steps(optimizer, [2])
    assert optimizer.grad_norm is None
    assert before > 0


class NoSync(TorchDispatchMode):
    """Fails on every operation that brings a value to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back(compile_mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Lamb16(parameters(), **BASE, max_grad_norm=0.5, compile=compile_mode)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler(DEVICE.type)
    found_inf, scale = torch.zeros((), device=DEVICE), scaler.scale(torch.full((), 4.0, device=DEVICE))
    take_steps(optimizer, [0])
    before = snapshot(optimizer)

    def refuse(*args: object) -> None:
        raise AssertionError("a value was brought to the host")

    with monkeypatch.context() as patch, NoSync() if not compile_mode else nullcontext():
        for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        optimizer.step()
        scheduler.step()
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        optimizer.step()
        optimizer.layer_stats()
    assert "0.weight" in differing(before, snapshot(optimizer))


def test_creating_the_state_reads_nothing_back() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    with NoSync():
        take_steps(optimizer, [0])
    assert len(optimizer.state) == 3


# -- what can be read --------------------------------------------------------------------------------------------


def test_the_state_is_plain_tensors() -> None:
    optimizer = Lamb16([{"params": parameters()}, {"params": parameters(), "moment_dtype": "float32"}], **BASE)
    take_steps(optimizer, [0])
    for group in optimizer.param_groups:
        exact = group["moment_dtype"] == "float32"
        for p in group["params"]:
            state = optimizer.state[p]
            assert set(state) == set(ENTRIES)
            assert all(type(value) is torch.Tensor and not value.requires_grad for value in state.values())
            assert [state[key].shape for key in CODES] == [p.shape, p.shape]
            assert state["exp_avg_codes"].dtype == (torch.float32 if exact else torch.float8_e4m3fn)
            assert state["exp_avg_sq_codes"].dtype == (torch.float32 if exact else torch.float8_e5m2)
            assert state["exp_avg_scale"].dtype == state["exp_avg_sq_scale"].dtype == torch.float32
            assert all(state[key].shape == () for key in SCALARS)


def test_codes_times_norm_are_close_to_the_moments() -> None:
    p = parameters([(64, 48)])[0]
    optimizer = Lamb16([p], **BASE, compile=False)
    take_steps(optimizer, [0])
    grad, state = gradients([p], 0)[0], optimizer.state[p]
    for key, moment in (("exp_avg", 0.1 * grad), ("exp_avg_sq", 0.001 * grad**2)):
        stored = state[f"{key}_codes"].float() * state[f"{key}_scale"]
        assert float((stored - moment).norm() / moment.norm()) < 0.1


def test_layer_stats_are_the_references(compile_mode: bool) -> None:
    network = model()
    optimizer = Lamb16(network.named_parameters(), **BASE, compile=compile_mode)
    assert optimizer.layer_stats() == {}
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    take_steps(optimizer, [0])
    stats = optimizer.layer_stats()
    assert list(stats) == [name for name, _ in network.named_parameters()]
    for name, p, before, grad in zip(stats, params, start, gradients(params, 0), strict=True):
        state = reference.init(before, int(optimizer.state[p]["salt"]) & 0xFFFFFFFF)
        expected = reference.step(before.cpu(), grad.cpu(), state, Hyper(**BASE))[2]
        assert set(stats[name]) == {"weight_norm", "update_norm", "trust_ratio"}
        for key, value in stats[name].items():
            assert value.item() == pytest.approx(getattr(expected, key), rel=1e-12)
    kept = {name: entry["weight_norm"].item() for name, entry in stats.items()}
    take_steps(optimizer, [1])
    assert {name: entry["weight_norm"].item() for name, entry in stats.items()} == kept  # a copy, not a view


def test_layer_stats_cover_the_tensors_of_the_last_step() -> None:
    params = parameters([(3,), (0,), (2500,)])
    optimizer = Lamb16(params, **BASE, compile=False)
    take_steps(optimizer, [0])
    assert list(optimizer.layer_stats()) == ["0", "2"]
    params[0].grad = None
    optimizer.step()
    assert list(optimizer.layer_stats()) == ["2"]


def test_repr_shows_the_hyperparameters() -> None:
    text = repr(Lamb16(parameters(), **BASE))
    assert text.startswith("Lamb16 (")
    assert "trust_scale: 0.382" in text


# -- what a long-lived training script does ----------------------------------------------------------------------


def test_replaced_parameters_do_not_keep_their_states_alive() -> None:
    """Pruning and growing: a parameter and its state leave, others come."""
    optimizer = Lamb16([{"params": parameters([(30,)])}, {"params": parameters([(2100,)])}], **BASE, compile=False)
    take_steps(optimizer, [0])
    dropped = []
    for t in range(1, 5):
        old = optimizer.param_groups[0]["params"][0]
        dropped.append(weakref.ref(optimizer.state.pop(old)["exp_avg_codes"]))
        optimizer.param_groups[0]["params"][0] = parameters([(30 + t,)])[0]
        take_steps(optimizer, [t])
    del old
    gc.collect()
    assert [ref() for ref in dropped] == [None] * 4
    assert int(optimizer.state[optimizer.param_groups[1]["params"][0]]["step"]) == 5
    assert list(optimizer.layer_stats()) == ["0", "1"]


def test_an_emptied_state_starts_anew() -> None:
    a, b, c = parameters([(7,), (2100,), (5,)])
    optimizer = Lamb16([a, b, c], **BASE, compile=False)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    optimizer.state[a].clear()
    a.grad, c.grad = None, torch.ones_like(c)
    optimizer.step()
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == [1, 3, 2]


def test_a_learning_rate_a_hair_below_zero_is_no_error(compile_mode: bool) -> None:
    """Some schedulers end there. It may be stepped with, saved and loaded."""
    optimizer = Lamb16(parameters(), **BASE, compile=compile_mode)
    take_steps(optimizer, [0])
    before = [p.detach().clone() for p in all_params(optimizer)]
    optimizer.param_groups[0]["lr"] = -1e-18
    all_params(optimizer)[0].grad = None
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, [1])
    optimizer.param_groups[0]["lr"] = torch.tensor(-1e-12)
    take_steps(optimizer, [2])
    assert all(torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in zip(all_params(optimizer), before, strict=True))
    for lr in (-1e-3, torch.tensor(-1e-8, dtype=torch.float64)):
        after = snapshot(optimizer)
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match=r"lr=.*-.* is invalid; it must be a finite number >= 0"):
            take_steps(optimizer, [3])
        optimizer.param_groups[0]["lr"] = torch.tensor(-1e-12)
        assert_same(snapshot(optimizer), after)


def test_a_hyperparameter_changed_to_a_wrong_value_is_refused_before_anything_moves(compile_mode: bool) -> None:
    optimizer = Lamb16([{"params": parameters()}, {"params": parameters(seed=1)}], **BASE, compile=compile_mode)
    take_steps(optimizer, [0])
    wrong = [("lr", -1e-8), ("lr", str(BASE["lr"])), ("betas", (0.9, 1.5)), ("eps", 0.0), ("trust_clip", -1.0)]
    for name, value in [*wrong, ("weight_decay", float("nan"))]:
        before, right = snapshot(optimizer), optimizer.param_groups[1][name]
        optimizer.param_groups[1][name] = value
        with pytest.raises(ValueError, match=rf"{name}=.*{value}".replace("(", r"\(").replace(")", r"\)")):
            take_steps(optimizer, [1])
        optimizer.param_groups[1][name] = right
        assert_same(before, snapshot(optimizer))


def test_names_that_two_groups_share_are_told_apart() -> None:
    """As for two modules, each with named parameters of its own."""
    groups = [{"params": list(torch.nn.Linear(3, 2).named_parameters())} for _ in range(2)]
    optimizer = Lamb16(groups, **BASE, compile=False)
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert list(optimizer.layer_stats()) == ["weight", "bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("names", [
    ["w"] * 2, ["w"] * 3, ["w"] * 5, ["w", "w", "0.w"], ["0.w", "w", "w"], ["w", "0.w.2", "w", "w", "0.w", "1.w"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_no_weight_is_lost_where_several_have_one_name(names: list[str], groups: int) -> None:
    shapes = [(2, k + 1) for k in range(len(names) * groups)]
    params = parameters(shapes, torch.bfloat16)
    pairs = list(zip(names * groups, params, strict=True))
    parts = [pairs[k::groups] for k in range(groups)]
    optimizer = Lamb16([{"params": part} for part in parts], **BASE, param_rounding="exact", compile=False)
    take_steps(optimizer, [0, 1])
    weights, stats = optimizer.float32_weights(), optimizer.layer_stats()
    assert len(weights) == len(stats) == len(params)
    assert list(weights) == list(stats) == list(optimizer.float32_weights())
    assert [weights[key].shape for key in weights] == [p.shape for p in all_params(optimizer)]
    for name in {*names}:
        first = next(p for q, p in (pair for part in parts for pair in part) if q == name)
        assert weights[name].shape == first.shape, "a name is the first parameter's that has it"
    with torch.no_grad():
        for p in params:
            p.zero_()
    optimizer.load_float32_weights(weights)
    assert_same(optimizer.float32_weights(), weights)


def test_states_of_one_name_are_loaded_each_for_itself() -> None:
    """One with another shape stays as it is, and says nothing of the others."""
    source = Lamb16([("w", p) for p in parameters([(3,), (4,), (5,)])], **BASE, compile=False)
    step_with(source, [torch.ones(3, device=DEVICE), torch.ones(4, device=DEVICE), None])
    target = Lamb16([("w", p) for p in parameters([(3,), (7,), (5,)])], **BASE, compile=False)
    take_steps(target, [0])
    kept = dict(target.state[all_params(target)[1]])
    assert target.load_state_dict(source.state_dict(), strict=False).mismatched_keys == ["w"]
    first, second, third = all_params(target)
    assert_same(target.state[first], source.state[all_params(source)[0]])
    assert_same(target.state[second], kept)
    assert third not in target.state, "the state dict has none for it"


def test_a_state_without_an_entry_is_refused_by_name() -> None:
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    take_steps(optimizer, [0])
    del optimizer.state[all_params(optimizer)[1]]["salt"]
    before = [p.detach().clone() for p in all_params(optimizer)]
    with pytest.raises(ValueError, match=r"parameter 1 has no \['salt'\]"):
        take_steps(optimizer, [1])
    assert all(torch.equal(p, q) for p, q in zip(all_params(optimizer), before, strict=True))


def test_kinds_side_by_side_change_kind_and_keep_their_state(compile_mode: bool) -> None:
    """Float32 and bfloat16 parameters in one group; one changes its dtype between steps, as model.bfloat16() does."""
    params = [*parameters([(7,), (2100,)]), *parameters([(9,)], dtype=torch.bfloat16)]
    optimizer = Lamb16(params, **BASE, compile=compile_mode)
    take_steps(optimizer, [0])
    params[0].grad, params[0].data = None, params[0].data.bfloat16()
    take_steps(optimizer, [1, 2])
    params[0].grad, params[0].data = None, params[0].data.float()
    take_steps(optimizer, [3])
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 4, 4]
    assert [p.dtype for p in params] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("rows", [2, 64])
def test_what_is_packed_in_batches_does_not_mix(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small tensors of very different gradients, one of them not finite, give the bits of one optimizer each."""
    monkeypatch.setattr(row_plan, "BATCH", rows)
    generator = torch.Generator().manual_seed(0)
    sizes = [1 + 613 * k % 1999 for k in range(60)]
    starts = [torch.randn(n, generator=generator) for n in sizes]
    together, alone = ([nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    names = [str(k) for k in range(len(sizes))]
    options = {"lr": 0.01, "max_grad_norm": math.inf}
    one = Lamb16(list(zip(names, together, strict=True)), **options)
    each = [Lamb16([(name, p)], **options) for name, p in zip(names, alone, strict=True)]
    for step in range(3):
        grads = [torch.randn(n, generator=generator) * 10.0 ** (k % 7 - 3) for k, n in enumerate(sizes)]
        if step == 1:
            grads[7][-1] = math.inf
        for p, q, grad in zip(together, alone, grads, strict=True):
            p.grad, q.grad = grad, grad.clone()
        one.step()
        for optimizer in each:
            optimizer.step()
        finite = torch.cat([grad for grad in grads if grad.isfinite().all()])
        assert float(one.grad_norm) == pytest.approx(float(finite.double().norm()), rel=1e-6)
    assert len(one._stepper.last[0].plan.batches) > 1
    assert one.skipped == 1
    for p, q, optimizer in zip(together, alone, each, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(_bits_of(one.state[p][k]), _bits_of(optimizer.state[q][k])) for k in ENTRIES)


def _bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x


@pytest.mark.parametrize("shape", [(3000,), (5,)])
def test_a_gradient_of_another_shape_is_refused(compile_mode: bool, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    optimizer = Lamb16([("w", p)], compile=compile_mode)
    p.grad = torch.ones(1 + shape[0])[:-1]
    p.data = torch.ones(2 * shape[0])
    with pytest.raises(RuntimeError, match=r"parameter w has shape .* its gradient .* None"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))
    assert not optimizer.state


@pytest.mark.parametrize("numel", [3000, 2048, 5])
def test_a_step_marks_weights_as_changed(compile_mode: bool, numel: int) -> None:
    """As autograd needs to know, and as in-place operations do."""
    p = nn.Parameter(torch.ones(numel))
    optimizer = Lamb16([p], compile=compile_mode)
    p.grad = torch.ones(numel)
    optimizer.step()
    before = p._version
    loss = (p * p).sum()
    optimizer.step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
