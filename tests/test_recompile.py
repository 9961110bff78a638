"""After its first step nothing a training run does makes Lamb16 compile again."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.optim import lr_scheduler

from helpers import (
    DEVICE,
    SCHEDULERS,
    SHAPES,
    all_params,
    assert_same,
    gradients,
    missing,
    model,
    parameters,
    snapshot,
    step_with,
    take_steps,
)
from lamb16 import Lamb16
from lamb16.step import compiled, examples, update
from lamb16.step.kinds import GRAPHS, Kind

BASE = {"lr": 0.01, "weight_decay": 0.1}


def graphs() -> int:
    """How many step functions there are for kinds of tensors: each is compiled once, or loaded."""
    return compiled._graph.cache_info().currsize


def traced() -> int:
    """How often Dynamo has compiled anything."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def warm(params: list[Any] | None = None, **options: Any) -> Lamb16:
    optimizer = Lamb16(parameters() if params is None else params, **{**BASE, **options})
    take_steps(optimizer, [0])
    return optimizer


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs for float32 exist; from here on compiling anything, or loading it, is an error."""
    warm()
    before = graphs(), traced()
    assert graphs() > 0
    monkeypatch.setattr(compiled, "compile_once", lambda graph, kind: pytest.fail(f"{graph.name} is made for {kind}"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert (graphs(), traced()) == before


@pytest.mark.usefixtures("frozen")
def test_learning_rates_and_step_counts() -> None:
    for lr in (0.01, torch.tensor(0.01)):
        optimizer = warm(lr=lr, bias_correction=False)
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
        for t in range(15):
            take_steps(optimizer, [t])
            scheduler.step()
        optimizer.param_groups[0]["lr"] = 0
        take_steps(optimizer, [15])


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str) -> None:
    optimizer = warm()
    scheduler = SCHEDULERS[name](optimizer)
    for t in range(4):
        take_steps(optimizer, [t])
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))


@pytest.mark.usefixtures("frozen")
def test_which_gradients_are_none() -> None:
    optimizer = warm()
    params = all_params(optimizer)
    for with_grad in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (), (0, 1, 2)):
        step_with(optimizer, [grad if i in with_grad else None for i, grad in enumerate(gradients(params, 0))])


@pytest.mark.parametrize(
    "shapes",
    [
        [()],
        [(1,)],
        [(0,)],
        [(1024,)],
        [(2, 1024)],
        [(4096,)],
        [(1025,)],
        [(3, 1000)],
        [(5,), (5,)],
        [(i,) for i in range(1, 40)],
        [(2048,), (3072,), (2048,), (500, 20), (9, 9)],
        [(7, 3, 5, 6), (64, 48), (300, 70)],
    ],
    ids=lambda shapes: f"{len(shapes)} x {shapes[-1]}",
)
@pytest.mark.usefixtures("frozen")
def test_shapes_and_numbers_of_tensors(shapes: list[tuple[int, ...]]) -> None:
    optimizer = warm(parameters(shapes))
    take_steps(optimizer, range(1, 3))


@pytest.mark.usefixtures("frozen")
def test_layouts() -> None:
    params = [p.detach().t().contiguous().t() if p.dim() == 2 else p.detach() for p in parameters(SHAPES)]
    optimizer = warm([torch.nn.Parameter(p) for p in params])
    for p in all_params(optimizer):
        wide = torch.ones(2 * p.numel(), device=p.device)
        p.grad = wide[: p.numel()].view(p.shape[::-1]).t() if p.dim() == 2 else wide[::2]
    optimizer.step()


@pytest.mark.usefixtures("frozen")
def test_hyperparameters_and_groups() -> None:
    optimizer = warm()
    changes: list[dict[str, Any]] = [
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.0)},
        {"eps": 1e-3},
        {"weight_decay": 0.0},
        {"trust_scale": 0.0},
        {"trust_lr": 1.0},
        {"trust_clip": 10.0},
        {"bias_correction": False},
        {"nesterov": False},
        {"maximize": True},
    ]
    changed = [name for change in changes for name in change]
    others = ("caution", "moment_dtype", "param_rounding")  # what code is specialised on
    assert missing(changed, "lr", *others) == set()
    for t, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        take_steps(optimizer, [t])
    optimizer.add_param_group({"params": parameters(seed=1), "weight_decay": 0.3})
    take_steps(optimizer, [20])
    optimizer.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, [21])


@pytest.mark.usefixtures("frozen")
def test_what_changes_around_a_step() -> None:
    """Threads, autocast, the default dtype, gradient mode, a reset: neither a new graph nor another result."""
    plain, changed = warm(parameters(seed=3)), warm(parameters(seed=3))
    surroundings = [
        lambda: torch.set_num_threads(2),
        lambda: torch.set_num_threads(3),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.use_deterministic_algorithms(True),
        torch._dynamo.reset,
    ]
    try:
        for t, change in enumerate(surroundings, 1):
            grads = [gradients(all_params(optimizer), t) for optimizer in (plain, changed)]
            change()
            for optimizer, own in zip((plain, changed), grads, strict=True):
                for p, grad in zip(all_params(optimizer), own, strict=True):
                    p.grad = grad
            with torch.autocast(DEVICE.type), torch.enable_grad():
                changed.step()
            torch.set_num_threads(1)
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            plain.step()
            assert_same(snapshot(plain), snapshot(changed))
    finally:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("frozen")
def test_gradient_scaling_closures_and_skips() -> None:
    network = model()
    optimizer = warm(list(network.named_parameters()))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)

    def closure() -> torch.Tensor:
        loss = network(torch.ones(2, 48, device=DEVICE)).square().sum()
        scaler.scale(loss).backward()
        return loss

    optimizer.zero_grad()
    optimizer.step(closure)
    with torch.enable_grad():
        scaler.step(optimizer)
        scaler.update()
    network[0].weight.grad.fill_(torch.inf)
    optimizer.step()
    assert optimizer.skipped == 1


@pytest.mark.usefixtures("frozen")
def test_the_guard_of_these_tests_works() -> None:
    """A function that does recompile is noticed."""
    function = torch.compile(lambda x, n: x + n, backend="eager", dynamic=False)
    function(torch.ones(2), 1)
    with pytest.raises(torch._dynamo.exc.RecompileError):
        function(torch.ones(3), 2)
    torch._dynamo.utils.counters["stats"]["unique_graphs"] -= 1


@pytest.mark.usefixtures("frozen")
def test_so_does_the_one_around_what_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was made before in this process, or is kept on disk."""
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_graph", functools.cache(compiled._Lazy))
        with pytest.raises(pytest.fail.Exception, match="is made for Kind"):
            warm()


