"""class Lamb16: parameter groups, state, checkpoints. Decides nothing numerical: ``update.py`` does."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import is_fake
from torch.optim.optimizer import Optimizer, ParamsT

from .checks import (
    check_gradient,
    check_groups,
    check_owners,
    check_parameter,
    check_state,
    check_state_dict,
    warn_of_other_moments,
)
from .compiled import Compiled, Eager, Executor, Kind
from .gradient_norm import clip
from .hyper import MOMENT_DTYPES, NAMES, Hyper, check_hyperparameters, check_max_grad_norm
from .plan import Plan, graphs_of
from .sharding import (
    Reduction,
    agree,
    check_layout,
    is_sharded,
    like,
    like_param,
    local,
    local_gradient,
    sharded_types,
    whole_sums,
)
from .store import DERIVED, ENTRIES, MOMENTS, SCALARS, Store, complete, find_largest, init_state, renamed

CODES = dict(zip(MOMENTS, MOMENT_DTYPES["float8"], strict=True))
VERSION_2 = {"nesterov", "caution"}  # hyperparameters that a state of version 0.1 has not
CACHED_PLANS = 8  # sets of parameters with gradients that are remembered


class Cached(NamedTuple):
    """What a step over one set of parameters needs."""

    plans: list[Plan]
    reductions: list[Reduction]


class Lamb16(Optimizer):
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
        lr: learning rate, a float >= 0 or a one-element tensor; changing it never recompiles.
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
        max_grad_norm: scale all gradients so that their norm, over all groups and ranks, is at most this, as
            ``torch.nn.utils.clip_grad_norm_`` before the step does; the gradients themselves are not changed. A tensor
            with a non-finite gradient is skipped and does not enter the norm. ``math.inf`` only measures
            :attr:`grad_norm`. An attribute, which may be changed between steps.
        compile: run the step through ``torch.compile`` (default); ``False`` runs the same functions eagerly. A tool
            may hand in an :class:`lamb16.compiled.Executor`.
        seed: enters the rounding words, with each parameter's name or position.
        amp_scaling: take a ``torch.amp.GradScaler``'s scale and its finding of an inf into the step, as fused AdamW
            does: the scaler then divides no gradient (float16 ones, which it refuses to divide, work too), and nothing
            is read back to the host. Off by default: the scaler divides the gradients and does not call ``step`` where
            one is not finite. Lightning's ``gradient_clip_val`` and accelerate's ``optimizer_step_was_skipped`` need
            it off.

    State of a parameter, plain tensors: ``exp_avg_codes`` (float8_e4m3fn) and ``exp_avg_sq_codes`` (float8_e5m2) of the
    parameter's shape, contiguous, and 0-d: ``exp_avg_scale``, ``exp_avg_sq_scale``, ``exp_avg_max``,
    ``exp_avg_sq_max`` (float32), ``step``, ``salt`` (int32), ``weight_sum``, ``update_sum``, ``mask_count`` (int64).
    The moments are the codes times their scales; no code is above the maximum (of a shard, its own; without the scale);
    the sums are ‖p‖² and ‖u‖² in units of 2^-20, and ``mask_count`` is k. ``state_dict()`` hands the codes
    out as uint8 views. An entry may be replaced, or given other memory, between steps.

    A tensor whose gradient holds an inf or a NaN, or is so large (about 1e19) that v could overflow, is left untouched
    for that step and counted in :attr:`skipped`.

    Raises:
        ValueError: a hyperparameter is out of range (also in a group, or changed to a wrong value between steps); from
            ``step``, a state does not fit its parameter.
        TypeError: a parameter is complex, sparse or of another dtype.
        RuntimeError: from ``step``: a sparse gradient, or no compiler works. A step that raises has changed nothing.

    Example::

        optimizer = Lamb16(model.named_parameters(), lr=0.01, weight_decay=0.01)
        loss.backward()
        optimizer.step()
    """

    _step_supports_amp_scaling = False  # an instance's is ``amp_scaling``; older pickles have none

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
        max_grad_norm: float | None = None,
        compile: bool | Executor = True,
        seed: int = 0,
        amp_scaling: bool = False,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in NAMES}
        check_hyperparameters(defaults)
        check_max_grad_norm(max_grad_norm)
        if not isinstance(compile, bool) and not callable(getattr(compile, "run", None)):
            raise ValueError(f"Lamb16: compile={compile!r} is invalid; it must be True or False")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"Lamb16: seed={seed!r} is invalid; it must be an integer")
        if not isinstance(amp_scaling, bool):
            raise ValueError(f"Lamb16: amp_scaling={amp_scaling!r} is invalid; it must be True or False")
        self.max_grad_norm, self._compile, self._seed = max_grad_norm, compile, seed
        self._step_supports_amp_scaling = amp_scaling  # what GradScaler, Lightning and accelerate look for
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop everything that is derived from parameters and state."""
        self._stores: dict[torch.device, Store] = {}
        self._plans: OrderedDict[Any, Cached] = OrderedDict()
        self._last: list[Plan] = []
        self._skipped: dict[torch.device, Tensor] = {}
        self._grad_norm: Tensor | None = None

    # -- parameter groups ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with any of the constructor's hyperparameters.

        ``compile``, ``seed`` and ``amp_scaling`` are the optimizer's.
        """
        if isinstance(param_group, dict):
            # ZeroRedundancyOptimizer writes all arguments into the groups.
            for name, own in self._own_options().items():
                if param_group.get(name, own) != own:
                    raise ValueError(f"Lamb16: {name} cannot be set in a parameter group; give it to Lamb16(...)")
                param_group.pop(name, None)
            check_hyperparameters(param_group, f" (parameter group {len(self.param_groups)})")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"]):
                check_parameter(p, self._name(group, i))
                check_layout(p, self._name(group, i))
        except Exception:
            self.param_groups.pop()
            raise
        self._plans.clear()

    def _own_options(self) -> dict[str, Any]:
        """The constructor's options that no group can change, by their names."""
        return {"compile": self._compile, "seed": self._seed, "amp_scaling": self._step_supports_amp_scaling}

    def _name(self, group: dict[str, Any], i: int) -> str:
        """The parameter's name, or its position among all parameters."""
        if "param_names" in group:
            return str(group["param_names"][i])
        before = 0
        for other in self.param_groups:
            if other is group:
                break
            before += len(other["params"])
        return str(before + i)

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
        check_max_grad_norm(self.max_grad_norm)
        plans, reductions, grads = self._current_plans()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        try:
            for plan in plans:
                plan.inspect([grads[id(p)] for p in plan.params])
            for reduction in reductions:
                reduction.before()
            factor = None if grad_scale is None else grad_scale.double().reciprocal()
            self._grad_norm = None
            if self.max_grad_norm is not None and plans:
                self._grad_norm, factor = clip(plans, reductions, self.max_grad_norm, factor)
            for plan in plans:
                plan.scale(self._skipped[plan.kind.device], found_inf, factor)
            for plan in plans:
                plan.update()
            for reduction in reductions:
                reduction.after()
        finally:
            for plan in plans:
                plan.let_go()
        self._last = plans
        return loss

    def _current_plans(self) -> tuple[list[Plan], list[Reduction], dict[int, Tensor]]:
        """The plans for the parameters that have gradients, from the cache or new, and these gradients' local parts.

        Gradients are keyed by their parameter's id: a tensor's hash takes longer than all else that is done for it.
        """
        grads: dict[int, Tensor] = {}
        key: list[Any] = []
        sharded = sharded_types()
        for group in self.param_groups:
            key += (id(group), group["moment_dtype"], group["caution"])
            params = group["params"]
            for i, grad in enumerate(map(attrgetter("grad"), params)):
                if grad is not None:
                    p = params[i]
                    if grad.layout != torch.strided or grad.dtype != p.dtype or grad.shape != p.shape:
                        check_gradient(p, grad, self._name(group, i))
                    if sharded and (isinstance(p, sharded) or isinstance(grad, sharded)):
                        grad = local_gradient(p, grad, self._name(group, i))
                    grads[id(p)] = grad
                    key += (id(p), grad.dtype)
        frozen = tuple(key)
        cached = self._plans.get(frozen)
        if cached is None or not all(plan.fits(self.state) for plan in cached.plans):
            if cached is not None or self._holds_dropped_states():  # all is read in again
                self._plans.clear()
                self._stores.clear()
            with torch.inference_mode(False), torch.no_grad():  # what is made here is for later steps, too
                plans = self._make_plans(grads)
            cached = self._plans[frozen] = Cached(plans, Reduction.of(plans))
            if len(self._plans) > CACHED_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(frozen)
        for plan in cached.plans:
            plan.hyper.check()
        return cached.plans, cached.reductions, grads

    def _make_plans(self, grads: dict[int, Tensor]) -> list[Plan]:
        """One plan for each kind of tensor; states that are missing are created once everything has been checked."""
        members: dict[Kind, list[tuple[Tensor, dict[str, Any]]]] = {}
        missing: list[tuple[Tensor, dict[str, Any], str]] = []
        for group in self.param_groups:
            check_hyperparameters(group, running=True)
            for i, p in enumerate(group["params"]):
                if id(p) in grads:
                    check_parameter(p, self._name(group, i))
                    check_layout(p, self._name(group, i))
                    if self.state.get(p):
                        self._check_live_state(p, group, i)
                    else:
                        missing.append((p, group, self._name(group, i)))
                    float8 = group["moment_dtype"] == "float8"
                    kind = Kind(p.device, p.dtype, grads[id(p)].dtype, float8, group["caution"])
                    members.setdefault(kind, []).append((p, group))
        executor = self._executor([p for pairs in members.values() for p, _ in pairs])
        for kind, pairs in members.items():
            params = [p for p, _ in pairs]
            for graph in graphs_of(kind, params, self.max_grad_norm is not None) if type(executor) is not Eager else ():
                executor.prepare(graph, kind)
        made = {
            p: init_state(p, tensor_salt(self._seed, name), group["moment_dtype"] == "float8")
            for p, group, name in missing
        }
        _add_up(made)
        for p, state in made.items():
            self.state[p].update(state)
        for device in {kind.device for kind in members} - set(self._skipped):
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return [self._make_plan(kind, pairs, executor) for kind, pairs in members.items()]

    def _executor(self, params: list[Tensor]) -> Executor:
        """The one that was asked for; eager where there is no memory for generated code to work on."""
        if isinstance(self._compile, bool):
            return Compiled() if self._compile and not any(p.is_meta or is_fake(p) for p in params) else Eager()
        return self._compile

    def _holds_dropped_states(self) -> bool:
        """Whether a store still holds a state that was taken from ``self.state``, or emptied."""
        live = {id(state) for state in self.state.values() if state}
        return any(id(entry) not in live for store in self._stores.values() for entry in store.states)

    def _make_plan(self, kind: Kind, pairs: list[tuple[Tensor, dict[str, Any]]], executor: Executor) -> Plan:
        slices: list[tuple[dict[str, Any], int, int]] = []
        for i, (_, group) in enumerate(pairs):
            if not slices or slices[-1][0] is not group:
                slices.append((group, i, i))
            slices[-1] = (group, slices[-1][1], i + 1)
        params = [p for p, _ in pairs]
        store = self._stores.setdefault(kind.device, Store(kind.device))
        return Plan(kind, params, [self.state[p] for p in params], store, slices, executor)

    def _check_live_state(self, p: Tensor, group: dict[str, Any], i: int) -> None:
        """Refuse a state that does not fit its parameter; repair codes that another loader left as uint8."""
        name, float8 = self._name(group, i), group["moment_dtype"] == "float8"
        state = self.state[p] = renamed(self.state[p])
        missing = set(ENTRIES) - set(DERIVED) - set(state)
        if missing:
            raise ValueError(
                f"Lamb16: the state of parameter {name} has no {sorted(missing)}; delete optimizer.state[parameter] to "
                "start anew, or load a state with Lamb16.load_state_dict"
            )
        for key, dtype in CODES.items():
            wanted = dtype if float8 else torch.float32
            codes = _as_fp8(key, state[key]) if float8 else state[key]
            if is_sharded(codes) != is_sharded(p):
                raise ValueError(
                    f"Lamb16: {key} of parameter {name} is not spread over the ranks as the parameter is; load states "
                    "with Lamb16.load_state_dict, or with torch.distributed.checkpoint.state_dict"
                )
            if codes.shape != p.shape or local(codes).shape != local(p).shape:
                raise ValueError(
                    f"Lamb16: parameter {name} has shape {tuple(p.shape)}, but its state was made for "
                    f"{tuple(codes.shape)}; delete optimizer.state[parameter] when you change a parameter's shape"
                )
            if codes.dtype != wanted:
                raise ValueError(
                    f"Lamb16: {key} of parameter {name} is {codes.dtype}, but its group has "
                    f"moment_dtype={group['moment_dtype']!r}, which needs {wanted}; moment_dtype cannot change after "
                    "the first step, and states must be loaded with Lamb16.load_state_dict"
                )
            if not local(codes).is_contiguous() or codes.device != p.device:
                codes = like(p, _to(local(codes), p.device))
            if local(codes).is_inference():  # of a state that was loaded in inference mode
                codes = like(p, local(codes).clone())
            state[key] = codes
        store = self._stores.get(p.device)
        if store is None or not store.holds([state]):  # the codes may be others than the maxima are of
            find_largest(state)
            if complete(p, state):
                _add_up({p: state})

    # -- what can be read ----------------------------------------------------------------------------------------

    @property
    def skipped(self) -> int:
        """How many tensor updates were left out because of a non-finite gradient; reading waits for the device.

        Counted since this object was made: deepcopy and pickle keep the count, ``state_dict`` does not hold it.
        """
        return sum(int(count) for count in self._skipped.values())

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before clipping, without a gradient scaler's scale; float64, 0-d.

        Of all finite gradients, of all groups and ranks, on the first parameter's device. None where ``max_grad_norm``
        is None. Nothing is copied to the host.
        """
        return self._grad_norm

    def layer_stats(self) -> dict[str, dict[str, Tensor]]:
        """What the trust ratios of the last step came from, per parameter name (or position).

        Returns for every non-empty parameter that had a gradient a dict of ``weight_norm`` (of the weights before that
        step, as the step before left them), ``update_norm`` (of the step before that; √numel before the first), both
        clamped as in the rule, and ``trust_ratio``: 0-d float64 tensors on the parameter's device. Nothing is copied to
        the host. For a skipped tensor the ratio is the one that was not used.
        """
        names: dict[Tensor, str] = {}
        for k, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                name = self._name(group, i)
                names[p] = f"{k}.{name}" if name in names.values() else name
        stats = {}
        for plan in self._last:
            report = plan.report.clone()
            for row, p in zip(report, plan.params, strict=False):
                if p.numel() and p in names:
                    stats[names[p]] = dict(zip(("weight_norm", "update_norm", "trust_ratio"), row, strict=True))
        return stats

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as torch's optimizers give it, with the fp8 codes as uint8 views.

        Always uint8: collectives, pickle and checkpoint code fail on fp8 tensors or cast them silently.
        """
        state_dict = super().state_dict()
        state_dict["state"] = {key: _map_codes(state, _as_bytes) for key, state in state_dict["state"].items()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; codes as uint8 or fp8, kept bit for bit, as are the float32 scales.

        For DTensor parameters all ranks must call this, with codes that are DTensors of any placements or whole.

        Raises:
            ValueError: groups, shapes, dtypes or entries do not fit, on this rank or another; nothing is changed then.
        """
        state_dict = state_dict.copy()
        error: Exception | None = None
        try:
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                replaced = hook(self, state_dict)
                if replaced is not None:
                    state_dict = replaced
            groups = self._checked_groups(state_dict)
            state_dict["state"] = {key: renamed(state) for key, state in state_dict["state"].items()}
            known = self._checked_owners(state_dict, groups)
        except Exception as found:
            error = found
        agree(error, [p for group in self.param_groups for p in group["params"]])
        warn_of_other_moments(groups, self.param_groups)
        self.__setstate__({"state": self._read_state(state_dict, known), "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked_groups(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The saved groups with this optimizer's parameters in them."""
        check_state_dict(state_dict)
        saved = state_dict["param_groups"]
        check_groups(saved, self.param_groups)
        check_owners(state_dict)
        groups = []
        for k, (new, old) in enumerate(zip(saved, self.param_groups, strict=True)):
            missing = set(NAMES) - set(new)
            if missing - VERSION_2:
                raise ValueError(
                    f"Lamb16.load_state_dict: group {k} has no {sorted(missing)}: this is another optimizer's state"
                )
            new = {name: old[name] for name in missing} | new
            check_hyperparameters(new, f".load_state_dict (group {k})", running=True)
            group = {key: deepcopy(value) for key, value in new.items() if key not in ("params", "param_names")}
            group["params"] = old["params"]
            if "param_names" in old:
                group["param_names"] = old["param_names"]
            groups.append(group)
        return groups

    def _checked_owners(
        self, state_dict: dict[str, Any], groups: list[dict[str, Any]]
    ) -> dict[Any, tuple[Tensor, dict[str, Any]]]:
        """This optimizer's parameter, and its group, for every key of the saved state that stands for one."""
        ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        owners = [(p, group, i) for group in groups for i, p in enumerate(group["params"])]
        known = dict(zip(ids, owners, strict=True))
        for key, value in state_dict["state"].items():
            if key in known:
                p, group, i = known[key]
                check_state(value, p, self._name_in(groups, group, i), group["moment_dtype"])
        return {key: (p, group) for key, (p, group, _) in known.items()}

    def _read_state(
        self, state_dict: dict[str, Any], known: dict[Any, tuple[Tensor, dict[str, Any]]]
    ) -> dict[Any, Any]:
        """The saved states keyed by this optimizer's parameters, copied to their devices and spread as they are."""
        state, derived = {}, {}
        for key, value in state_dict["state"].items():
            if key not in known:
                state[key] = value
                continue
            p, group = known[key]
            loaded = init_state(p, int(value["salt"]) & 0xFFFFFFFF, group["moment_dtype"] == "float8")
            for name in CODES:
                part, target = like_param(p, _as_bytes(name, value[name])), local(loaded[name])
                target.view(-1).view(_bits(target)).copy_(part.reshape(-1).view(_bits(part)))
            for name in set(SCALARS) & set(value) - {"salt"}:
                loaded[name].fill_(float(value[name]) if loaded[name].is_floating_point() else int(value[name]))
            find_largest(loaded)
            state[p] = loaded | foreign_entries(value, p.device)
            if "weight_sum" not in value:
                derived[p] = state[p]
        _add_up(derived)
        return state

    def _name_in(self, groups: list[dict[str, Any]], group: dict[str, Any], i: int) -> str:
        index = next(k for k, g in enumerate(groups) if g is group)
        return self._name(self.param_groups[index], i)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: fp8 codes as uint8, since torch cannot unpickle fp8 tensors."""
        pickled: dict[str, Any] = super().__getstate__()
        pickled["state"] = {p: _map_codes(state, _as_bytes) for p, state in self.state.items()}
        skipped = {device: count.clone() for device, count in self._skipped.items()}
        own = ("max_grad_norm", "_compile", "_seed", "_step_supports_amp_scaling")
        return pickled | {name: getattr(self, name) for name in own} | {"_skipped": skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.get("_skipped", self.__dict__.get("_skipped", {}))
        states = state["state"]
        new = {k: (_map_codes(renamed(v), _as_fp8) if isinstance(k, Tensor) else v) for k, v in states.items()}
        super().__setstate__(state | {"state": defaultdict(dict, new)})
        for group in self.param_groups:
            for name in NAMES:
                group.setdefault(name, self.defaults[name])
        self._forget()
        self._skipped = skipped


def _add_up(states: dict[Tensor, dict[str, Any]]) -> None:
    """Make the sums of split parameters' weights those of whole ones; all ranks must be here with the same ones."""
    split = {p: state for p, state in states.items() if is_sharded(p)}
    for device in {p.device for p in split}:
        own = {p: state for p, state in split.items() if p.device == device}
        sums = [state["weight_sum"] for state in own.values()]
        whole_sums(list(own), sums, [int(state["salt"]) & 0xFFFFFFFF for state in own.values()])


def tensor_salt(seed: int, name: str) -> int:
    """A 32-bit salt from the seed and the parameter's name, the same on every machine."""
    digest = hashlib.blake2s(f"{seed}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def foreign_entries(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copies of the entries that others added to a state, as Lookahead does; tensors on the parameter's device."""
    added = {key: value for key, value in state.items() if key not in ENTRIES}
    return {
        key: value.detach().to(device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
        for key, value in added.items()
    }


def _map_codes(state: Any, convert: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy of one parameter's state with its codes converted."""
    if not isinstance(state, dict):
        return state
    return {key: convert(key, value) if key in CODES else value for key, value in state.items()}


def _as_bytes(key: str, codes: Tensor) -> Tensor:
    return like(codes, local(codes).view(torch.uint8)) if codes.dtype == CODES[key] else codes


def _as_fp8(key: str, codes: Tensor) -> Tensor:
    return like(codes, local(codes).view(CODES[key])) if codes.dtype == torch.uint8 else codes


def _bits(tensor: Tensor) -> torch.dtype:
    return torch.uint8 if tensor.element_size() == 1 else tensor.dtype


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on ``device``; fp8 moves as bytes."""
    dtype = tensor.dtype
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.to(device).contiguous().view(dtype)
