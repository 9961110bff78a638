"""Gradient release: the bits of ordinary steps, less memory, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import parallel
import refused
from helpers import SCHEDULERS, all_params, assert_same, differing, snapshot
from lamb16 import Lamb16, release, release_gradients, stepping
from ranks import Ranks
from test_whole_step import DYNAMOS_WARNINGS

BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}


class Network(nn.Module):
    """Tied weights, a branch that not every step takes, a frozen layer, tensors with rows and without."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 40)
        self.first, self.norm = nn.Linear(40, 70), nn.LayerNorm(70)
        self.branch, self.last = nn.Linear(70, 70), nn.Linear(70, 40)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)

    def forward(self, x: Tensor, branch: bool = False) -> Tensor:
        h = torch.tanh(self.norm(self.first(self.frozen(self.embedding(x)))))
        if branch:
            h = h + self.branch(h)
        return F.linear(self.last(h), self.embedding.weight)


def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases without decay, a layer with other options, one with other moments."""
    named = list(model.named_parameters())
    special = {"last.weight": {"caution": True, "lr": 0.02}, "norm.weight": {"moment_dtype": "float32"}}
    rest = [(name, p) for name, p in named if name not in special]
    return [
        {"params": [(name, p) for name, p in rest if p.dim() > 1]},
        {"params": [(name, p) for name, p in rest if p.dim() == 1], "weight_decay": 0.0, "nesterov": False},
        *({"params": [(name, p)], **special[name]} for name, p in named if name in special),
    ]


def make(compile: bool = False, **options: Any) -> tuple[Network, Lamb16]:
    model = network()
    return model, Lamb16(groups(model), **BASE, **options, compile=compile)


def loss_of(model: nn.Module, t: int, branch: bool | None = None) -> Tensor:
    x = torch.randint(0, 60, (4, 6), generator=torch.Generator().manual_seed(t))
    return F.cross_entropy(model(x, t % 3 == 1 if branch is None else branch).flatten(0, 1), x.flatten())


def train(model: nn.Module, optimizer: Lamb16, steps: range, after: Callable[[int], None] = lambda t: None) -> None:
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
        after(t)


# 0: each parameter on its own; 3,000: the large ones alone, the others in two buckets; then all in one.
BUCKETS = [0, 3000, 1 << 24]


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
def test_the_bits_are_those_of_ordinary_steps(bucket_bytes: int, compile_mode: bool) -> None:
    (model, optimizer), (other, ordinary) = make(compile_mode), make(compile_mode)
    release_gradients(model, optimizer, bucket_bytes=bucket_bytes)

    def compare(t: int) -> None:
        assert_same(snapshot(optimizer), snapshot(ordinary))
        mine, theirs = optimizer.layer_stats(), ordinary.layer_stats()
        assert mine == theirs
        assert ("branch.weight" in mine) == (t % 3 == 1)

    for t in range(7):
        if t == 5:  # as it may be in fine-tuning: the gradient of what was frozen is released, too
            model.frozen.requires_grad_(True)
            other.frozen.requires_grad_(True)
        train(model, optimizer, range(t, t + 1))
        assert [p.grad for p in all_params(optimizer) if p.grad is not None] == []
        train(other, ordinary, range(t, t + 1))
        compare(t)
    assert len(optimizer.state) == len(all_params(optimizer))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_steer_released_steps(name: str) -> None:
    """Without a warning that optimizer.step() was not called; warnings are errors here."""
    found = []
    for released in (True, False):
        model, optimizer = network(), None
        optimizer = Lamb16(model.named_parameters(), lr=0.01, compile=False)
        scheduler = SCHEDULERS[name](optimizer)
        if released:
            release_gradients(model, optimizer)
        arguments = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
        train(model, optimizer, range(5), lambda t, step=scheduler.step, given=arguments: step(*given))  # type: ignore[misc]
        found.append(snapshot(optimizer))
    assert_same(*found)


def test_a_tensor_that_is_skipped_is_counted_and_no_other() -> None:
    found = []
    for released in (True, False):
        model, optimizer = make()
        if released:
            release_gradients(model, optimizer, bucket_bytes=3000)
        step = [0]
        model.first.weight.register_hook(lambda g, step=step: g * math.nan if step[0] == 2 else g)  # type: ignore[misc]
        train(model, optimizer, range(4), lambda t, step=step: step.__setitem__(0, t + 1))  # type: ignore[misc]
        assert optimizer.skipped == 1
        found.append(snapshot(optimizer))
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_are_stepped_as_ever(reentrant: bool) -> None:
    """Reentrant ones are backward passes within the pass: nothing of theirs is an iteration of its own."""

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:3]:
                x = checkpoint(layer, torch.tanh(x), use_reentrant=reentrant)
            return self.layers[3](x)

    found, plans = [], []
    for released in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Segments()
        optimizer = Lamb16(model.named_parameters(), **BASE, compile=False)
        if released:
            release_gradients(model, optimizer)
        for t in range(3):
            x = torch.randn(5, 30, generator=torch.Generator().manual_seed(t)).requires_grad_()
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        plans.append(len(optimizer._stepper.plans))
        found.append(snapshot(optimizer))
    assert_same(*found)
    assert plans == [1, 1]


def test_gradients_that_are_only_computed_step_nothing() -> None:
    """A gradient penalty: torch.autograd.grad accumulates nothing; the backward pass through it does."""
    found = []
    for released in (True, False):
        model, optimizer = make()
        if released:
            release_gradients(model, optimizer, bucket_bytes=0)
        for t in range(3):
            before = snapshot(optimizer)
            loss, weight = loss_of(model, t), model.last.weight
            (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
            assert_same(snapshot(optimizer), before)
            (loss + grad.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(snapshot(optimizer))
    assert_same(*found)


def test_a_closure_runs_the_backward_pass_and_its_loss_comes_back() -> None:
    (model, optimizer), (other, ordinary) = make(), make()
    release_gradients(model, optimizer)
    for t in range(3):

        def closure(model: Network = model, optimizer: Lamb16 = optimizer, t: int = t) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, t)
            loss.backward()
            return loss.item()

        assert optimizer.step(closure) == loss_of(other, t).item()
        train(other, ordinary, range(t, t + 1))
    assert_same(snapshot(optimizer), snapshot(ordinary))


# -- memory and plans --------------------------------------------------------------------------------------------


class Alive:
    """Bytes of the parameters' gradients that exist at once, at most, seen each time that one is complete."""

    def __init__(self, model: nn.Module) -> None:
        self.peak, self.grads = 0, dict[int, tuple[weakref.ref[Tensor], int]]()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.see)  # type: ignore[no-untyped-call]

    def see(self, p: Tensor) -> None:
        assert p.grad is not None
        self.grads[id(p)] = weakref.ref(p.grad.untyped_storage()), p.grad.nbytes
        self.peak = max(self.peak, sum(size for grad, size in self.grads.values() if grad() is not None))


