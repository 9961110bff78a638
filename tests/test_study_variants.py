"""The rule with parts exchanged: the default is Lamb16 bit for bit, and every part makes a difference."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bits import assert_same_bits, raw
from lamb16 import Lamb16
from lamb16.entries import ENTRIES
from lamb16.lab.study.variants import Parts, Variant

SHAPES = {"matrix": (33, 17), "kernel": (5, 3, 3, 3), "vector": (40,), "scalar": ()}


def _run(optimizer_class: type[Any], steps: int = 12, **options: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Weights and states after steps with growing, sparse gradients of very different sizes; the first are zero."""
    generator = torch.Generator().manual_seed(3)
    params = {name: nn.Parameter(torch.randn(shape, generator=generator) * 0.05) for name, shape in SHAPES.items()}
    normal = [torch.randn(2, *p.shape, generator=generator) for p in params.values()]
    scales = [10.0 ** (2.5 * exponent) * sign.sign() for exponent, sign in normal]
    optimizer = optimizer_class(list(params.items()), lr=0.02, weight_decay=0.1, **options)
    for step in range(steps):
        for p, scale in zip(params.values(), scales, strict=True):
            kept = torch.rand(p.shape, generator=generator) < 0.9
            p.grad = scale * kept * 1.11**step * (step > 0)
        optimizer.step()
    return [p.detach() for p in params.values()], [optimizer.state[p] for p in params.values()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": False},
        {"betas": (0.8, 0.99), "eps": 0.05, "maximize": True},
        {"trust_scale": 0.5, "trust_lr": 0.01, "trust_clip": 0.2, "seed": 7},
        {"nesterov": False},
        {"nesterov": False, "bias_correction": False},
        {"caution": True, "maximize": True},
        {"betas": (0.99, 0.9)},
        {"moment_dtype": "float32"},
    ],
)
def test_the_default_parts_are_lamb16(options: dict[str, Any]) -> None:
    weights, states = _run(Variant, parts=Parts(), **options)
    theirs, their_states = _run(Lamb16, compile=False, **options)
    for a, b, mine, other in zip(weights, theirs, states, their_states, strict=True):
        assert_same_bits(raw(a), raw(b))
        assert mine.keys() == other.keys() == set(ENTRIES)
        for key in ENTRIES:
            assert_same_bits(raw(mine[key]), raw(other[key]), key)


STEPS = 60  # after fewer, the bound and the maximum may have given the same scales
EXCHANGED: dict[str, Any] = {
    "rounding": "nearest",
    "words": "independent",
    "scope": "row",
    "scale_from": "maximum",
    "never_zero": False,
    "bound": False,
    "ratio_norms": "this",
    "weight_floor": 1e-3,
    "sums": "float64",
}


def test_every_part_is_exchanged_here() -> None:
    assert list(EXCHANGED) == list(vars(Parts()))
    assert all(EXCHANGED[name] != default for name, default in vars(Parts()).items())


@pytest.mark.parametrize("name", EXCHANGED)
def test_every_exchanged_part_makes_a_difference(name: str) -> None:
    weights, _ = _run(Variant, steps=STEPS, parts=Parts(**{name: EXCHANGED[name]}))
    rule, _ = _run(Variant, steps=STEPS)
    assert any(not torch.equal(a, b) for a, b in zip(weights, rule, strict=True))


def test_a_scale_a_row_has_the_shape_of_rows() -> None:
    _, states = _run(Variant, parts=Parts(scope="row"))
    assert [tuple(state["exp_avg_scale"].shape) for state in states] == [(33, 1), (5, 1, 1, 1), (), ()]


@pytest.mark.parametrize(("scale_from", "scale"), [("bound", 2.0**-9), ("maximum", 2.0**-10)])
def test_a_scale_comes_from_the_bound_or_from_the_maximum(scale_from: str, scale: float) -> None:
    """By hand: gradients 1 and -4 leave m = 0.09 - 0.4 = -0.31, and a bound of 0.09 + 0.4 = 0.49; codes go to 448."""
    p = nn.Parameter(torch.ones(1))
    optimizer = Variant([("p", p)], Parts(scale_from=scale_from))
    for grad in (1.0, -4.0):
        p.grad = torch.tensor([grad])
        optimizer.step()
    assert optimizer.state[p]["exp_avg_scale"] == scale


@pytest.mark.parametrize(("ratio_norms", "ratio"), [("last", 0.5), ("this", 0.25)])
def test_a_trust_ratio_comes_from_the_norms_of_the_last_step_or_of_this_one(ratio_norms: str, ratio: float) -> None:
    """By hand: updates of 1, weights of 0.5 that someone halves between the steps."""
    p = nn.Parameter(torch.full((4,), 0.5))
    options: dict[str, Any] = {"trust_lr": 1e-3, "trust_scale": 1.0, "nesterov": False, "moment_dtype": "float32"}
    optimizer = Variant([("p", p)], Parts(ratio_norms=ratio_norms), lr=1e-3, **options)
    for weight in (0.5, 0.25):
        p.data.fill_(weight)
        p.grad = torch.ones(4)
        optimizer.step()
    assert weight - p.detach() == pytest.approx(1e-3 * ratio, rel=2e-3)


def test_v_may_become_zero_only_where_asked() -> None:
    zeros = []
    for never_zero in (True, False):
        _, states = _run(Variant, parts=Parts(never_zero=never_zero, rounding="nearest"))
        zeros.append(sum(int((state["exp_avg_sq_codes"].view(torch.uint8) == 0).sum()) for state in states))
    assert zeros[1] > zeros[0]


def test_a_non_finite_gradient_changes_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Variant([("p", p)], lr=0.1)
    p.grad = torch.tensor([1.0, float("inf"), 0.0])
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert optimizer.state[p]["step"] == 0
