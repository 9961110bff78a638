"""class Lamb16: parameter groups, state, checkpoints. Decides nothing numerical: ``update.py`` does."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from .checks import (
    check_fake,
    check_gradient,
    check_gradient_memory,
    check_memory,
    check_owners,
    check_parameter,
    check_resize,
    check_rounding,
    check_scaler,
    check_state,
    check_state_dict,
    warn_of_other_moments,
)
from .convert import OWN, Foreign, as_lamb16, check_foreign, keys_of, own_group, share, to_adamw, unwrapped
from .hyper import MOMENT_DTYPES, NAMES, Hyper, check_hyperparameters, check_max_grad_norm
from .matching import Loaded, Match, match
from .offload import check_homes, check_reloaded, checked_device, move
from .remainder import (
    REMAINDER,
    as_bytes,
    check_float32_weights,
    fitted,
    float32_weights,
    from_bytes,
    has_remainder,
    is_exact,
    load_weights,
    no_remainder,
)
from .sharding.exchange import agree, digest, whole_sums
from .sharding.layout import (
    check_layout,
    is_sharded,
    like,
    like_param,
    local,
    local_gradient,
    placement,
)
from .sharding.reduction import Bound, Reduction, meet, signature
from .step.compiled import Compiled, Eager, Executor, Kind
from .step.gradient_norm import clip
from .step.parts import Part, divisible
from .step.plan import Plan, graphs_of
from .store import (
    ALL_ENTRIES,
    DERIVED,
    ENTRIES,
    MOMENTS,
    SCALARS,
    WIDTH,
    Store,
    addresses,
    complete,
    find_largest,
    init_state,
    renamed,
    resized,
    weight_sum,
)
from .wrapped import PLAIN, fake_mode, is_fake

if TYPE_CHECKING:
    from .release import GradientRelease

CODES = dict(zip(MOMENTS, MOMENT_DTYPES["float8"], strict=True))
NUMBERS = itertools.count()  # of the optimizers of this process that have parameters without names
GRAD, DTYPE, LAYOUT, SHAPE, DEVICE = map(attrgetter, ("grad", "dtype", "layout", "shape", "device"))
CACHED_PLANS = 8  # sets of parameters with gradients that are remembered


class Cached(NamedTuple):
    """What a step over one set of parameters needs."""

    plans: list[Plan]
    reductions: list[Bound]
    signature: int
    weights: set[int]  # where the weights begin
    setting: Any = None  # what must be equal in steps of parts of these plans
    members: Mapping[int, Any] = {}  # by parameters' ids their groups' and their gradients' dtypes


class New(NamedTuple):
    """Parameters whose states hold the sum of this rank's weights: ``made``, or ``completed`` from older ones."""

    made: list[Tensor]
    completed: list[Tensor]


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
        seed: enters the rounding words, with each parameter's name. Parameters without names have their position and
            their optimizer's number among those that the process has made with such parameters: optimizers round
            independently of each other, and alike in the next run of a program. Two that are to go the same way in one
            process need names. State dicts keep what follows from all that, each tensor's ``salt``.
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
        TypeError: a parameter is complex, sparse or of another dtype.
        RuntimeError: from ``step``: a sparse gradient, or no compiler works. A step that raises has changed nothing.

    Example::

        optimizer = Lamb16(model.named_parameters(), lr=0.01, weight_decay=0.01)
        loss.backward()
        optimizer.step()
    """

    _amp_scaling = False  # older pickles have none
    _release: GradientRelease | None = None  # what steps the parameters within backward passes

    _number: int | None = None  # pickles of version 0.1 have none

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
        self.max_grad_norm, self._compile, self._seed, self._amp_scaling = max_grad_norm, compile, seed, amp_scaling
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop everything that is derived from parameters and state."""
        self._stores: dict[torch.device, Store] = {}
        self._plans: OrderedDict[Any, Cached] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()  # sets that came lately
        self._last: list[Plan] = []
        self._skipped: dict[torch.device, Tensor] = {}
        self._grad_norm: Tensor | None = None
        self._offloaded: torch.device | None = None

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
                check_rounding(p, group, self._name(group, i))
            if self._release is not None:
                self._release.watch(group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        if "param_names" not in group and self._number is None:
            self._number = next(NUMBERS)
        self._plans.clear()

    def _salt(self, group: dict[str, Any], i: int) -> int:
        """From the name; without one from the position and, but for the process's first, the optimizer's number."""
        name = self._name(group, i)
        return tensor_salt(
            self._seed, f"{self._number}/{name}" if self._number and "param_names" not in group else name
        )

    def _own_options(self) -> dict[str, Any]:
        """The constructor's options that no group can change, by their names."""
        return {"compile": self._compile, "seed": self._seed, "amp_scaling": self._amp_scaling}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler, Lightning and accelerate look for. It makes a scaler call ``step``, also to be refused."""
        return self._amp_scaling or self._release is not None

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

    @torch.no_grad()
    def resize(self, p: Tensor, index: Tensor, new_p: Tensor) -> None:
        """Put ``new_p`` in the place of ``p``, with the state of the rows that it keeps.

        For code that cuts and extends parameters along their first dimension, as densification of Gaussians does::

            index = torch.cat([kept.nonzero()[:, 0], torch.full((added,), -1)])
            optimizer.resize(p, index, new_p)

        Step, salt and scales are kept. New rows start with moments of 0; the update that the next trust ratio goes by
        is taken to be, on average over the elements, what it was. Entries that others added to the state are left out.

        Args:
            p: a parameter of this optimizer, a plain tensor of at least one dimension.
            index: int64 [rows of ``new_p``], on any device: the row of ``p`` whose moments each gets, -1 for none.
            new_p: a leaf that is not in this optimizer, of ``p``'s dtype, device and shape but for the number of rows.
                Its weights are the caller's.

        Raises:
            ValueError: one of these is something else; nothing is changed then.
            RuntimeError: the state is offloaded.
        """
        check_reloaded(self.offloaded, "resize")
        places = {id(x): (group, i) for group in self.param_groups for i, x in enumerate(group["params"])}
        if id(p) not in places or id(new_p) in places:
            fault = "new_p is in it already" if id(p) in places else "p is not one of its parameters"
            raise ValueError(
                f"Lamb16.resize: {fault}; give a parameter of this optimizer and the one that takes its place"
            )
        group, i = places[id(p)]
        check_resize(p, index, new_p, self._name(group, i))
        state = self.state.get(p)
        if state:
            self._repair([(p, self._checked_live_state(p, group, i))], New([], []))
            state = resized(self.state[p], index.to(p.device), p, new_p)
        self.state.pop(p, None)
        group["params"][i] = new_p
        if state:
            self.state[new_p] = state
        if self._release is not None:
            self._release.replace(p, new_p)
        self._plans.clear()
        self._stores.clear()
        self._last = []

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
            self._last = self._step(grad_scale, found_inf)
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

    def _step(self, grad_scale: Any, found_inf: Any, given: dict[int, Tensor] | None = None) -> list[Plan]:
        """Step the parameters that have gradients, or those that they are ``given`` for by id; returns their plans."""
        plans: list[Plan] = []
        try:
            plans = self._run(grad_scale, found_inf, given)
        finally:
            for plan in (*self._last, *plans, *(plan for cached in self._plans.values() for plan in cached.plans)):
                plan.let_go()
        return plans

    def _run(self, grad_scale: Any, found_inf: Any, given: dict[int, Tensor] | None) -> list[Plan]:
        cached = self._begin(grad_scale, found_inf, given)
        plans = cached.plans
        factor = None if grad_scale is None else grad_scale.double().reciprocal().view(())
        self._grad_norm = None
        if self.max_grad_norm is not None and plans:
            self._grad_norm, factor = clip(plans, cached.reductions, self.max_grad_norm, factor)
        for plan in plans:
            plan.scale(self._skipped[plan.kind.device], found_inf, factor)
        for plan in plans:
            plan.update()
        for reduction in cached.reductions:
            reduction.after()
        return plans

    def _begin(self, grad_scale: Any, found_inf: Any, given: dict[int, Tensor] | None) -> Cached:
        """Plans that have read the gradients, and what the ranks reduce; raises on all ranks with nothing changed."""
        cached, new, error = Cached([], [], 0, set()), New([], []), None
        try:
            check_reloaded(self.offloaded, "step")
            self._offloaded = None  # a state that there is none of is nowhere
            check_max_grad_norm(self.max_grad_norm)
            check_scaler(grad_scale, found_inf)
            if self._release is not None:
                self._release.check()
            cached, grads, states = self._current_plans(new, given)
            for plan, own in zip(cached.plans, states, strict=True):
                plan.inspect([grads[key] for key in plan.ids], own)
        except Exception as found:
            error = self._cause(found)
        try:
            reductions = cached.reductions if error is None else self._reductions([])
            if reductions:
                salts = [[int(self.state[p]["salt"]) for p in part if is_sharded(p)] for part in new]
                clips = self.max_grad_norm is not None and [len(cached.plans) > 0, [x.alone for x in reductions]]
                meet(reductions, digest([cached.signature, salts, clips]), error)
            elif error is not None:
                raise error
            _add_up({p: self.state[p] for p in (*new.made, *new.completed)})
        except BaseException:
            self._take_back(new)
            raise
        return cached

    def _cause(self, error: Exception) -> Exception:
        """The error that a wrong hyperparameter is, where that is what this one came of."""
        if isinstance(error, (KeyError, TypeError)):
            try:
                for group in self.param_groups:
                    check_hyperparameters(group, running=True)
            except ValueError as cause:
                return cause
        return error

    def _reductions(self, plans: list[Plan]) -> list[Bound]:
        params = [p for group in self.param_groups for p in group["params"]]
        return [reduction.bind(plans) for reduction in Reduction.of(params)]

    def _take_back(self, new: New) -> None:
        """Leave the states as they were before a step that could not be taken."""
        for p in new.made:
            self.state.pop(p, None)
        for p in new.completed:
            self.state[p].pop("weight_sum", None)
        if any(new):
            self._plans.clear()
            self._stores.clear()

    def _current_plans(
        self, new: New, given: dict[int, Tensor] | None
    ) -> tuple[Cached, dict[int, Tensor], list[list[Any]]]:
        """The plans for the parameters that have gradients, from the cache or new; these gradients' local parts; and
        the states of each plan's parameters.

        Gradients are keyed by their parameter's id: a tensor's hash takes longer than all else that is done for it.
        ``new`` is filled.
        """
        grads: dict[int, Tensor] = {}
        params_of: dict[int, Tensor] = {}
        inference = torch.is_inference_mode_enabled()
        setting: list[Any] = [inference, self.max_grad_norm is None]
        key: list[Any] = [*setting]
        fake = fake_mode()
        for group in self.param_groups:
            setting += (id(group), group["moment_dtype"], group["caution"], group["param_rounding"])
            key += setting[-4:]
            every = group["params"]
            found = list(map(GRAD, every) if given is None else map(given.get, map(id, every)))
            pairs = [(p, g) for p, g in zip(every, found, strict=True) if g is not None]
            params, own = [p for p, _ in pairs], [g for _, g in pairs]
            if fake or not _are_plain(params, own):
                own = [self._checked_gradient(g, group, i, fake) for i, g in enumerate(found) if g is not None]
            ids = list(map(id, params))
            grads.update(zip(ids, own, strict=True))
            params_of.update(zip(ids, params, strict=True))
            key += ids
            key += map(DTYPE, own)
        if given is not None and len(grads) < len(given):
            raise RuntimeError(
                "Lamb16: a parameter whose gradients are released has left the optimizer's groups; remove() the "
                "release before you take parameters out"
            )
        starts = addresses(list(grads.values()))
        if 0 in starts:
            self._check_gradients_memory(grads)
        frozen = tuple(key)
        cached = self._plans.get(frozen)
        if cached is not None and not all(plan.fits(params_of) for plan in cached.plans):
            self._plans.clear()
            cached = None
        part = None if cached is not None else self._part(frozen, setting, grads, params_of)
        cached, changed = cached or part, cached is None and part is None
        if cached is None:
            with torch.inference_mode(False), torch.no_grad():  # what is made here is for later steps, too
                plans = self._make_plans(grads, new, inference)
            weights = {start for plan in plans for start in plan.memory[0]} - {0}
            cached = Cached(plans, [], 0, weights, setting, self._members(grads))
        states: list[list[Any]] = [list(map(self.state.get, plan.params)) for plan in cached.plans]
        touched = {id(p) for plan, own in zip(cached.plans, states, strict=True) for p in plan.touched(own)}
        if touched:
            with torch.inference_mode(False), torch.no_grad():
                self._ready_states(grads, touched, new, inference)
                for plan in cached.plans:
                    own = [self.state[p] for p in plan.params]
                    read = [state for state, key in zip(own, plan.ids, strict=True) if key in touched]
                    plan.place(plan.store.adopt(own, read, self.state.values()))
            states = [[self.state[p] for p in plan.params] for plan in cached.plans]
            changed = True
        if changed and part is None:
            reductions = self._reductions(cached.plans)
            number = signature(cached.plans) if reductions else 0
            self._remember(frozen, cached._replace(reductions=reductions, signature=number))
            cached = self._plans[frozen]
        if part is None:
            self._plans.move_to_end(frozen)
        for plan in cached.plans:
            plan.hyper.check()
        if not cached.weights.isdisjoint(starts):  # weights as gradients, which the step would change as it reads them
            grads = {k: g.clone() if g.data_ptr() in cached.weights else g for k, g in grads.items()}
        return cached, grads, states

    def _checked_gradient(self, grad: Tensor, group: dict[str, Any], i: int, fake: bool) -> Tensor:
        """This rank's part of the gradient of a group's parameter."""
        p, name = group["params"][i], self._name(group, i)
        special = type(grad) is not Tensor or is_sharded(p)
        if special or grad.layout != torch.strided or grad.dtype != p.dtype or grad.shape != p.shape:
            check_gradient(p, grad, name)
        if special or fake:
            check_fake(p, grad, name)
            return local_gradient(p, grad, name)
        return grad

    def _members(self, grads: dict[int, Tensor]) -> dict[int, Any]:
        """By parameters' ids what must be equal in plans of which a step can be a part."""
        return {
            id(p): (id(group), grads[id(p)].dtype)
            for group in self.param_groups
            for p in group["params"]
            if id(p) in grads
        }

    def _part(self, key: Any, setting: list[Any], grads: dict[int, Tensor], params: dict[int, Tensor]) -> Cached | None:
        """Parts of plans that are remembered for more parameters, where these ones have come for the first time."""
        if key in self._seen:
            return None
        self._seen[key] = None
        if len(self._seen) > self._cached_plans:
            self._seen.popitem(last=False)
        own = self._members(grads)
        for known, cached in reversed(self._plans.items()):
            if cached.setting != setting or not own or not own.items() <= cached.members.items():
                continue
            if cached.reductions or not all(map(divisible, cached.plans)):
                continue
            parts: list[Plan] = [Part(plan, own) for plan in cached.plans if not own.keys().isdisjoint(plan.ids)]
            if all(part.fits(params) for part in parts):
                self._plans.move_to_end(known)
                return cached._replace(plans=parts)
        return None

    def _remember(self, key: Any, cached: Cached) -> None:
        """Keep plans for later steps, but for those of groups that are gone."""
        groups = set(map(id, self.param_groups))
        for old, other in list(self._plans.items()):
            if any(id(group) not in groups for plan in other.plans for group, _, _ in plan.hyper.groups):
                del self._plans[old]
        self._plans[key] = cached
        if len(self._plans) > self._cached_plans:
            self._plans.popitem(last=False)

    @property
    def _cached_plans(self) -> int:
        """How many sets of parameters with gradients are remembered."""
        return CACHED_PLANS if self._release is None else self._release.cached_plans

    def _check_gradients_memory(self, grads: dict[int, Tensor]) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if id(p) in grads:
                    check_gradient_memory(grads[id(p)], self._name(group, i))

    def _make_plans(self, grads: dict[int, Tensor], new: New, inference: bool) -> list[Plan]:
        """One plan for each kind of tensor, once everything has been checked and the states are there."""
        members: dict[Kind, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            check_hyperparameters(group, running=True)
            for i, p in enumerate(group["params"]):
                if id(p) in grads:
                    name = self._name(group, i)
                    check_parameter(p, name)
                    check_layout(p, name)
                    check_rounding(p, group, name)
                    if grads[id(p)].device != p.device:
                        raise RuntimeError(
                            f"Lamb16: parameter {name} is on {p.device}, but its gradient on {grads[id(p)].device}; "
                            "set the gradient to None when you move a parameter"
                        )
                    rounding = "nearest" if p.dtype == torch.float32 else group["param_rounding"]
                    float8 = group["moment_dtype"] == "float8"
                    kind = Kind(p.device, p.dtype, grads[id(p)].dtype, float8, group["caution"], rounding)
                    members.setdefault(kind, []).append((p, group))
        executor = self._executor([p for pairs in members.values() for p, _ in pairs])

        def prepare() -> None:
            for kind, pairs in members.items():
                params, clips = [p for p, _ in pairs], self.max_grad_norm is not None
                for graph in graphs_of(kind, params, clips) if type(executor) is not Eager else ():
                    executor.prepare(graph, kind)

        unknown = self._unknown(members)
        self._ready_states(grads, unknown, new, inference, prepare)
        unknown.update(map(id, new.made))
        for device in {kind.device for kind in members} - set(self._skipped):
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return [self._make_plan(kind, pairs, executor, unknown) for kind, pairs in members.items()]

    def _unknown(self, members: dict[Kind, list[tuple[Tensor, dict[str, Any]]]]) -> set[int]:
        """The parameters, by id, with states that no store holds, or that were made for a parameter of another kind."""
        unknown: set[int] = set()
        for kind, pairs in members.items():
            there = [(p, state) for p, _ in pairs if (state := self.state.get(p))]
            store = self._stores.setdefault(kind.device, Store(kind.device))
            unknown.update(id(there[k][0]) for k in store.changed([state for _, state in there]))
            params, own = [p for p, _ in there], [state for _, state in there]
            group = pairs[0][1]  # the others have its moment_dtype and, where it matters, its param_rounding
            if not _are_ready(params, own, group):
                unknown.update(id(p) for p, state in there if not _are_ready([p], [state], group))
        return unknown

    def _ready_states(
        self,
        grads: dict[int, Tensor],
        changed: set[int],
        new: New,
        inference: bool,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Check those states of parameters with gradients that have changed, by the parameters' ids, and repair them.

        Missing ones are created. Nothing is changed before all has been checked and ``prepare`` called.
        """
        missing: list[tuple[Tensor, dict[str, Any], int]] = []
        live: list[tuple[Tensor, dict[str, Any]]] = []
        written: list[Tensor] = []
        called: list[tuple[dict[str, Any], int, tuple[str, ...]]] = []
        for group in self.param_groups:
            there = [(i, p, self.state.get(p)) for i, p in enumerate(group["params"]) if id(p) in grads]
            pairs = [(p, state) for _, p, state in there if state and id(p) in changed]
            ready = _are_ready([p for p, _ in pairs], [state for _, state in pairs], group)
            for i, p, state in there:
                keys = (*MOMENTS, REMAINDER) if is_exact(p, group) else MOMENTS
                called.append((group, i, keys if state else ()))
                written.append(p if type(p) in PLAIN else local(p))
                if not state:
                    missing.append((p, group, self._salt(group, i)))
                    continue
                if id(p) in changed:
                    state = state if ready else self._checked_live_state(p, group, i)
                    live.append((p, state))
                written += [x if type(x) is Tensor else local(x) for x in map(state.get, keys)]

        def names() -> list[str]:
            owners = [(f"parameter {self._name(group, i)}", keys) for group, i, keys in called]
            return [name for owner, keys in owners for name in (owner, *(f"{key} of {owner}" for key in keys))]

        check_memory(written, names, inference)
        prepare()
        self._repair(live, new)
        made = {
            p: init_state(p, salt, group["moment_dtype"] == "float8", exact=is_exact(p, group))
            for p, group, salt in missing
        }
        new.made.extend(made)
        for p, state in made.items():
            self.state[p].update(state)

    def _executor(self, params: list[Tensor]) -> Executor:
        """The one that was asked for; eager where there is no memory for generated code to work on."""
        if isinstance(self._compile, bool):
            return Compiled() if self._compile and not any(p.is_meta or is_fake(p) for p in params) else Eager()
        return self._compile

    def _make_plan(
        self, kind: Kind, pairs: list[tuple[Tensor, dict[str, Any]]], executor: Executor, changed: set[int]
    ) -> Plan:
        slices: list[tuple[dict[str, Any], int, int]] = []
        for i, (_, group) in enumerate(pairs):
            if not slices or slices[-1][0] is not group:
                slices.append((group, i, i))
            slices[-1] = (group, slices[-1][1], i + 1)
        params = [p for p, _ in pairs]
        store = self._stores.setdefault(kind.device, Store(kind.device))
        read = [self.state[p] for p in params if id(p) in changed]
        homes = store.adopt([self.state[p] for p in params], read, self.state.values())
        return Plan(kind, params, homes, store, slices, executor)

    def _checked_live_state(self, p: Tensor, group: dict[str, Any], i: int) -> dict[str, Any]:
        """What a state is to hold: codes that another loader left as uint8, or elsewhere, are repaired in a copy.

        Raises ValueError for a state that does not fit its parameter.
        """
        state: dict[str, Any] = renamed(self.state[p])
        if _are_ready([p], [state], group):
            return state
        state, name, exact = dict(state), self._name(group, i), is_exact(p, group)
        if not exact:
            state.pop(REMAINDER, None)
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
                    "Lamb16.load_state_dict, cut and extend parameters with optimizer.resize(p, index, new_p)"
                )
        float8 = group["moment_dtype"] == "float8"
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
                    f"{tuple(codes.shape)}; change a parameter's rows with optimizer.resize(p, index, new_p), or "
                    "delete optimizer.state[parameter]"
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
        if exact:
            state[REMAINDER] = fitted(p, state, name)
        return state

    def _repair(self, live: list[tuple[Tensor, dict[str, Any]]], new: New) -> None:
        """Give states the entries that they are to hold, and what is derived from them where they have changed."""
        changed: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for p, repaired in live:
            state = self.state[p]
            if state.keys() - repaired.keys():  # old names
                state = self.state[p] = repaired
            if state is not repaired:
                state.update(repaired)
            if not (is_sharded(p) and self._stores[p.device].holds([state])):
                changed.setdefault(p.device, []).append((p, state))  # its codes may be others than the maxima are of
        for device, pairs in changed.items():
            find_largest(*(state for _, state in pairs), store=self._stores.get(device))
            new.completed.extend(p for p, state in pairs if complete(p, state))

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
        the host. For a skipped tensor the ratio is the one that was not used. Empty until the first step, and from
        :meth:`offload`, :meth:`resize` or :meth:`load_state_dict` to the next one.
        """
        names = {id(p): name for name, (p, _, _) in self._named().items() if p.numel()}
        stats = {}
        for plan in self._last:
            for row, key in zip(plan.reports, plan.ids, strict=True):
                if key in names:
                    stats[names[key]] = dict(zip(("weight_norm", "update_norm", "trust_ratio"), row, strict=True))
        return stats

    def _named(self) -> dict[str, tuple[Tensor, dict[str, Any], int]]:
        """All parameters with their groups and places in these, by name; one that is there has its group before it."""
        named: dict[str, tuple[Tensor, dict[str, Any], int]] = {}
        for k, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                name = self._name(group, i)
                named[f"{k}.{name}" if name in named else name] = (p, group, i)
        return named

    @torch.no_grad()
    def float32_weights(self) -> dict[str, Tensor]:
        """The weights of all parameters in float32, by name (or position): copies, on the parameters' devices.

        Those that are kept exactly (``param_rounding="exact"``) with their remainders, unless somebody else has changed
        the weights since the last step. A collective for such weights that are DTensors.
        """
        return float32_weights({name: (p, self.state.get(p, {})) for name, (p, _, _) in self._named().items()})

    @torch.no_grad()
    def load_float32_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights to what :meth:`float32_weights` returned, and the remainders of those that are kept exactly.

        After :meth:`load_state_dict` a run goes on with the bits that it had. bfloat16 weights that are not kept
        exactly, and float16 ones, are rounded to nearest. All ranks must call this with the same, or with DTensors.

        Raises:
            ValueError: names, shapes or dtypes do not fit, on this rank or another; nothing is changed then.
        """
        named, error = self._named(), None
        try:
            check_reloaded(self.offloaded, "load_float32_weights")
            check_float32_weights(weights, {name: p for name, (p, _, _) in named.items()})
        except (ValueError, RuntimeError) as found:
            error = found
        agree(error, [p for p, _, _ in named.values()], "load_float32_weights")
        missing = {name: x for name, x in named.items() if is_exact(x[0], x[1]) and not self.state.get(x[0])}
        for name, (p, group, i) in missing.items():
            self.state[p] = init_state(p, self._salt(group, i), group["moment_dtype"] == "float8", exact=True)
            self.state[p]["weight_sum"] = weight_sum(like_param(p, weights[name]).to(p.device))
        _add_up({p: self.state[p] for p, _, _ in missing.values()})
        for p, group, _ in named.values():
            if is_exact(p, group) and not has_remainder(p, self.state[p]):
                self.state[p][REMAINDER] = no_remainder(p)
        load_weights({name: (p, self.state.get(p, {})) for name, (p, _, _) in named.items()}, weights)

    # -- state that leaves the device --------------------------------------------------------------------------------

    def offload(self, device: torch.device | str = "cpu") -> None:
        """Move the state to another device, and keep nothing on the parameters': for phases without steps.

        All tensors in the states of parameters go, also those that others added; DTensors keep their placements, with
        this rank's part elsewhere (no collective: each rank for itself). :attr:`grad_norm` goes with them, plans and
        work buffers are dropped. From CUDA to the CPU through pinned memory, which torch keeps for the next time; this
        waits for the copies. Weights, gradients and hyperparameters that are tensors are not the optimizer's to move.

        ``step`` and ``resize`` then raise a RuntimeError until :meth:`reload`. State dicts, checkpoints, ``deepcopy``
        and pickle take the state where it is, and copies of the optimizer are offloaded too; ``add_param_group`` works.
        Loading (:meth:`load_state_dict`, :func:`lamb16.checkpoint.load`) brings all of the state to the parameters'
        devices. Repeated calls are harmless; without a state there is nothing to reload.

        Args:
            device: where to. With the parameters' own, states stay where they are and all else is as for others.

        Raises:
            ValueError: there is no such device, or it is the meta device; nothing is changed then.
        """
        target = checked_device(device)
        with torch.inference_mode(False), torch.no_grad():
            norm, *counts = (
                None if x is None or x.is_meta else x.to(target, copy=True)
                for x in (self._grad_norm, *self._skipped.values())
            )
            skipped = [x for x in counts if x is not None]
            total = {target: torch.stack(skipped).sum()} if skipped else {}
        move(self.state, lambda _: target, detach=True)
        self._forget()
        self._grad_norm, self._skipped, self._offloaded = norm, total, target

    def reload(self) -> None:
        """Move the state to the devices that its parameters are on by now: steps go on as if it had never been away.

        Waits for nothing: what uses the current stream comes after the copies. Repeated calls are harmless.

        Raises:
            RuntimeError: a parameter is on the meta device. Nothing is changed then, nor where memory runs out.
        """
        named = ((self._name(group, i), p) for group in self.param_groups for i, p in enumerate(group["params"]))
        check_homes(self.state, named)
        move(self.state, lambda p: p.device)
        self._offloaded = None

    @property
    def offloaded(self) -> torch.device | None:
        """The device that :meth:`offload` has moved the state to; None where it is on the parameters' own."""
        away = self._offloaded
        return away if away and any(state for p, state in self.state.items() if isinstance(p, Tensor)) else None

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as torch's optimizers give it, with the fp8 codes as uint8 views.

        Always uint8: collectives, pickle and checkpoint code fail on fp8 tensors or cast them silently.
        """
        state_dict = super().state_dict()
        state_dict["state"] = {key: _map_codes(state, _as_bytes) for key, state in state_dict["state"].items()}
        return state_dict

    def float32_state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim.AdamW`` loads it: ``step``, and ``exp_avg`` and ``exp_avg_sq`` in float32.

        The groups have AdamW's hyperparameters; those that only Lamb16 has are left out.
        """
        params = (p for group in self.param_groups for p in group["params"])
        return to_adamw(self.state_dict(), dict(enumerate(params)))

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True
    ) -> Loaded:
        """Load what :meth:`state_dict` gave; codes as uint8 or fp8, kept bit for bit, as are the float32 scales.

        Where both sides have names, states are matched by name, whatever the order of parameters and groups; else by
        position. Groups give their hyperparameters to the group with the same members; what a group lacks stays as it
        is here. With ``strict=False`` what fits by name and shape is loaded, and the rest is returned and kept.

        The states of other optimizers with Adam's two moments are quantized: torch's Adam and AdamW, LAMB in FP32, and
        8-bit states of torchao and bitsandbytes (:mod:`lamb16.convert`). Of their groups ``lr``, ``betas``, ``eps``,
        ``weight_decay`` and ``maximize`` are taken, where they are valid here.

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
            check_state_dict(state_dict)
            names = [[self._name(group, i) for i in range(len(group["params"]))] for group in self.param_groups]
            named = all("param_names" in group for group in self.param_groups)
            found = match(state_dict["param_groups"], names, named, strict)
            check_owners(state_dict)
            states = {key: renamed(unwrapped(state)) for key, state in state_dict["state"].items()}
            groups = self._checked_groups(state_dict["param_groups"], states, found.sources)
            foreign = self._checked_states(state_dict["param_groups"], states, groups, names, found, strict)
        except Exception as caught:
            error = caught
        agree(error, [p for group in self.param_groups for p in group["params"]])
        share(list(foreign.values()))
        warn_of_other_moments(groups, self.param_groups)
        offloaded = self._offloaded
        self.__setstate__({"state": self._read_state(states, foreign, groups, names, found), "param_groups": groups})
        if offloaded is not None:
            move(self.state, lambda p: p.device)  # what is kept
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
        return found.loaded

    def _checked_groups(
        self, saved: list[dict[str, Any]], states: dict[Any, Any], sources: list[int | None]
    ) -> list[dict[str, Any]]:
        """This optimizer's groups with the hyperparameters of the saved ones that they have for a source."""
        ours = any(isinstance(state, dict) and set(MOMENTS) & set(state) for state in states.values())
        groups = []
        for old, k in zip(self.param_groups, sources, strict=True):
            new: dict[str, Any] = {} if k is None else saved[k]
            if k is not None and not ours and not set(OWN) & set(new):
                new = own_group(new, f"group {k}")
            kept = old if k is None else {name: old[name] for name in NAMES}
            check_hyperparameters(kept | new, f".load_state_dict (group {k})", running=True)
            group = {
                key: deepcopy(value) for key, value in (kept | new).items() if key not in ("params", "param_names")
            }
            group["params"] = old["params"]
            for names in (saved[k] if k is not None else old, old):
                if "param_names" in names:
                    group["param_names"] = list(names["param_names"])
            groups.append(group)
        return groups

    def _checked_states(
        self,
        saved: list[dict[str, Any]],
        states: dict[Any, Any],
        groups: list[dict[str, Any]],
        names: list[list[str]],
        found: Match,
        strict: bool,
    ) -> dict[Any, Foreign]:
        """Refuse what cannot be loaded; returns those states that another optimizer made.

        With ``strict=False`` those of another shape are taken out of ``found``.
        """
        foreign = {}
        saved_group = {key: group for group in saved for key in group["params"]}
        for key, state in states.items():
            if key not in found.owners:
                continue
            k, i = found.owners[key]
            p, name = groups[k]["params"][i], names[k][i]
            other = keys_of(state)
            first = state.get((other or MOMENTS)[0]) if isinstance(state, dict) else None
            if not strict and isinstance(first, Tensor) and first.shape != p.shape:
                found.loaded.mismatched_keys.append(name)
                del found.owners[key]
            elif other:
                foreign[key] = check_foreign(state, saved_group[key], p, name)
            else:
                check_state(state, p, name, groups[k]["moment_dtype"])
        return foreign

    def _read_state(
        self,
        states: dict[Any, Any],
        foreign: dict[Any, Foreign],
        groups: list[dict[str, Any]],
        names: list[list[str]],
        found: Match,
    ) -> dict[Any, Any]:
        """The saved states keyed by this optimizer's parameters, copied to their devices and spread as they are."""
        owners = {key: (groups[k]["params"][i], groups[k]) for key, (k, i) in found.owners.items()}
        left_out = {*found.loaded.missing_keys, *found.loaded.mismatched_keys}
        state = {
            p: self.state[p]
            for group, own in zip(groups, names, strict=True)
            for p, name in zip(group["params"], own, strict=True)
            if name in left_out and self._fits(p, group)
        }
        known = [key for key in states if key in owners]
        loaded: dict[Any, dict[str, Any]] = {}
        for key in known:
            p, group = owners[key]
            float8, value = group["moment_dtype"] == "float8", states[key]
            if key in foreign:
                k, i = found.owners[key]
                value = as_lamb16(foreign[key], self._salt(self.param_groups[k], i), float8)
            exact = is_exact(p, group)
            loaded[key] = init_state(p, int(value["salt"]) & 0xFFFFFFFF, float8, self._memory_for(p, group), exact)
            if exact and REMAINDER in value:
                local(loaded[key][REMAINDER]).copy_(from_bytes(like_param(p, as_bytes(value[REMAINDER]))))
            for entry in CODES:
                part, target = like_param(p, _as_bytes(entry, value[entry])), local(loaded[key][entry])
                target.view(-1).view(_bits(target)).copy_(part.reshape(-1).view(_bits(part)))
            for entry in set(SCALARS) & set(value) - {"salt"}:
                scalar = loaded[key][entry]
                scalar.fill_(float(value[entry]) if scalar.is_floating_point() else int(value[entry]))
            find_largest(loaded[key])
        _add_up({owners[key][0]: loaded[key] for key in known if "weight_sum" not in states[key]})
        for key, value in states.items():
            if key in owners:
                p = owners[key][0]
                state[p] = loaded[key] | foreign_entries(value, p.device)
            elif key not in found.keys:  # of no parameter
                state[key] = value
        return state

    def _fits(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether the parameter has a state with the moments' dtypes of the group."""
        dtypes = [x.dtype for x in map(self.state.get(p, {}).get, MOMENTS) if isinstance(x, Tensor)]
        return dtypes == list(MOMENT_DTYPES[group["moment_dtype"]])

    def _memory_for(self, p: Tensor, group: dict[str, Any]) -> list[Tensor] | None:
        """The moments that are there, if a state of this parameter can be copied into them.

        Not if others hold their memory: a state dict that someone kept, or other tensors in one buffer.
        """
        moments = [self.state.get(p, {}).get(name) for name in MOMENTS]
        for x, dtype in zip(moments, MOMENT_DTYPES[group["moment_dtype"]], strict=True):
            if not isinstance(x, Tensor) or x.is_inference():
                return None
            mine, own = local(x), local(p)
            if (x.shape, mine.shape, mine.dtype, mine.device) != (p.shape, own.shape, dtype, own.device):
                return None
            if not mine.is_contiguous() or placement(x) != placement(p) or not _is_held_alone(mine):
                return None
        return moments

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: fp8 codes as uint8, since torch cannot unpickle fp8 tensors."""
        pickled: dict[str, Any] = super().__getstate__()
        pickled["state"] = {p: _map_codes(state, _as_bytes) for p, state in self.state.items()}
        skipped = {device: count.clone() for device, count in self._skipped.items()}
        own = ("max_grad_norm", "_compile", "_seed", "_number", "_amp_scaling", "_offloaded")
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
        self._skipped, self._offloaded = skipped, state.get("_offloaded")


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
    added = {key: value for key, value in state.items() if key not in (*ENTRIES, REMAINDER)}
    return {
        key: value.detach().to(device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
        for key, value in added.items()
    }


def _are_plain(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether all are plain strided tensors, and the gradients of the parameters' dtypes and shapes."""
    return (
        set(map(type, params)) <= PLAIN
        and set(map(type, grads)) <= {Tensor}
        and set(map(LAYOUT, grads)) <= {torch.strided}
        and list(map(DTYPE, grads)) == list(map(DTYPE, params))
        and list(map(Tensor.size, grads)) == list(map(Tensor.size, params))
    )


def _is_held_alone(x: Tensor) -> bool:
    """Whether nothing but a tensor, of which this is a detached view, holds its memory."""
    return int(torch._C._storage_Use_Count(x.untyped_storage()._cdata)) <= 3  # these two, and the storage object


def _are_ready(params: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]) -> bool:
    """Whether these states have all entries and nothing of them is to be repaired; False for DTensors.

    The parameters are of this group, or of others with its ``moment_dtype`` and ``param_rounding``.
    """
    try:
        entries = list(chain.from_iterable(map(ALL_ENTRIES, states)))
    except KeyError:
        return False
    if not set(map(type, entries)) <= {Tensor} or any(map(is_sharded, set(map(type, params)) - PLAIN and params)):
        return False
    shapes, devices = list(map(SHAPE, params)), list(map(DEVICE, params))
    for k, dtype in enumerate(MOMENT_DTYPES[group["moment_dtype"]]):
        moments = entries[k::WIDTH]
        if set(map(DTYPE, moments)) - {dtype} or list(map(SHAPE, moments)) != shapes:
            return False
        if list(map(DEVICE, moments)) != devices or not all(map(Tensor.is_contiguous, moments)):
            return False
        if any(map(Tensor.is_inference, moments)):
            return False
    for p, state in zip(params, states, strict=True):
        if not has_remainder(p, state) if is_exact(p, group) else REMAINDER in state:
            return False
    return all(set(map(Tensor.numel, entries[k::WIDTH])) <= {1} for k in range(len(MOMENTS), WIDTH))


def _map_codes(state: Any, convert: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy of one parameter's state with its codes and remainders converted."""
    if not isinstance(state, dict):
        return state
    return {key: convert(key, value) if key in (*CODES, REMAINDER) else value for key, value in state.items()}


def _as_bytes(key: str, codes: Tensor) -> Tensor:
    if key == REMAINDER:
        return as_bytes(codes)
    return like(codes, local(codes).view(torch.uint8)) if codes.dtype == CODES[key] else codes


def _as_fp8(key: str, codes: Tensor) -> Tensor:
    if key == REMAINDER:
        found: Tensor = from_bytes(codes)
        return found
    return like(codes, local(codes).view(CODES[key])) if codes.dtype == torch.uint8 else codes


def _bits(tensor: Tensor) -> torch.dtype:
    return torch.uint8 if tensor.element_size() == 1 else tensor.dtype


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on ``device``; fp8 moves as bytes."""
    dtype = tensor.dtype
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.to(device).contiguous().view(dtype)