def deep(layers: int = 20) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(50, 50) for _ in range(layers)))


@pytest.mark.parametrize("bucket_bytes", [0, 25_000, None])
def test_gradients_do_not_exist_all_at_once(bucket_bytes: int | None, compile_mode: bool) -> None:
    model = deep()
    alive = Alive(model)
    optimizer = Lamb16(model.named_parameters(), compile=compile_mode)
    everything = sum(p.nbytes for p in model.parameters())
    if bucket_bytes is not None:
        release_gradients(model, optimizer, bucket_bytes=bucket_bytes)
    for _ in range(3):
        model(torch.ones(2, 50)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    largest = 50 * 50 * 4
    if bucket_bytes is None:
        assert alive.peak == everything, "without release: what is counted is there"
    else:
        assert alive.peak <= 2 * bucket_bytes + 2 * largest < everything / 2


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors were stepped by each step that looked at everything."""
    numbers: list[int] = []
    original = stepping.Stepper._prepare

    def prepare(*arguments: Any) -> Any:
        plans = original(*arguments)
        numbers.append(sum(len(plan.present) for plan in plans))
        return plans

    monkeypatch.setattr(stepping.Stepper, "_prepare", prepare)
    return numbers


def test_steady_steps_make_no_plans(made: list[int]) -> None:
    """However many buckets there are, and whatever is missing in one."""
    model = deep(24)
    extra = nn.Linear(50, 50)
    optimizer = Lamb16([*model.named_parameters(), *((f"extra.{k}", p) for k, p in extra.named_parameters())])
    release_gradients(nn.ModuleList([model, extra]), optimizer, bucket_bytes=20_000)

    def step(with_extra: bool) -> None:
        h = model[0](torch.ones(2, 50))
        h = h + extra(h) if with_extra else h
        model[1:](h).sum().backward()
        optimizer.step()

    step(True)
    assert sum(made) == len(all_params(optimizer))
    assert len(made) > 8
    assert len(optimizer._stepper.plans) == 1
    made.clear()
    for t in range(6):
        step(t % 2 == 1)
    assert made == []


def test_any_part_of_a_bucket_is_stepped_by_its_plan(made: list[int]) -> None:
    model = deep(24)
    optimizer = Lamb16(model.named_parameters(), compile=False)
    release_gradients(model, optimizer, bucket_bytes=20_000)
    for biases in (True, False, False, True):
        for layer in model:
            layer.bias.requires_grad_(biases)  # type: ignore[union-attr, operator]
        model(torch.ones(2, 50)).sum().backward()
        optimizer.step()
        if biases:
            made.clear()
    assert made == []


def test_parts_of_a_bucket_in_one_iteration_keep_their_stats() -> None:
    (model, optimizer), (other, ordinary) = (
        (two := nn.ModuleList(nn.Linear(4, 5 + k) for k in range(2)), Lamb16(two.named_parameters(), compile=False))
        for _ in range(2)
    )
    other.load_state_dict(model.state_dict())
    release_gradients(model, optimizer)
    for own, each in ((model, optimizer), (other, ordinary)):
        for together in (True, False):
            each.zero_grad()
            losses = [(k + layer(torch.ones(2, 4))).square().sum() for k, layer in enumerate(own)]
            for loss in [sum(losses)] if together else losses:
                loss.backward()  # type: ignore[union-attr]
            each.step()
    assert len(optimizer._stepper.last) == 2, "two steps of one plan"
    assert optimizer.layer_stats() == ordinary.layer_stats()
    assert_same(snapshot(optimizer), snapshot(ordinary))


def test_small_tensors_share_a_step(made: list[int]) -> None:
    model = deep()
    release_gradients(model, optimizer := Lamb16(model.named_parameters(), compile=False), bucket_bytes=50_000)
    model(torch.ones(2, 50)).sum().backward()
    optimizer.step()
    assert made == [10, 10, 10, 10], "five layers of 10,200 bytes reach 50,000"


@pytest.mark.parametrize("removed", [False, True])
def test_an_optimizer_that_was_dropped_is_freed(removed: bool) -> None:
    """Hooks on a model keep no optimizer alive, and do nothing without it."""
    model, optimizer = make()
    handle = release_gradients(model, optimizer)
    train(model, optimizer, range(2))
    codes = weakref.ref(next(iter(optimizer.state.values()))["exp_avg_codes"])
    if removed:
        handle.remove()
    del handle
    gc.disable()  # no cycles
    try:
        del optimizer
        assert codes() is None
    finally:
        gc.enable()
    loss_of(model, 0).backward()
    assert model.first.weight.grad is not None


# -- beginning and end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["remove", "with"])
def test_ordinary_and_released_steps_may_follow_each_other(way: str, compile_mode: bool) -> None:
    (model, optimizer), (other, ordinary) = make(compile_mode), make(compile_mode)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    if way == "remove":
        handle = release_gradients(model, optimizer)
        train(model, optimizer, range(1, 3))
        handle.remove()
        handle.remove()
    else:
        with release_gradients(model, optimizer, bucket_bytes=0):
            train(model, optimizer, range(1, 3))
    loss_of(model, 3).backward()
    assert model.first.weight.grad is not None, "ordinary again"
    optimizer.step()
    train(model, optimizer, range(4, 6))
    train(other, ordinary, range(6))
    assert_same(snapshot(optimizer), snapshot(ordinary))
    assert len(optimizer._stepper.plans) == 3, "a plan per kind"
    optimizer.zero_grad()
    with release_gradients(model, optimizer):
        train(model, optimizer, range(6, 7))


def test_what_waits_when_a_release_is_removed_is_stepped_with_its_pass() -> None:
    (model, optimizer), (other, ordinary) = make(), make()
    handle = release_gradients(model, optimizer)
    last = model.first.bias.register_hook(lambda g: handle.remove())
    loss_of(model, 1).backward()
    last.remove()
    left = [p for p in all_params(optimizer) if p.grad is not None]
    assert any(p is model.embedding.weight for p in left)
    assert not any(p is model.last.weight for p in left)
    optimizer.step()
    train(other, ordinary, range(1, 2))
    assert_same(snapshot(optimizer), snapshot(ordinary))


def test_checkpoints_are_saved_and_loaded_while_gradients_are_released(compile_mode: bool) -> None:
    model, optimizer = make(compile_mode)
    release_gradients(model, optimizer, bucket_bytes=3000)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, range(2, 5))
    expected = snapshot(optimizer)
    file.seek(0)
    for released in (True, False):  # into the same ones, and into others that take ordinary steps
        if not released:
            model, optimizer = make(compile_mode)
            file.seek(0)
        weights, state = torch.load(file)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert differing(snapshot(optimizer), expected)
        train(model, optimizer, range(2, 5))
        assert_same(snapshot(optimizer), expected)


def test_copies_are_ordinary() -> None:
    model, optimizer = make()
    release_gradients(model, optimizer)
    train(model, optimizer, range(1))
    with pytest.warns(
        UserWarning, match=r"an ordinary one.*call release_gradients\(model, optimizer\) with the copies"
    ):
        twin, copied = copy.deepcopy((model, optimizer))
    assert copied._own_options() == optimizer._own_options()
    loss_of(twin, 1).backward()
    assert twin.first.weight.grad is not None
    copied.step()
    train(model, optimizer, range(1, 2))
    assert_same(snapshot(copied), snapshot(optimizer))


def test_a_group_that_is_added_is_released() -> None:
    found = []
    for released in (True, False):
        model = network()
        named = dict(model.named_parameters())
        late = [(name, named.pop(name)) for name in ("last.weight", "norm.bias")]
        optimizer = Lamb16(named.items(), **BASE, compile=False)
        if released:
            release_gradients(model, optimizer)
        train(model, optimizer, range(2))
        for _, p in late:
            p.grad = None
        optimizer.add_param_group({"params": late, "lr": 0.02})
        train(model, optimizer, range(2, 4))
        found.append(snapshot(optimizer))
    assert_same(*found)


def test_a_group_that_cannot_be_released_is_not_added() -> None:
    model, optimizer = make()
    release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="parameter late is not the model's"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))]})
    assert len(optimizer.param_groups) == 4


def test_a_parameter_that_is_resized_is_released() -> None:
    found = []
    for released in (True, False):
        model = nn.ParameterDict({name: torch.linspace(-1, 1, 30).view(6, 5) for name in "ab"})
        optimizer = Lamb16(model.named_parameters(), **BASE, compile=False)
        if released:
            release_gradients(model, optimizer)
        for t in range(4):
            if t == 2:
                old, index = model["a"], torch.tensor([5, 0, -1, 2])
                model["a"] = new = nn.Parameter(old.detach()[index].clone())
                optimizer.resize(old, index, new)
            (model["a"].square().sum() * model["b"].sum()).backward()
            assert (model["a"].grad is None) == released
            optimizer.step()
            optimizer.zero_grad()
        assert len(optimizer._stepper.plans) == 1
        found.append(snapshot(optimizer))
    assert_same(*found)


# -- what fails --------------------------------------------------------------------------------------------------


class Failing(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise KeyError("halfway")


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_pass_that_fails_halfway_leaves_what_was_stepped_and_the_next_one_begins_anew(
    first: bool, zeroed: bool
) -> None:
    model = deep(4)
    optimizer = Lamb16(model.named_parameters(), compile=False)
    release_gradients(model, optimizer, bucket_bytes=15_000)  # two layers; the third waits, and is dropped
    other = copy.deepcopy(model)
    ordinary = Lamb16(other.named_parameters(), compile=False)

    def step(model: nn.Module, optimizer: Lamb16, t: int) -> None:
        model(torch.full((2, 50), t + 1.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    if not first:
        step(model, optimizer, 0)
        step(other, ordinary, 0)
    x = torch.ones(2, 50)
    with pytest.raises(KeyError, match="halfway"):
        model[1:](Failing.apply(model[0](x))).sum().backward()
    other[1:](other[0](x).detach()).sum().backward()
    other[1].weight.grad = other[1].bias.grad = None
    ordinary.step()
    ordinary.zero_grad()
    if zeroed:
        optimizer.zero_grad()
    for part in (slice(2, None), slice(None)):  # at first what waited has no gradient again
        step(model[part], optimizer, 1)
        step(other[part], ordinary, 1)
    assert_same(snapshot(optimizer), snapshot(ordinary))


def test_a_wrong_hyperparameter_is_told_in_the_backward_pass_before_anything_is_changed(compile_mode: bool) -> None:
    (model, optimizer), (other, ordinary) = make(compile_mode), make(compile_mode)
    release_gradients(model, optimizer)
    train(model, optimizer, range(1))
    before, lr = snapshot(optimizer), optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr=nan is invalid"):
        loss_of(model, 1).backward()
    optimizer.param_groups[0]["lr"] = lr
    assert_same(snapshot(optimizer), before)
    train(model, optimizer, range(1, 3))
    train(other, ordinary, range(3))
    assert_same(snapshot(optimizer), snapshot(ordinary))


@pytest.mark.parametrize("where", ["at the end of the pass", "in a hook"])
def test_an_error_that_is_kept_does_not_end_the_training(where: str) -> None:
    """Its traceback keeps what the pass left, which must neither stop later steps nor, once freed, drop gradients."""
    (model, optimizer), (other, ordinary) = make(), make()
    release_gradients(model, optimizer, bucket_bytes=0 if where == "in a hook" else 1 << 25)
    train(model, optimizer, range(1))
    valid = [group["eps"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["eps"] = -1.0
    with pytest.raises(ValueError, match=r"eps=-1.0 is invalid") as kept:
        loss_of(model, 1).backward()
    for group, eps in zip(optimizer.param_groups, valid, strict=True):
        group["eps"] = eps
    train(model, optimizer, range(1, 3))
    loss_of(model, 3).backward()
    del kept
    gc.collect()
    optimizer.step()
    train(model, optimizer, range(4, 5))
    train(other, ordinary, range(5))
    assert_same(snapshot(optimizer), snapshot(ordinary))


def test_several_passes_for_an_iteration_are_refused() -> None:
    model, optimizer = make()
    release_gradients(model, optimizer, bucket_bytes=0)
    loss_of(model, 0).backward()
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the gradient of parameter last.bias came a second time") as told:
            loss_of(model, 1).backward()
        assert "cannot be accumulated" in str(told.value)
        assert_same(snapshot(optimizer), before)
        optimizer.step()
        loss_of(model, 1).backward()
        before = snapshot(optimizer)
    optimizer.zero_grad()  # ends an iteration too
    loss_of(model, 2).backward()
    assert optimizer.state[model.last.bias]["step"] == 4


def test_a_graph_that_is_retained_is_not_passed_through_again() -> None:
    """Its weights are others by then, which autograd itself finds out."""
    model, optimizer = make()
    release_gradients(model, optimizer)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert_same(snapshot(optimizer), before)


def test_passes_over_different_parameters_are_one_iteration() -> None:
    found = []
    for released in (True, False):
        model = deep(4)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        optimizer = Lamb16(model.named_parameters(), compile=False)
        if released:
            release_gradients(model, optimizer)
        for _ in range(2):
            for half in (model[:2], model[2:]):
                half(torch.ones(2, 50)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(optimizer.layer_stats()) == 8
        found.append(snapshot(optimizer))
    assert_same(*found)


def test_clipping_is_refused_at_once_and_later() -> None:
    model, optimizer = make(max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 needs the norm of all gradients"):
        release_gradients(model, optimizer)
    optimizer.max_grad_norm = None
    release_gradients(model, optimizer)
    train(model, optimizer, range(1))
    before = snapshot(optimizer)
    optimizer.max_grad_norm = 2.0
    with pytest.raises(ValueError, match=r"max_grad_norm=2.0 needs the norm of all gradients"):
        loss_of(model, 1).backward()
    assert_same(snapshot(optimizer), before)
    optimizer.max_grad_norm = None
    train(model, optimizer, range(1, 2))


@pytest.mark.parametrize("amp_scaling", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_is_refused(amp_scaling: bool, unscaled: bool) -> None:
    model, optimizer = make(amp_scaling=amp_scaling)
    handle = release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler finds no gradients to divide"):
        scaler.step(optimizer)
    handle.remove()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    off = torch.amp.GradScaler("cpu", enabled=False)
    with release_gradients(model, optimizer):
        off.scale(loss_of(model, 1)).backward()
        off.step(optimizer)
    assert optimizer._step_supports_amp_scaling is amp_scaling


def test_a_gradient_that_no_pass_has_released_is_refused() -> None:
    model, optimizer = make()
    release_gradients(model, optimizer)
    train(model, optimizer, range(1))
    before = snapshot(optimizer)
    model.first.bias.grad = torch.ones(70)
    with pytest.raises(RuntimeError, match=r"parameter first.bias has a gradient at optimizer.step\(\)"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    model.first.bias.grad = None
    train(model, optimizer, range(1, 2))


def test_a_parameter_that_left_its_group_is_refused() -> None:
    model, optimizer = make()
    release_gradients(model, optimizer)
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(RuntimeError, match=r"has left the optimizer's groups; remove\(\) the release"):
        loss_of(model, 0).backward()
    assert not optimizer.state


def released_twice() -> None:
    model, optimizer = make()
    release_gradients(model, optimizer)
    release_gradients(model, optimizer)


def with_gradients() -> None:
    model, optimizer = make()
    loss_of(model, 0).backward()
    release_gradients(model, optimizer)


def of_another_model() -> None:
    model, _ = make()
    release_gradients(network(), Lamb16(model.named_parameters()))


def with_shared_memory() -> None:
    """Which an ordinary step would find out; here the two might be in different buckets."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))])
    with torch.no_grad():
        model[1].data = model[0].data[1:]
    release_gradients(model, Lamb16(model.named_parameters()))


def of_adam() -> None:
    release_gradients(model := network(), torch.optim.Adam(model.parameters()))  # type: ignore[arg-type]


def with_bucket_bytes(value: Any) -> None:
    model, optimizer = make()
    release_gradients(model, optimizer, bucket_bytes=value)


REFUSED: list[tuple[Callable[[], None], type[Exception], str]] = [
    (released_twice, RuntimeError, "releases gradients already"),
    (with_gradients, RuntimeError, "parameter embedding.weight has a gradient already"),
    (of_another_model, ValueError, "parameter embedding.weight is not the model's"),
    (with_shared_memory, ValueError, "parameter 0 and parameter 1 share memory"),
    (of_adam, TypeError, "optimizer is a Adam; give the Lamb16 itself"),
    *(
        (lambda value=value: with_bucket_bytes(value), ValueError, f"bucket_bytes={value!r}")
        for value in (-1, 1.5, True)
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED)
def test_what_cannot_be_released_is_refused(wrong: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_a_refused_release_leaves_an_ordinary_optimizer() -> None:
    model, optimizer = make()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="gradient already"):
        release_gradients(model, optimizer)
    optimizer.step()
    loss_of(model, 1).backward()
    assert model.first.weight.grad is not None


# -- compiled models ---------------------------------------------------------------------------------------------


@DYNAMOS_WARNINGS
@pytest.mark.parametrize("whole", [False, True], ids=["model", "training step"])
def test_compiled_models_are_released_and_the_hooks_not_traced(whole: bool) -> None:
    found, traced = [], []
    for released in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, optimizer = make()
        if released:
            release_gradients(model, optimizer, bucket_bytes=3000)
        called: Any = model if whole else torch.compile(model, backend="eager", fullgraph=True)

        def step(t: int, called: Any = called, optimizer: Lamb16 = optimizer) -> None:
            loss_of(called, t, branch=True).backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(step, backend="eager") if whole else step
        for t in range(3):
            run(t)
        found.append(snapshot(optimizer))
        traced.append(dict(torch._dynamo.utils.counters["frames"]))
    assert_same(*found)
    if whole:
        assert traced[0] == traced[1]
        assert traced[1]["ok"] > 0


def test_a_model_is_watched_until_its_last_release_ends() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    halves = [list(net.named_parameters())[k::2] for k in range(2)]
    one, two = (release_gradients(net, Lamb16(half, lr=0.01, compile=False)) for half in halves)
    one.remove()
    one.remove()
    assert release._MODELS[net] == 1
    two.remove()
    assert not release._MODELS[net]


# -- several ranks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bucket_bytes", [0, 1000, 1 << 24])
@pytest.mark.parametrize("how", ["FSDP2 on 2", "HSDP"])
def test_fsdp_gives_the_bits_of_one_process(ranks: Ranks, how: str, bucket_bytes: int, compile: bool) -> None:
    (expected,) = ranks.run(1, parallel.train, "one process", "backward", False, 6)
    for found, grads in ranks.run(
        math.prod(parallel.MESHES[how]), parallel.train_released, how, compile, 6, bucket_bytes
    ):
        assert_same(found, expected)
        assert grads == 0, "of the parameters that have one after the backward pass"


def test_accumulation_that_fsdp_does_itself_is_one_gradient(ranks: Ranks) -> None:
    (expected,) = ranks.run(1, parallel.train, "one process", "accumulate", False, 4)
    for found, _ in ranks.run(2, parallel.train_released, "FSDP2 on 2", False, 4, 1000, "accumulate"):
        assert_same(found, expected)


def test_tensor_parallel_parameters_are_released(ranks: Ranks) -> None:
    for how in ("TP", "TP and FSDP2"):
        world = math.prod(parallel.MESHES[how])
        for expected, (found, _) in zip(
            ranks.run(world, parallel.train, how, "backward", False, 4),
            ranks.run(world, parallel.train_released, how, False, 4, 1000),
            strict=True,
        ):
            assert_same(found, expected)


def test_ddp_is_refused_before_anything_is_changed(ranks: Ranks) -> None:
    for around, within, later, submodule in ranks.run(2, refused.released_ddp):
        for text in (around, within, later):
            assert text.startswith("RuntimeError: lamb16.release_gradients: DistributedDataParallel averages")
        assert "has a gradient at optimizer.step()" in submodule


@pytest.mark.parametrize("what", refused.RELEASED)
def test_ranks_that_differ_are_refused_on_all_of_them(ranks: Ranks, what: str) -> None:
    *_, messages = refused.RELEASED[what]
    for text, wanted in zip(ranks.run(2, refused.different_releases, what), messages, strict=True):
        assert wanted in text
