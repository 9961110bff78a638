"""Frozen parameters that could not be stepped: beside them the others are trained as without them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from helpers import DEVICE
from lamb16 import Lamb16, checkpoint, release_gradients

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="some of these dtypes have no kernels elsewhere")

ODD: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: torch.ones(3, 4, dtype=torch.uint8),
    "int8": lambda: torch.ones(3, 4, dtype=torch.int8),
    "bool": lambda: torch.ones(3, 4, dtype=torch.bool),
    "float8": lambda: torch.ones(3, 4).to(torch.float8_e4m3fn),
    "float16, exact": lambda: torch.ones(3, 4, dtype=torch.float16),
    "float64": lambda: torch.full((3, 4), 1 / 3, dtype=torch.float64),
    "complex": lambda: torch.ones(3, 4, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "subclass": lambda: TwoTensor(torch.ones(3, 4), torch.ones(3, 4)),
}
REFUSALS = {
    "float8": "float8_e4m3fn",
    "float16, exact": "float16, and its group has param_rounding='exact'",
    "float64": "float64",
    "complex": "complex",
    "sparse": "sparse",
    "subclass": "TwoTensor, which wraps 2 tensors",
}


class Network(nn.Module):
    """Layers that are trained, and between them what is not."""

    def __init__(self, name: str | None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(4, 50)
            if name is not None:
                self.odd = nn.Parameter(ODD[name](), requires_grad=False)
            self.last = nn.Linear(50, 60)

    def loss(self, t: int) -> Tensor:
        return self.last(self.first(torch.full((2, 4), 0.1 * t + 1))).square().mean()


def made(name: str | None, compile: bool = False, **options: Any) -> tuple[Network, Lamb16]:
    """A network, and its optimizer after two steps."""
    model = Network(name)
    optimizer = Lamb16(
        model.named_parameters(), lr=0.01, weight_decay=0.1, param_rounding="exact", compile=compile, **options
    )
    train(model, optimizer, range(2))
    return model, optimizer


def train(model: Network, optimizer: Any, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        model.loss(t).backward()
        optimizer.step()


def trained(model: Network) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if name != "odd"]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ODD)
def test_the_others_are_trained_as_without_it(name: str, compile: bool) -> None:
    model = Network(name)
    train(model, torch.optim.AdamW(model.parameters()), range(2))  # which takes it
    (model, optimizer), (other, _) = made(name, compile, max_grad_norm=1.0), made(None, compile, max_grad_norm=1.0)
    assert all(map(torch.equal, trained(model), trained(other)))
    assert model.odd not in optimizer.state
    assert set(optimizer.layer_stats()) == {name for name, _ in model.named_parameters()} - {"odd"}


@pytest.mark.parametrize("name", ODD)
def test_what_walks_over_all_parameters_passes_it_by(name: str) -> None:
    model, optimizer = made(name)
    before = trained(model)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="AdamW"):
        assert len(optimizer.float32_state_dict()["state"]) == 4
    weights = optimizer.float32_weights()
    assert list(weights) == [name for name, _ in other_parameters(model)]
    optimizer.load_float32_weights(weights)
    optimizer.offload()
    optimizer.reload()
    assert all(map(torch.equal, before, trained(model)))
    if name != "sparse":  # which torch does not copy
        model, optimizer = copy.deepcopy((model, optimizer))
    if name != "float8":  # which torch does not unpickle
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    with release_gradients(model, optimizer):
        train(model, optimizer, range(2, 4))
    train(model, optimizer, range(4, 5))
    other, reference = made(None)
    train(other, reference, range(2, 5))
    assert all(map(torch.equal, trained(model), trained(other)))


def other_parameters(model: Network) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if name != "odd"]


@pytest.mark.parametrize("name", ["uint8", "int8", "bool", "float8", "float16, exact", "float64", "complex"])
def test_checkpoints_are_saved_and_loaded_with_it(name: str, tmp_path: Path) -> None:
    """The others cannot be saved by torch."""
    (model, optimizer), (twin, target) = made(name), made(name)
    train(twin, target, range(2, 4))
    checkpoint.save(tmp_path / "saved", model, optimizer)
    checkpoint.load(tmp_path / "saved", twin, target)
    assert not twin.odd.requires_grad
    for each in ((model, optimizer), (twin, target)):
        train(*each, range(2, 3))
    assert all(map(torch.equal, trained(model), trained(twin)))


@pytest.mark.parametrize("name", REFUSALS)
def test_a_gradient_of_it_is_refused_before_anything_changes(name: str) -> None:
    """As the constructor refuses what is trained from the start."""
    model = Network(name)
    model.odd.requires_grad_(True)
    with pytest.raises((TypeError, ValueError)) as refused:
        Lamb16(model.named_parameters(), param_rounding="exact")
    assert "parameter odd " in str(refused.value)
    assert REFUSALS[name] in str(refused.value)
    model, optimizer = made(name)
    model.odd.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = trained(model)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        optimizer.step()
    assert str(raised.value) == str(refused.value)
    assert all(map(torch.equal, before, trained(model)))
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_adapters_of_quantized_layers_are_trained(compile: bool) -> None:
    """LoRA: an int8 base, float32 adapters, all of them handed over, with names and without."""

    class Adapted(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.base = nn.Parameter(torch.randint(-9, 9, (size, size), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.full((size, 1), 0.02), requires_grad=False)
            self.down = nn.Parameter(torch.randn(8, size) / size**0.5)
            self.up = nn.Parameter(torch.zeros(size, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.base * self.scale).T + x @ self.down.T @ self.up.T

    torch.manual_seed(0)
    start = nn.Sequential(Adapted(64), nn.Tanh(), Adapted(64))
    x = torch.randn(32, 64)
    y = torch.roll(x, 1, 1)
    losses = {}
    for kind in ("AdamW", "named", "unnamed"):
        model = copy.deepcopy(start)
        params: Any = model.named_parameters() if kind == "named" else model.parameters()
        optimizer = torch.optim.AdamW(params, lr=0.01) if kind == "AdamW" else Lamb16(params, lr=0.03, compile=compile)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
        assert all(torch.equal(model[k].base, start[k].base) for k in (0, 2))
    first = (start(x) - y).square().mean().item()
    assert losses["AdamW"] < 0.7 * first
    assert max(losses.values()) < 0.8 * first
