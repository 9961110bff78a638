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
from torch.optim.optimizer import Optimizer, ParamsT

from .checks import (
    check_fake,
    check_gradient,
    check_gradient_memory,
    check_groups,
    check_memory,
    check_owners,
    check_parameter,
    check_scaler,
    check_state,
    check_state_dict,
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
from .store import DERIVED, ENTRIES, MOMENTS, SCALARS, Store, addresses, complete, find_largest, init_state, renamed
from .wrapped import fake_mode, is_fake

CODES = dict(zip(MOMENTS, MOMENT_DTYPES["float8"], strict=True))
VERSION_2 = {"nesterov", "caution"}  # hyperparameters that a state of version 0.1 has not
CACHED_PLANS = 8  # sets of parameters with gradients that are remembered


class Cached(NamedTuple):
    """What a step over one set of parameters needs."""

    plans: list[Plan]
    reductions: list[Reduction]
    weights: set[int]  # where the weights begin


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

    _step_supports_amp_scaling = True  # GradScaler hands grad_scale and found_inf over instead of reading them

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
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in NAMES}
        check_hyperparameters(defaults)
        check_max_grad_norm(max_grad_norm)
        if not isinstance(compile, bool) and not callable(getattr(compile, "run", None)):
            raise ValueError(f"Lamb16: compile={compile!r} is invalid; it must be True or False")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"Lamb16: seed={seed!r} is invalid; it must be an integer")
        self.max_grad_norm, self._compile, self._seed = max_grad_norm, compile, seed
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
        """Add a group of parameters, with any of the constructor's hyperparameters but ``compile`` and ``seed``."""
        if isinstance(param_group, dict):
            # ZeroRedundancyOptimizer writes all arguments into the groups.
            for name, own in (("compile", self._compile), ("seed", self._seed)):
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

    def _name(self, group: dict[str, Any], i: int) -> str:
        """The parameter's name, or its position among all parameters."""
        if "param_names" in group:
            names = group["param_names"]
            if i >= len(names):
                raise ValueError(
                    f"Lamb16: a parameter group has {len(group['params'])} parameters and {len(names)} names; give "
                    "group['param_names'] a name for each, or add the parameters with add_param_group"
                )
            return str(names[i])
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; ``closure``, if given, reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_max_grad_norm(self.max_grad_norm)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        check_scaler(grad_scale, found_inf)
        try:
            self._last = self._step(grad_scale, found_inf)
        finally:
            for cached in self._plans.values():
                for plan in cached.plans:
                    plan.let_go()
        return loss

    def _step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Plan]:
        try:
            (plans, reductions, _), grads, states = self._current_plans()
        except (KeyError, TypeError):
            for group in self.param_groups:
                check_hyperparameters(group, running=True)
            raise
        for plan, own in zip(plans, states, strict=True):
            plan.inspect([grads[key] for key in plan.ids], own)
        for reduction in reductions:
            reduction.before()
        factor = None if grad_scale is None else grad_scale.double().reciprocal().view(())
        self._grad_norm = None
        if self.max_grad_norm is not None and plans:
            self._grad_norm, factor = clip(plans, reductions, self.max_grad_norm, factor)
        for plan in plans:
            device = plan.kind.device
            if device not in self._skipped:
                self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
            plan.scale(self._skipped[device], found_inf, factor)
        for plan in plans:
            plan.update()
        for reduction in reductions:
            reduction.after()
        return plans

    def _current_plans(self) -> tuple[Cached, dict[int, Tensor], list[list[Any]]]:
        """The plans for the parameters that have gradients, from the cache or new; these gradients' local parts; and
        the states of each plan's parameters.

        Gradients are keyed by their parameter's id: a tensor's hash takes longer than all else that is done for it.
        """
        grads: dict[int, Tensor] = {}
        params_of: dict[int, Tensor] = {}
        key: list[Any] = [torch.is_inference_mode_enabled()]
        sharded, fake = sharded_types(), fake_mode()
        for group in self.param_groups:
            key += (id(group), group["moment_dtype"], group["caution"])
            params = group["params"]
            for i, grad in enumerate(map(attrgetter("grad"), params)):
                if grad is not None:
                    p = params[i]
                    special = type(grad) is not Tensor or (sharded and isinstance(p, sharded))
                    if special or grad.layout != torch.strided or grad.dtype != p.dtype or grad.shape != p.shape:
                        check_gradient(p, grad, self._name(group, i))
                    if special or fake:
                        check_fake(p, grad, self._name(group, i))
                        grad = local_gradient(p, grad, self._name(group, i))
                    grads[id(p)], params_of[id(p)] = grad, p
                    key += (id(p), grad.dtype)
        starts = addresses(list(grads.values()))
        if 0 in starts:
            self._check_gradients_memory(grads)
        frozen = tuple(key)
        cached = self._plans.get(frozen)
        if cached is not None and not all(plan.fits(params_of) for plan in cached.plans):
            self._plans.clear()
            cached = None
        if cached is None:
            plans = self._make_plans(grads)
            weights = {start for plan in plans for start in plan.memory[0]} - {0}
            cached = self._plans[frozen] = Cached(plans, Reduction.of(plans), weights)
            if len(self._plans) > CACHED_PLANS:
                self._plans.popitem(last=False)
        states: list[list[Any]] = [list(map(self.state.get, plan.params)) for plan in cached.plans]
        if any(
            None in own or plan.store.changed(own, plan.homes) for plan, own in zip(cached.plans, states, strict=True)
        ):
            self._ready_states(
                grads, {id(p) for plan, own in zip(cached.plans, states, strict=True) for p in plan.touched(own)}
            )
            for plan in cached.plans:
                plan.place(plan.store.adopt([self.state[p] for p in plan.params], self.state.values()))
            states = [[self.state[p] for p in plan.params] for plan in cached.plans]
            cached = self._plans[frozen] = cached._replace(reductions=Reduction.of(cached.plans))
        self._plans.move_to_end(frozen)
        for plan in cached.plans:
            plan.hyper.check()
        if not cached.weights.isdisjoint(starts):  # weights as gradients, which the step would change as it reads them
            grads = {k: g.clone() if g.data_ptr() in cached.weights else g for k, g in grads.items()}
        return cached, grads, states

    def _check_gradients_memory(self, grads: dict[int, Tensor]) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if id(p) in grads:
                    check_gradient_memory(grads[id(p)], self._name(group, i))

    def _make_plans(self, grads: dict[int, Tensor]) -> list[Plan]:
        """One plan for each kind of tensor, once everything has been checked and the states are there."""
        executor = self._executor()
        members: dict[Kind, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            check_hyperparameters(group, running=True)
            for i, p in enumerate(group["params"]):
                if id(p) in grads:
                    name = self._name(group, i)
                    check_parameter(p, name)
                    check_layout(p, name)
                    if grads[id(p)].device != p.device:
                        raise RuntimeError(
                            f"Lamb16: parameter {name} is on {p.device}, but its gradient on {grads[id(p)].device}; "
                            "set the gradient to None when you move a parameter"
                        )
                    if is_fake(p):
                        executor = Eager()  # there is no memory that generated code could work on
                    float8 = group["moment_dtype"] == "float8"
                    kind = Kind(p.device, p.dtype, grads[id(p)].dtype, float8, group["caution"])
                    members.setdefault(kind, []).append((p, group))

        def prepare() -> None:
            for kind, pairs in members.items():
                params = [p for p, _ in pairs]
                for graph in graphs_of(kind, params, self.max_grad_norm is not None) if self._compile else ():
                    executor.prepare(graph, kind)

        self._ready_states(grads, self._unknown(members), prepare)
        return [self._make_plan(kind, pairs, executor) for kind, pairs in members.items()]

    def _unknown(self, members: dict[Kind, list[tuple[Tensor, dict[str, Any]]]]) -> set[int]:
        """The parameters, by id, with states that no store holds, or that were made for a parameter of another kind."""
        unknown: set[int] = set()
        for kind, pairs in members.items():
            there = [(p, state) for p, _ in pairs if (state := self.state.get(p))]
            store = self._stores.setdefault(kind.device, Store(kind.device))
            unknown.update(id(there[k][0]) for k in store.changed([state for _, state in there]))
            unknown.update(id(p) for p, state in there if not _is_ready(p, state, kind.float8))
        return unknown

    def _ready_states(
        self, grads: dict[int, Tensor], changed: set[int], prepare: Callable[[], None] = lambda: None
    ) -> None:
        """Check those states of parameters with gradients that have changed, by the parameters' ids, and repair them.

        Missing ones are created. Nothing is changed before all has been checked and ``prepare`` called.
        """
        missing: list[tuple[Tensor, dict[str, Any], str]] = []
        live: list[tuple[Tensor, dict[str, Any]]] = []
        written: list[tuple[Tensor, str]] = []
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if id(p) in grads:
                    name, state = self._name(group, i), self.state.get(p)
                    written.append((local(p), f"parameter {name}"))
                    if not state:
                        missing.append((p, group, name))
                        continue
                    if id(p) in changed:
                        state = self._checked_live_state(p, group, name)
                        live.append((p, state))
                    written += [(local(state[key]), f"{key} of parameter {name}") for key in MOMENTS]
        check_memory(written)
        prepare()
        self._repair(live)
        made = {
            p: init_state(p, tensor_salt(self._seed, name), group["moment_dtype"] == "float8")
            for p, group, name in missing
        }
        _add_up(made)
        for p, state in made.items():
            self.state[p].update(state)

    def _executor(self) -> Executor:
        if isinstance(self._compile, bool):
            return Compiled() if self._compile else Eager()
        return self._compile

    def _make_plan(self, kind: Kind, pairs: list[tuple[Tensor, dict[str, Any]]], executor: Executor) -> Plan:
        slices: list[tuple[dict[str, Any], int, int]] = []
        for i, (_, group) in enumerate(pairs):
            if not slices or slices[-1][0] is not group:
                slices.append((group, i, i))
            slices[-1] = (group, slices[-1][1], i + 1)
        params = [p for p, _ in pairs]
        store = self._stores.setdefault(kind.device, Store(kind.device))
        homes = store.adopt([self.state[p] for p in params], self.state.values())
        return Plan(kind, params, homes, store, slices, executor)

    def _checked_live_state(self, p: Tensor, group: dict[str, Any], name: str) -> dict[str, Any]:
        """What a state is to hold: codes that another loader left as uint8, or elsewhere, are repaired in it.

        Raises ValueError for a state that does not fit its parameter.
        """
        float8 = group["moment_dtype"] == "float8"
        state = dict(renamed(self.state[p]))
        if _is_ready(p, state, float8):
            return state
        missing = set(ENTRIES) - set(DERIVED) - set(state)
        if missing:
            raise ValueError(
                f"Lamb16: the state of parameter {name} has no {sorted(missing)}; delete optimizer.state[parameter] to "
                "start anew, or load a state with Lamb16.load_state_dict"
            )
        for key in set(SCALARS) & set(state):
            value = state[key]
            if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.numel() != 1):
                raise ValueError(
                    f"Lamb16: {key} of parameter {name} is {value!r}, expected one number; load states with "
                    "Lamb16.load_state_dict"
                )
        for key, dtype in CODES.items():
            wanted = dtype if float8 else torch.float32
            if not isinstance(state[key], Tensor):
                raise ValueError(
                    f"Lamb16: {key} of parameter {name} is {state[key]!r}, expected a tensor; delete "
                    "optimizer.state[parameter] to start anew, or load a state with Lamb16.load_state_dict"
                )
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
            state[key] = codes
        return state

    def _repair(self, live: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Give states the entries that they are to hold, and what is derived from them where they have changed."""
        changed = []
        for p, repaired in live:
            state = self.state[p]
            if state.keys() - repaired.keys():  # old names
                state = self.state[p] = repaired
            state.update(repaired)
            if not (is_sharded(p) and self._stores[p.device].holds([state])):
                changed.append((p, state))  # its codes may be others than the maxima are of
        find_largest(*(state for _, state in changed))
        _add_up({p: state for p, state in changed if complete(p, state)})

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
        names: dict[int, str] = {}
        for k, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                name = self._name(group, i)
                if p.numel():
                    names[id(p)] = f"{k}.{name}" if name in names.values() else name
        stats = {}
        for plan in self._last:
            report = plan.report.clone()
            for row, key in zip(report, plan.ids, strict=False):
                if key in names:
                    stats[names[key]] = dict(zip(("weight_norm", "update_norm", "trust_ratio"), row, strict=True))
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
            state[p] = loaded
            if "weight_sum" not in value:
                derived[p] = loaded
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
        own = {"max_grad_norm": self.max_grad_norm, "_compile": self._compile, "_seed": self._seed}
        return pickled | own | {"_skipped": skipped}

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


def _is_ready(p: Tensor, state: dict[str, Any], float8: bool) -> bool:
    """Whether a state has all entries, and nothing of it is to be repaired; False for all DTensors."""
    moments = [state.get(name) for name in MOMENTS]
    return (
        all(
            type(x) is Tensor and x.dtype == dtype and x.shape == p.shape and x.device == p.device and x.is_contiguous()
            for x, dtype in zip(moments, MOMENT_DTYPES["float8" if float8 else "float32"], strict=True)
        )
        and not is_sharded(p)
        and all(type(x) is Tensor and x.numel() == 1 for x in map(state.get, SCALARS))
    )


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
