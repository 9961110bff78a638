"""What 8-bit storage does to a training, layer by layer: FP32 moments of the same gradients, kept beside the optimizer.

The update that a step makes from stored moments is compared with the one that the same rule makes from the FP32
moments, on the same weights and gradients; both before caution and weight decay.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lamb16.hyper import NAMES, Hyper
from lamb16.lab.study.variants import direction

LARGEST_M = 126  # the largest code of e4m3fn


class Shadow:
    """The FP32 moments of every parameter of a Lamb16, and what was seen when :meth:`probe` was asked for."""

    def __init__(self, optimizer: Optimizer, bounded: bool = True) -> None:
        """``bounded``: whether the optimizer itself bounds its update by C, as the rule with FP32 moments does."""
        self._optimizer, self._bounded = optimizer, bounded
        self._group = optimizer.param_groups[0]
        self._names: list[str] = self._group["param_names"]
        self._params: list[Tensor] = self._group["params"]
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._params]
        self.seen: list[dict[str, Any]] = []

    @torch.no_grad()
    def before_step(self, probe: bool) -> None:
        """Take the gradients in; with ``probe`` also compare, before the optimizer's step changes its state."""
        hyper = Hyper(**{name: self._group[name] for name in NAMES})
        beta1, beta2 = hyper.betas
        layers = {}
        for name, p, (m, v) in zip(self._names, self._params, self._moments, strict=True):
            if p.grad is None:
                continue
            stored = _decoded(self._optimizer.state[p]) if probe else None
            errors = _stored_errors(stored, (m, v), self._optimizer.state[p]) if stored else {}
            m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            if stored:
                fresh_m = beta1 * stored[0] + (1 - beta1) * p.grad
                fresh_v = beta2 * stored[1] + (1 - beta2) * p.grad.square()
                t = int(self._optimizer.state[p]["step"]) + 1
                u = direction(fresh_m, fresh_v, p.grad, hyper, t, self._bounded)[1]
                exact = direction(m, v, p.grad, hyper, t)[1]
                layers[name] = {"cosine": _cosine(u, exact)} | errors
        if layers:
            self.seen.append(layers)

    def summary(self) -> dict[str, Any]:
        """Per layer the mean over the probes of each figure, and its cosines; the first step has no state."""
        layers: dict[str, dict[str, Any]] = {}
        for name in self.seen[0] if self.seen else ():
            rows = [probe[name] for probe in self.seen]
            layers[name] = {key: _mean([row[key] for row in rows]) for key in rows[0]}
            layers[name]["cosines"] = [row["cosine"] for row in rows]
        return {"layers": layers}


def _decoded(state: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    if not state:
        return None
    m = state["exp_avg_codes"].float() * state["exp_avg_scale"]
    return m, state["exp_avg_sq_codes"].float() * state["exp_avg_sq_scale"]


def _stored_errors(
    stored: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], state: dict[str, Tensor]
) -> dict[str, float]:
    """How far the stored moments are from the exact ones, the share at the largest code, the shares that became 0."""
    (m, v), (exact_m, exact_v) = stored, exact
    both = (v > 0) & (exact_v > 0)
    float8 = state["exp_avg_codes"].element_size() == 1
    codes = state["exp_avg_codes"].view(torch.uint8) & 0x7F if float8 else torch.zeros(1)
    return {
        "m_error": ((m - exact_m).norm() / exact_m.norm().clamp_min(1e-30)).item(),
        "v_log_error": (v[both] / exact_v[both]).log().abs().mean().item() if both.any() else 0.0,
        "m_saturated": (codes == LARGEST_M).float().mean().item(),
        "m_zero": ((m == 0) & (exact_m != 0)).float().mean().item(),
        "v_zero": ((v == 0) & (exact_v > 0)).float().mean().item(),
        "v_smallest": ((state["exp_avg_sq_codes"].view(torch.uint8) == 1).float().mean().item() if float8 else 0.0),
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    norms = (a.norm() * b.norm()).item()
    return (a @ b).item() / norms if norms > 0 else 1.0


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
