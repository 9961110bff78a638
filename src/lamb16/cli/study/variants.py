"""The rule with parts exchanged, for ablations: plain and slow, one tensor at a time.

:class:`Variant` with the default :class:`Parts` is :class:`lamb16.Lamb16` bit for bit (tests/test_study_variants.py),
so that what a part is worth can be told from exchanging it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lamb16 import fp8, reference, update
from lamb16.fp8 import E4M3, E5M2, Format
from lamb16.optimizer import tensor_salt
from lamb16.plan import flat_codes, init_state
from lamb16.update import Factors

NEAREST = -(2**31)  # as a rounding word: half a unit of the last place
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
LARGEST_CODE = {E4M3: 126, E5M2: 123}


@dataclass(frozen=True)
class Parts:
    """What can be exchanged; the defaults are the rule."""

    rounding: str = "stochastic"  # or "nearest"
    words: str = "golden-ratio"  # or "independent": a fresh word each step
    norm: str = "power-of-two"  # or "exact": max / largest code
    scope: str = "tensor"  # or "row": a scale for each index of the first dimension
    never_zero: bool = True  # v is at least the smallest code where v > 0
    bound: bool = True  # |m| <= C·sqrt(v)
    vectors: str = "inside"  # "outside": tensors of one dimension have trust ratio (trust_lr / lr)^trust_scale
    vector_floor: float = 0.1  # the magnitude that every weight of a tensor of one dimension counts with at least
    matrix_floor: float = 0.1  # the same for all other tensors


class Variant(Optimizer):
    """Lamb16's rule with the ``parts`` given; the other arguments are those of :class:`lamb16.Lamb16`.

    State per parameter: as Lamb16's, with scales of shape `[rows, 1, ...]` where ``parts.scope`` is "row".
    """

    def __init__(self, params: Any, parts: Parts | None = None, *, seed: int = 0, **hyper: Any) -> None:
        self._parts, self._seed = parts or Parts(), seed
        defaults = vars(reference.Hyper()) | hyper
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            hyper = reference.Hyper(**{name: group[name] for name in vars(reference.Hyper())})
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None:
                    self._update(name, p, p.grad, hyper)

    def _update(self, name: str, p: Tensor, grad: Tensor, h: reference.Hyper) -> None:
        state = self.state[p]
        if not state:
            state.update(init_state(p, tensor_salt(self._seed, name), h.moment_dtype == "float8"))
        t = int(state["step"]) + 1
        factors = self._factors(state, h, t)
        codes = [flat_codes(state[key]).view(p.shape) for key in ("exp_avg", "exp_avg_sq")]
        m, v = update.moments(grad, codes[0], codes[1], factors)
        largest = m.abs().max() + v.max()
        if not torch.isfinite(largest):
            return
        u = update.direction(p, m, v, factors)
        p.sub_(u * float(h.lr * self._ratio(p, u, h)))
        if largest > 0:
            state["step"].fill_(t)
        if h.moment_dtype == "float32":
            state["exp_avg"], state["exp_avg_sq"] = m, v
            return
        word = self._words(p, int(state["salt"]), t)
        state["exp_avg"], state["exp_avg_norm"] = _store(m, word, E4M3, self._parts)
        state["exp_avg_sq"], state["exp_avg_sq_norm"] = _store(v, word, E5M2, self._parts)

    def _factors(self, state: dict[str, Any], h: reference.Hyper, t: int) -> Factors:
        """The scalars of the update in float32."""
        beta1, beta2 = h.betas
        c1, c2 = (1 - beta1**t, 1 - beta2**t) if h.bias_correction else (1.0, 1.0)
        rho = c1 / c2**0.5
        bound = rho * reference.inverse_bound(beta1, beta2) if self._parts.bound else 0.0
        sign = -1.0 if h.maximize else 1.0
        values = torch.tensor(
            [1 - beta1, 1 - beta2, rho, h.eps * c1, bound, h.weight_decay, h.eps, sign, 0.0, 0.0, 0.0]
        )
        decode = state["exp_avg_norm"] * reference.f32(beta1), state["exp_avg_sq_norm"] * reference.f32(beta2)
        return Factors(*decode, *values)

    def _words(self, p: Tensor, salt: int, t: int) -> Tensor:
        """The int32 rounding word of every element."""
        if self._parts.rounding == "nearest":
            return torch.full(p.shape, NEAREST, dtype=torch.int32)
        index = ((torch.arange(p.numel()) + salt) & 0xFFFFFFFF).to(torch.int32).view(p.shape)
        words = fp8.hash32(index) + torch.tensor(t * reference.GOLDEN & 0xFFFFFFFF).to(torch.int32)
        return fp8.hash32(words) if self._parts.words == "independent" else words

    def _ratio(self, p: Tensor, u: Tensor, h: reference.Hyper) -> float:
        if p.ndim <= 1 and self._parts.vectors == "outside":
            return min(float((h.trust_lr / h.lr) ** h.trust_scale), h.trust_clip)
        floor = self._parts.vector_floor if p.ndim <= 1 else self._parts.matrix_floor
        weight_norm = reference.clamped_sum(p, floor * floor) ** 0.5
        return reference.trust_ratio(weight_norm, reference.clamped_sum(u, h.eps) ** 0.5, h)


def _store(x: Tensor, word: Tensor, fmt: Format, parts: Parts) -> tuple[Tensor, Tensor]:
    """The fp8 codes of a moment and their scale."""
    magnitude = x.abs()
    by_row = parts.scope == "row" and x.ndim > 1
    largest = magnitude.flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1)) if by_row else magnitude.max()
    if parts.norm == "exact":
        scale = (largest / LARGEST[fmt]).clamp(min=fmt.smallest_scale())
    else:
        scale = fp8.power_of_two(fp8.scale_exponent(largest.view(torch.int32), fmt))
    # Dividing by an exact norm, and rounding to nearest, may end above the largest code by a hair.
    codes = fp8.encode((magnitude / scale).clamp(max=LARGEST[fmt]), word, fmt).clamp(max=LARGEST_CODE[fmt])
    if fmt is E5M2:
        codes = torch.where(x > 0, codes.clamp(min=1), codes) if parts.never_zero else codes
        return codes.to(torch.uint8).view(torch.float8_e5m2), scale
    codes = codes | (torch.signbit(x).int() << 7)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), scale
