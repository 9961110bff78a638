"""The rule with parts exchanged, for ablations: plain and slow, one tensor at a time.

:class:`Variant` with the default :class:`Parts` is :class:`lamb16.Lamb16` bit for bit (tests/test_study_variants.py),
so that what a part is worth can be told from exchanging it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lamb16 import reference
from lamb16.entries import init_state
from lamb16.hyper import NAMES, Hyper
from lamb16.parameters import tensor_salt
from lamb16.step import fp8
from lamb16.step.fp8 import E4M3, E5M2, Format

NEAREST = -(2**31)  # as a rounding word: half a unit of the last place
PREFIXES = ("exp_avg", "exp_avg_sq")  # of the names of what the state holds of a moment
LARGEST_CODE = {E4M3: 126, E5M2: 123}


@dataclass(frozen=True)
class Parts:
    """What can be exchanged; the defaults are the rule."""

    rounding: str = "stochastic"  # or "nearest"
    words: str = "golden-ratio"  # or "independent": a fresh word each step
    scope: str = "tensor"  # or "row": a scale for each index of the first dimension
    scale_from: str = "bound"  # or "maximum": of the new moment, which is known only after it was formed
    never_zero: bool = True  # v is at least the smallest code where v > 0
    bound: bool = True  # |n| <= C·sqrt(v)
    ratio_norms: str = "last"  # or "this": the trust ratio from this step's weights and update
    weight_floor: float = 0.1  # the magnitude that every weight counts with at least
    sums: str = "integers"  # or "float64": rounded to 2^-20 once, after adding


class Variant(Optimizer):
    """Lamb16's rule with the ``parts`` given; the other arguments are those of :class:`lamb16.Lamb16`.

    State per parameter: as Lamb16's, with scales and maxima of shape `[rows, 1, ...]` where ``parts.scope`` is "row".
    """

    def __init__(self, params: Any, parts: Parts | None = None, *, seed: int = 0, **hyper: Any) -> None:
        self._parts, self._seed = parts or Parts(), seed
        super().__init__(params, vars(Hyper()) | hyper)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            hyper = Hyper(**{name: group[name] for name in NAMES})
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None:
                    self._update(name, p, p.grad, hyper)

    def _update(self, name: str, p: Tensor, grad: Tensor, h: Hyper) -> None:
        state, parts = self.state[p], self._parts
        if not state:
            state.update(init_state(p, tensor_salt(self._seed, name), h.moment_dtype == "float8"))
            state["weight_sum"].fill_(self._weight_sum(p))
        (beta1, beta2), t = h.betas, int(state["step"]) + 1
        g = -grad if h.maximize else grad
        top = self._largest(g)
        max_m, max_v = (state[f"{key}_max"] * state[f"{key}_scale"] for key in PREFIXES)
        bound_m, bound_v = beta1 * max_m + (1 - beta1) * top, beta2 * max_v + (1 - beta2) * (top * top)
        if not (bound_m.isfinite().all() and (bound_v < reference.OVERFLOW_V).all()):
            return
        m, v = (state[f"{key}_codes"].float() * state[f"{key}_scale"] for key in PREFIXES)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * (g * g)
        n, d = direction(m, v, g, h, t, parts.bound)
        if h.caution:
            agrees, numel = torch.sign(n) * torch.sign(g) > 0, p.numel()
            d = torch.where(agrees, d * (numel / max(int(state["mask_count"]), numel / 1000)), 0.0)
        u = d + h.weight_decay * p
        p.sub_(u * float(h.lr * self._ratio(p, u, state, h)))
        if (bound_m > 0).any() or (bound_v > 0).any():
            state["step"].fill_(t)
            state["weight_sum"].fill_(self._weight_sum(p))
            state["update_sum"].fill_(self._sum(u, h.eps))
            if h.caution:
                state["mask_count"].fill_(agrees.sum())
        if h.moment_dtype == "float32":
            state["exp_avg_codes"], state["exp_avg_sq_codes"] = m, v
        else:
            if parts.scale_from == "maximum":
                bound_m, bound_v = self._largest(m), self._largest(v)
            word = self._words(p, int(state["salt"]), t)
            state["exp_avg_codes"], state["exp_avg_scale"] = _store(m, bound_m, word, E4M3, parts)
            state["exp_avg_sq_codes"], state["exp_avg_sq_scale"] = _store(v, bound_v, word, E5M2, parts)
        for key in PREFIXES:
            state[f"{key}_max"] = self._largest(state[f"{key}_codes"].float())
        if int(state["step"]) != t and h.lr and h.weight_decay:  # decay alone has moved the weights
            state["salt"] += 1

    def _largest(self, x: Tensor) -> Tensor:
        """The largest magnitude of the tensor, 0-d, or of each row, `[rows, 1, ...]`."""
        by_row = self._parts.scope == "row" and x.ndim > 1
        return x.abs().flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1)) if by_row else x.abs().max()

    def _words(self, p: Tensor, salt: int, t: int) -> Tensor:
        """The int32 rounding word of every element."""
        if self._parts.rounding == "nearest":
            return torch.full(p.shape, NEAREST, dtype=torch.int32)
        words = reference.rounding_words(p.numel(), salt, t).to(torch.int32).view(p.shape)
        return fp8.hash32(words) if self._parts.words == "independent" else words

    def _weight_sum(self, p: Tensor) -> int:
        return self._sum(p, self._parts.weight_floor**2)

    def _sum(self, x: Tensor, floor: float) -> int:
        """Σ clamp(x², floor, 1) in units of 2^-20."""
        if self._parts.sums == "float64":
            return round(float((x * x).clamp(reference.f32(floor), 1.0).double().sum()) * reference.SUM_UNITS)
        return reference.clamped_sum(x, floor)

    def _ratio(self, p: Tensor, u: Tensor, state: dict[str, Any], h: Hyper) -> float:
        """The trust ratio; ``p`` are the weights before the step, ``u`` is its update."""
        if self._parts.ratio_norms == "this":
            return reference.trust_ratio(self._weight_sum(p), self._sum(u, h.eps), h)
        return reference.trust_ratio(int(state["weight_sum"]), int(state["update_sum"]), h)


def direction(m: Tensor, v: Tensor, g: Tensor, h: Hyper, t: int, bounded: bool = True) -> tuple[Tensor, Tensor]:
    """The momentum n of step ``t`` from the fresh moments and the gradient, and the update before caution and decay."""
    beta1, beta2 = h.betas
    c1, c2, c3 = (1 - beta1**t, 1 - beta2**t, 1 - beta1 ** (t + 1)) if h.bias_correction else (1.0, 1.0, 1.0)
    a, b = (beta1 / c3, (1 - beta1) / c1) if h.nesterov else (1 / c1, 0.0)
    n = a * m + b * g
    denominator = (1 / math.sqrt(c2)) * reference.ieee_sqrt(v) + h.eps
    if bounded:
        denominator = torch.maximum(denominator, reference.inverse_bound(beta1, beta2, a, b, c2) * n.abs())
    return n, n / denominator


def _store(x: Tensor, largest: Tensor, word: Tensor, fmt: Format, parts: Parts) -> tuple[Tensor, Tensor]:
    """The fp8 codes of a moment and their scale."""
    scale = fp8.power_of_two(fp8.scale_exponent(largest.view(torch.int32), fmt))
    # Rounding to nearest may end above the largest code.
    codes = fp8.encode(x.abs() / scale, word ^ fp8.SIGN_BIT, fmt).clamp(max=LARGEST_CODE[fmt])
    if fmt is E5M2:
        codes = torch.where(x > 0, codes.clamp(min=1), codes) if parts.never_zero else codes
        return codes.to(torch.uint8).view(torch.float8_e5m2), scale
    codes = codes | (torch.signbit(x).int() << 7)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), scale
