"""class Lamb16: parameter groups, state, checkpoints. Decides nothing numerical: ``step/`` does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from .between_steps import BetweenSteps
from .checks.arguments import check_group_options, check_options, check_reloaded, check_scaler
from .checks.release import warn_of_copy
from .codes import as_bytes, as_fp8, map_codes
from .convert import to_adamw
from .entries import renamed
from .hyper import NAMES, Hyper, check_hyperparameters, check_max_grad_norm
from .loading import checked_groups, checked_states, matched, read_state
from .matching import Loaded
from .offload import move
from .parameters import tensor_salt
from .sharding.exchange import refuse
from .step.compiled import Executor
from .stepping import Request, Stepped

__all__ = ["Lamb16", "tensor_salt"]


class Lamb16(BetweenSteps):
    r"""LAMB with 16 bits of optimizer state per parameter: moments in ``float8_e4m3fn`` and ``float8_e5m2``.

    For each parameter tensor, with all arithmetic in float32::

        m = β1·m + (1 − β1)·g
        v = β2·v + (1 − β2)·g²
        n = β1·m / (1 − β1^(t+1)) + (1 − β1)·g / (1 − β1^t)
        u = n / max(sqrt(v / (1 − β2^t)) + eps, |n| / C) + weight_decay · p
        r = min((‖p‖ / ‖u‖ · trust_lr / lr) ^ trust_scale, trust_clip)
        p = p − lr · r · u

    where ‖p‖ = sqrt(Σ clamp(p², 0.01, 1)) and ‖u‖ = sqrt(Σ clamp(u², eps, 1)) are those at the end of the step before
    (at first, the weights' own and √numel), and C is a bound that |n| never exceeds in units of the root, in exact
    arithmetic. m and v are then stored in 8 bits each, scaled by a power of two per tensor and rounded stochastically
    with words from a golden-ratio sequence; no random generator is used. The rule, its derivation and measurements are
    in docs/algorithm.md; LAMB is You et al., 2020 (arXiv:1904.00962), the momentum NAdam's (Dozat, 2016).

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or group dicts; float32, bfloat16 or
            float16, any shape. Names make the rounding independent of the parameters' order.
        lr: learning rate, a float >= 0 or a one-element tensor; changing it never recompiles. Between steps it may be
            1e-9 below 0, where rounding lets schedulers end. A tensor on another device than the CPU is not checked.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root, and the lower clamp of squared updates in their norm; in [2^-100, 1].
        weight_decay: decoupled weight decay, inside the trust ratio as in LAMB.
        trust_scale: exponent of the trust ratio; 0 switches the ratio off, 1 is proportional.
        trust_lr: learning rate at which the trust ratio is not changed.
        trust_clip: upper bound of the trust ratio.
        bias_correction: divide by 1 − β^t as above. LAMB's paper leaves it out, since its trust ratio normalises the
            update; the damped ratio here does not, and without the correction the first updates are several times
            larger. What that is worth depends on the task (docs/algorithm.md).
        nesterov: n as above (without ``bias_correction`` β1·m + (1 − β1)·g); ``False``: n = m / (1 − β1^t).
        caution: update only where n and g have the same sign (before weight decay), and more of that: times numel / k,
            where k elements were updated in the step before, at least a thousandth (Liang et al., 2024,
            arXiv:2411.16085).
        maximize: ascend instead of descend.
        moment_dtype: ``"float8"``, or ``"float32"`` to keep a group's moments in FP32 under the same rule.
        param_rounding: how bfloat16 and float16 weights are rounded; float32 ones are not. ``"stochastic"``: up or down
            with probabilities by which small steps add up as they do in float32. ``"nearest"``: steps below half of
            the gap between two weights are lost. ``"exact"``, for bfloat16: the state keeps 16 bits more,
            ``param_remainder``, which with the weight are the float32 weight; every step has the bits of a float32
            run with the same gradients, and the weight is the nearest bfloat16 (ties away from 0).
        max_grad_norm: scale all gradients so that their norm, over all groups and ranks, is at most this, as
            ``torch.nn.utils.clip_grad_norm_`` before the step does; the gradients themselves are not changed. A tensor
            with a non-finite gradient is skipped and does not enter the norm. ``math.inf`` only measures
            :attr:`grad_norm`. An attribute, which may be changed between steps.
        compile: run the step through ``torch.compile`` (default); ``False`` runs the same functions eagerly. A tool
            may hand in an :class:`lamb16.step.compiled.Executor`.
        seed: enters the rounding words, with each parameter's name. Parameters without names have their position, their
            shape and the weights that they have when their state is made: optimizers round independently of each
            other, and alike on every rank and in every run. State dicts keep what follows from all that, each tensor's
            ``salt``.
        amp_scaling: take a ``torch.amp.GradScaler``'s scale and its finding of an inf into the step, as fused AdamW
            does: the scaler then divides no gradient (float16 ones, which it refuses to divide, work too), and nothing
            is read back for it. Off by default: the scaler divides the gradients and does not call ``step`` where
            one is not finite. Lightning's ``gradient_clip_val`` and accelerate's ``optimizer_step_was_skipped`` need
            it off.

    State of a parameter, plain tensors: ``exp_avg_codes`` (float8_e4m3fn) and ``exp_avg_sq_codes`` (float8_e5m2) of the
    parameter's shape, contiguous, and 0-d: ``exp_avg_scale``, ``exp_avg_sq_scale``, ``exp_avg_max``,
    ``exp_avg_sq_max`` (float32), ``step``, ``salt`` (int32), ``weight_sum``, ``update_sum``, ``mask_count`` (int64).
    The moments are the codes times their scales; no code is above the maximum (of a shard, its own; without the scale);
    the sums are ‖p‖² and ‖u‖² in units of 2^-20, and ``mask_count`` is k. ``param_checksum`` (int64) is of the weights
    that ``param_remainder`` (int16, of the parameter's shape; with ``"exact"`` only) belongs to: of weights that
    somebody else has changed since, the remainders are forgotten. ``state_dict()`` hands codes and remainders out as
    uint8 views, these with a last dimension of 2. An entry may be replaced, or given other memory, between steps.

    A tensor whose gradient holds an inf or a NaN, or is so large (about 1e19) that v could overflow, is left untouched
    for that step and counted in :attr:`skipped`.

    Raises:
        ValueError: a hyperparameter is out of range (also in a group, or changed to a wrong value between steps); from
            ``step``, a state does not fit its parameter.
        TypeError: a parameter is complex, sparse or of another dtype. A frozen one is not judged before it has a
            gradient at a ``step``, which raises this then.
        RuntimeError: from ``step``: a sparse gradient, or no compiler works. A step that raises has changed nothing.
            What the handler of a signal raises comes before a step or after it. Where memory runs out in the middle,
            each parameter is, with its state, before the step or after it, but for a compiled step on a GPU.

    Example::

        optimizer = Lamb16(model.named_parameters(), lr=0.01, weight_decay=0.01)
        loss.backward()
        optimizer.step()
    """

    _amp_scaling = False  # older pickles have none

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = Hyper.lr,
        betas: tuple[float, float] = Hyper.betas,
        eps: float = Hyper.eps,
        weight_decay: float = Hyper.weight_decay,
        *,
        trust_scale: float = Hyper.trust_scale,
        trust_lr: float = Hyper.trust_lr,
        trust_clip: float = Hyper.trust_clip,
        bias_correction: bool = Hyper.bias_correction,
        nesterov: bool = Hyper.nesterov,
        caution: bool = Hyper.caution,
        maximize: bool = Hyper.maximize,
        moment_dtype: str = Hyper.moment_dtype,
        param_rounding: str = Hyper.param_rounding,
        max_grad_norm: float | None = None,
        compile: bool | Executor = True,
        seed: int = 0,
        amp_scaling: bool = False,
    ) -> None:
        arguments = locals()
        defaults = {name: arguments[name] for name in NAMES}
        check_hyperparameters(defaults)
        check_max_grad_norm(max_grad_norm)
        check_options(compile, seed, amp_scaling)
        self.max_grad_norm, self._compile, self._seed, self._amp_scaling = max_grad_norm, compile, seed, amp_scaling
        self._forget()
        super().__init__(params, defaults)

    # -- parameter groups ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with any of the constructor's hyperparameters.

        ``compile``, ``seed`` and ``amp_scaling`` are the optimizer's.
        """
        if isinstance(param_group, dict):
            # ZeroRedundancyOptimizer writes all arguments into the groups.
            check_group_options(param_group, self._own_options())
            for name in self._own_options():
                param_group.pop(name, None)
            check_hyperparameters(param_group, f" (parameter group {len(self.param_groups)})")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"]):
                if p.requires_grad:  # what is never stepped is not judged, as quantized weights under LoRA
                    self._parameters.check(group, i)
            if self._release is not None:
                self._release.watch(group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        self._stepper.clear()

    def _own_options(self) -> dict[str, Any]:
        """The constructor's options that no group can change, by their names."""
        return {"compile": self._compile, "seed": self._seed, "amp_scaling": self._amp_scaling}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler, Lightning and accelerate look for. It makes a scaler call ``step``, also to be refused."""
        return self._amp_scaling or self._release is not None

    # -- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # as torch.compiler.disable, but importing lamb16 does not import Dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; ``closure``, if given, reevaluates the model and returns the loss.

        Dynamo does not trace into it: a compiled training step has one graph break here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._release is None:
            self._stepper.last = self._step(grad_scale, found_inf)
        else:
            for name in ("grad_scale", "found_inf"):
                vars(self).pop(name, None)  # a scaler that is refused does not
            self._release.end(scaled=grad_scale is not None or found_inf is not None)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as torch's optimizers do; of released ones it marks the end of an iteration."""
        super().zero_grad(set_to_none)
        if self._release is not None:
            self._release.forget()

    def _step(self, grad_scale: Any, found_inf: Any, released: dict[int, Tensor] | None = None) -> list[Stepped]:
        """Step the parameters that have gradients, or whose gradients were ``released``, by id; returns which."""
        check = partial(self._check, grad_scale, found_inf)
        return self._stepper.step(Request(
            self._parameters, self.max_grad_norm, self._compile, grad_scale, found_inf, released, check
        ))  # fmt: skip

    def _check(self, grad_scale: Any, found_inf: Any) -> None:
        """Raise what forbids a step whatever the gradients are."""
        check_reloaded(self.offloaded, "step")
        self._offloaded = None  # a state that there is none of is nowhere
        check_max_grad_norm(self.max_grad_norm)
        check_scaler(grad_scale, found_inf)
        if self._release is not None:
            self._release.check()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as torch's optimizers give it, with the fp8 codes as uint8 views.

        Always uint8: collectives, pickle and checkpoint code fail on fp8 tensors or cast them silently.

        Raises:
            RuntimeError, ValueError: the last step could not be taken by all ranks, and changed nothing; see ``step``.
        """
        if (error := self._stepper.settle()) is not None:
            raise error
        state_dict = super().state_dict()
        state_dict["state"] = {key: map_codes(state, as_bytes) for key, state in state_dict["state"].items()}
        return state_dict

    def float32_state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim.AdamW`` loads it: ``step``, and ``exp_avg`` and ``exp_avg_sq`` in float32.

        The groups have AdamW's hyperparameters, with the values of this optimizer, and those that only Lamb16 has are
        left out. A warning says that AdamW wants another ``lr`` (docs/recipes.md).
        """
        return to_adamw(self.state_dict(), dict(enumerate(self._parameters)))

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True
    ) -> Loaded:
        """Load what :meth:`state_dict` gave; codes as uint8 or fp8, kept bit for bit, as are the float32 scales.

        Where both sides have names, states are matched by name, whatever the order of parameters and groups; else by
        position. Groups give their hyperparameters to the group with the same members; what a group lacks stays as it
        is here. With ``strict=False`` what fits by name and shape is loaded, and the rest is returned and kept.

        The states of other optimizers with Adam's two moments are quantized: torch's Adam and AdamW, LAMB in FP32, and
        8-bit states of torchao and bitsandbytes (:mod:`lamb16.convert`). Of their groups ``lr``, ``betas``, ``eps``,
        ``weight_decay`` and ``maximize`` are taken, where they are valid here; another ``lr`` is warned of.

        Moments are copied into the memory of those that are there, where shapes, dtypes and devices fit.

        For DTensor parameters all ranks must call this, with codes that are DTensors of any placements or whole.

        Returns:
            What was left out by ``strict=False``, as ``torch.nn.Module.load_state_dict`` does.

        Raises:
            ValueError: names, groups, shapes, dtypes or entries do not fit, on this rank or another; nothing is
                changed then.
        """
        state_dict = state_dict.copy()
        error: Exception | None = None
        try:
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                replaced = hook(self, state_dict)
                if replaced is not None:
                    state_dict = replaced
            parameters = self._parameters
            names, found, states = matched(state_dict, parameters, strict)
            groups = checked_groups(self.param_groups, state_dict["param_groups"], states, found.sources)
            foreign = checked_states(state_dict["param_groups"], states, groups, names, found, strict)
        except Exception as caught:
            error = caught
        refuse(error, list(self._parameters))
        offloaded = self._offloaded
        state = read_state(parameters, states, foreign, groups, found)
        self.__setstate__({"state": state, "param_groups": groups})
        if offloaded is not None:
            move(self.state, lambda p: p.device)  # what is kept
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
        return found.loaded

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: fp8 codes as uint8, since torch cannot unpickle fp8 tensors."""
        warn_of_copy(self._release is not None)
        pickled: dict[str, Any] = super().__getstate__()
        pickled["state"] = {p: map_codes(state, as_bytes) for p, state in self.state.items()}
        skipped = {device: count.clone() for device, count in self._stepper.skipped.items()}
        own = ("max_grad_norm", "_compile", "_seed", "_amp_scaling", "_offloaded")
        return pickled | {name: getattr(self, name) for name in own} | {"_skipped": skipped}

    def __copy__(self) -> Lamb16:
        """A copy with the same groups and states, as copies of torch's optimizers; what pickle takes has others."""
        copied = type(self).__new__(type(self))
        kept = ("max_grad_norm", "_compile", "_seed", "_amp_scaling", "_offloaded", "_stepper")
        own = {name: getattr(self, name) for name in kept}
        super(Lamb16, copied).__setstate__(super().__getstate__() | own)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self._stepper.skipped if "_stepper" in self.__dict__ else {}
        skipped = state.get("_skipped", before)
        new = {k: (map_codes(renamed(v), as_fp8) if isinstance(k, Tensor) else v) for k, v in state["state"].items()}
        super().__setstate__({k: v for k, v in state.items() if k != "_skipped"} | {"state": defaultdict(dict, new)})
        for group in self.param_groups:
            for name in NAMES:
                group.setdefault(name, self.defaults[name])
        self._forget()
        self._stepper.skipped, self._offloaded = skipped, state.get("_offloaded")
