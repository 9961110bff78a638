"""`lamb16 bench --memory`: what is counted as what, and who is asked for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import lamb16
from lamb16.cli import main
from lamb16.entries import TABLES
from lamb16.lab import bench, memory
from lamb16.lab.memory import Measured
from lamb16.lab.shapes import SETS

CPU = torch.device("cpu")
SHAPES = [(70, 31), (5,), (7, 3, 2, 2), (3,), (300, 200)]
SCALAR_BYTES = sum(dtype.itemsize * len(names) for dtype, names in TABLES.items())
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES)


class Greedy(SGD):
    """Keeps three bytes for each parameter, in its first step, and holds five more while it steps."""

    def __init__(self, named: memory.Named) -> None:
        super().__init__([p for _, p in named], lr=0.1)
        self.kept: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        if self.kept is None:
            self.kept = torch.zeros(3 * NUMEL, dtype=torch.uint8)
        held = torch.zeros(5 * NUMEL, dtype=torch.uint8)
        super().step()
        del held


class Handle:
    """Steps each parameter, and frees its gradient, as soon as there is one."""

    removed = 0

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.handles = [p.register_post_accumulate_grad_hook(self.step) for p in model.parameters()]

    @staticmethod
    def step(p: Tensor) -> None:
        p.data.sub_(p.grad, alpha=0.1)
        p.grad = None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        Handle.removed += 1


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[::-1], SETS["tiny-tensors"]()[:9]])
def test_every_tensor_of_the_chain_gets_a_gradient(shapes: list[tuple[int, ...]]) -> None:
    model = memory.Chain(shapes, torch.float32, CPU)
    assert [tuple(p.shape) for p in model.parameters()] == shapes
    model(torch.ones(1)).backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert p.grad.any()


@pytest.mark.parametrize("name", SETS)
def test_the_chain_is_made_for_every_set(name: str) -> None:
    """Shapes alone: what a layer is given fits it."""
    shapes = SETS[name]()
    with torch.device("meta"):
        x = torch.ones(1)
        for shape in shapes:
            x = memory._fitted(x, torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0])
            x = torch.ones(shape[0]) if len(shape) > 1 else x
            assert len(x) == shape[0]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_is_kept_and_what_is_held_are_measured(dtype: torch.dtype, size: int) -> None:
    found = memory.row(Measured("", dtype, Greedy), SHAPES, CPU)
    assert (found["weights"], found["gradients"], found["state"], found["buffers"]) == (size, size, 0, 3)
    assert found["total"] == 2 * size + 3
    assert 2 * size + 8 <= found["peak"] < 2 * size + 8.1


def test_released_gradients_are_not_there_at_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lamb16, "release_gradients", Handle, raising=False)
    monkeypatch.setattr(Handle, "removed", 0)
    build: Callable[[memory.Named], Optimizer] = lambda named: SGD([p for _, p in named], lr=0.1)  # noqa: E731
    plain, released = (memory.row(Measured("", torch.float32, build, x), SHAPES, CPU) for x in (False, True))
    assert (plain["gradients"], plain["total"]) == (4, 8)
    assert (released["gradients"], released["total"]) == (0, 4)
    assert plain["peak"] >= 8
    assert 4 + 4 * 60_000 / NUMEL <= released["peak"] < plain["peak"], "the largest gradient, and a few small ones"
    assert Handle.removed == 1


def test_lamb16_has_two_bytes_of_state() -> None:
    found = memory.row(Measured("", torch.float32, memory._lamb16(compile=False)), SHAPES, CPU)
    assert found["state"] == 2 + SCALAR_BYTES * len(SHAPES) / NUMEL
    assert 0.001 < found["buffers"] < 0.5
    adamw = memory.row(Measured("", torch.float32, memory._adamw), SHAPES, CPU)
    assert adamw["state"] == 8 + 4 * len(SHAPES) / NUMEL
    assert adamw["buffers"] == 0
    assert adamw["total"] == pytest.approx(8 + adamw["state"])


def test_the_optimizers_get_the_options_that_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lamb16, "Lamb16", lambda _, **options: options)
    monkeypatch.setattr(memory.registry, "build", lambda name, _, **options: options | {"optimizer": name})
    found = {one.name: (str(one.dtype)[6:], one.released, one.build([])) for one in memory.OWN}
    for what, dtype, rounding in (
        ("float32", "float32", None),
        ("bfloat16 exact", "bfloat16", "exact"),
        ("bfloat16 stochastic", "bfloat16", "stochastic"),
    ):
        for ending, released in (("", False), (", gradients released", True)):
            options = found.pop(f"Lamb16, {what}{ending}")
            assert options[:2] == (dtype, released)
            assert options[2].get("param_rounding") == rounding
    assert not found
    stochastic = [one.build([]) for one in memory.OTHERS if one.name == "AdamW8bit (torchao), bfloat16 stochastic"]
    assert [options["bf16_stochastic_round"] for options in stochastic] == [True]
    assert "bf16_stochastic_round" in memory.registry.REGISTRY["adamw8bit"].special


def test_a_run_reports_every_optimizer_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(named: memory.Named) -> Optimizer:
        raise ValueError("no step for you")

    monkeypatch.setitem(SETS, "mlp", lambda: SHAPES)
    monkeypatch.setattr(memory, "OWN", [Measured("greedy", torch.float32, Greedy)])
    others = [Measured("broken", torch.float32, broken), Measured("away", torch.float32, Greedy, module="nowhere")]
    monkeypatch.setattr(memory, "OTHERS", others)
    file = tmp_path / "memory.json"
    assert main(["bench", "--memory", "--shapes", "mlp", "--device", "cpu", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    rows = written["results"]["mlp"]
    assert [row["name"] for row in rows] == ["broken", "greedy"]
    assert rows[0]["error"] == "ValueError: no step for you"
    assert rows[1]["total"] == 11
    assert written["settings"]["device"] == "cpu"
    printed = capsys.readouterr().out
    assert memory.table(rows) in printed
    assert "| greedy | 4.00 | 4.00 | 0.00 | 3.00 | 11.00 | 16.0" in printed
    assert "| broken | could not run: ValueError: no step for you |" in printed


@pytest.mark.parametrize("options", [[f"--{name.replace('_', '-')}"] for name in bench.TIMES_ONLY])
def test_options_of_times_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    values = {"--dtype": "bfloat16", "--rounds": "3", "--sizes": "5", "--plot": "x.svg", "--size-plot": "x.svg"}
    values |= {"--ranks": "2"}
    options += [values[x] for x in options if x in values]
    assert main(["bench", "--memory", *options]) == 2
    assert f"--memory takes no times; leave {options[0]} out" in capsys.readouterr().err
