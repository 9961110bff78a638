"""Two baselines, plain and slow: LAMB in FP32, and the rule of LAMB16's published proof of concept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .checks import check_gradient, check_parameter
from .hyper import check_hyperparameters

E4M3_CLIP = 15.0
E5M2_MAX = 57344.0


class _Baseline(Optimizer):
    """What both share: checks, groups, closures, layer statistics. A subclass updates one tensor."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_hyperparameters(defaults)
        self._stats: dict[str, dict[str, Tensor]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with hyperparameters of its own."""
        check_hyperparameters(param_group, f" (parameter group {len(self.param_groups)})")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        before = sum(len(other["params"]) for other in self.param_groups[:-1])
        try:
            for i, p in enumerate(group["params"]):
                check_parameter(p, group["param_names"][i] if "param_names" in group else str(before + i))
        except Exception:
            self.param_groups.pop()  # a refused group leaves no trace
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one step; ``closure``, if given, reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        position = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = names[i] if names else str(position)
                position += 1
                if p.grad is not None and p.numel():
                    check_gradient(p, p.grad, name)
                    grad = -p.grad.float() if group["maximize"] else p.grad.float()
                    self._stats[name] = self._update(p, grad, self.state[p], group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def layer_stats(self) -> dict[str, dict[str, Tensor]]:
        """Per parameter name (or position): weight norm, update norm and trust ratio of its last step, 0-d."""
        return dict(self._stats)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict with every dtype as it is; torch's loader casts the state to the parameter's."""
        super().load_state_dict(state_dict)
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[p][name] = value.detach().to(p.device, copy=True) if name != "step" else value.clone()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stats = {}


class Lamb(_Baseline):
    """LAMB with FP32 moments (You et al., 2020, arXiv:1904.00962, third version), 64 bits of state per parameter.

    m and v are Adam's moments, u = m / (sqrt(v) + eps) + weight_decay · p, the trust ratio is ‖p‖₂ / ‖u‖₂ (1 where
    either is 0), and p ← p − lr · ratio · u. No bias correction unless asked for.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`lamb16.Lamb16` does.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "maximize": maximize,
            },
        )

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if group["bias_correction"]:
            m = m / (1 - beta1 ** state["step"].item())
            v = v / (1 - beta2 ** state["step"].item())
        weights = p.float()
        u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * weights
        weight_norm, update_norm = weights.norm(), u.norm()
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        p.copy_(weights - group["lr"] * ratio * u)
        return {"weight_norm": weight_norm, "update_norm": update_norm, "trust_ratio": ratio}


class PublishedLamb16(_Baseline):
    """The rule of the published proof of concept, kept as a baseline; docs/algorithm.md says where and why we left it.

    The update is formed from fresh FP32 moments without bias correction, and its trust ratio is
    min((sqrt(Σ clamp(p², eps, 1)) / sqrt(Σ clamp(u², eps, 1)) · trust_lr / lr)^trust_scale, trust_clip). What is
    stored is m / norm clipped to ±15 in ``float8_e4m3fn`` and clamp(v, 0, 10) / norm in ``float8_e5m2``, both rounded
    to nearest, where norm = sqrt(Σ clamp(x², 0, 10)) / numel + eps. On a wide layer that norm is far below the typical
    entry, so that most of m saturates.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`lamb16.Lamb16` does.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        trust_scale: float = 0.382,
        trust_lr: float = 1e-3,
        trust_clip: float = 2.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "trust_scale": trust_scale,
                "trust_lr": trust_lr,
                "trust_clip": trust_clip,
                "maximize": maximize,
            },
        )

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float8_e4m3fn)
            state["exp_avg_norm"] = torch.ones((), device=p.device)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float8_e5m2)
            state["exp_avg_sq_norm"] = torch.ones((), device=p.device)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m = beta1 * (state["exp_avg"].float() * state["exp_avg_norm"]) + (1 - beta1) * grad
        v = beta2 * (state["exp_avg_sq"].float() * state["exp_avg_sq_norm"]) + (1 - beta2) * grad * grad

        weights, eps = p.float(), group["eps"]
        u = m / (v.sqrt() + eps) + group["weight_decay"] * weights
        weight_norm, update_norm = _clamped_norm(weights, eps), _clamped_norm(u, eps)
        base = weight_norm / update_norm * group["trust_lr"] / torch.as_tensor(group["lr"])
        ratio = (base ** group["trust_scale"]).clamp(0, group["trust_clip"])
        p.copy_(weights - group["lr"] * ratio * u)

        v = v.clamp(0, 10)
        state["exp_avg_norm"], state["exp_avg_sq_norm"] = _published_norm(m, eps), _published_norm(v, eps)
        codes_m = (m / state["exp_avg_norm"]).clamp(-E4M3_CLIP, E4M3_CLIP)
        # The plain cast turns what exceeds the format into infinity; saturating is kinder to this baseline.
        codes_v = (v / state["exp_avg_sq_norm"]).clamp(max=E5M2_MAX)
        state["exp_avg"] = codes_m.to(torch.float8_e4m3fn)
        state["exp_avg_sq"] = codes_v.to(torch.float8_e5m2)
        return {"weight_norm": weight_norm, "update_norm": update_norm, "trust_ratio": ratio}


def _clamped_norm(x: Tensor, eps: float) -> Tensor:
    return (x * x).clamp(eps, 1).double().sum().sqrt()


def _published_norm(x: Tensor, eps: float) -> Tensor:
    return (x * x).clamp(0, 10).sum().sqrt() / x.numel() + eps