def test_tensors_of_another_kind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the same kind are not."""
    monkeypatch.setattr(compiled, "_graph", functools.cache(compiled._Lazy))
    monkeypatch.setattr(
        compiled, "compile_once", lambda graph, kind: lambda given: update.FUNCTIONS[graph.function](*given)
    )
    found = []
    for options in ({}, {}, {"caution": True}):
        warm(**options)
        found.append(graphs())
    assert 0 < found[0] == found[1] < found[2]


def test_what_is_compiled_does_not_depend_on_the_default_dtype() -> None:
    halves = Kind(DEVICE, torch.bfloat16, torch.bfloat16, rounding="exact", caution=True)
    kinds = [Kind(DEVICE), halves]

    def dtypes() -> list[torch.dtype]:
        inputs = [examples.example_inputs(graph, graph.kind(kind)) for graph in GRAPHS for kind in kinds]
        return [x.dtype for x in examples.flatten(inputs) if isinstance(x, torch.Tensor)]

    before = dtypes()
    torch.set_default_dtype(torch.float64)
    try:
        assert dtypes() == before
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_first_step_does_not_depend_on_the_default_dtype(compile: bool) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        params = parameters()
        grads = [gradients(params, t) for t in range(2)]
        torch.set_default_dtype(dtype)
        try:
            optimizer = Lamb16(params, **BASE, max_grad_norm=1.0, compile=compile)
            for own in grads:
                step_with(optimizer, own)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(snapshot(optimizer))
    assert_same(*found)
