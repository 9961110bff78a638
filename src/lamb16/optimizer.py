"""class Lamb16: parameter groups, state, checkpoints. Decides nothing numerical: ``update.py`` does."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .checks import (
    RULES,
    check_gradient,
    check_groups,
    check_hyperparameters,
    check_owners,
    check_parameter,
    check_state,
    check_state_dict,
)
from .compiled import Kind
from .plan import Plan, Store, compile_graphs, init_state
from .sharding import Reduction, agree, check_layout, is_sharded, like, like_param, local, local_gradient, sharded_types
from .update import TRUST_RATIO, UPDATE_NORM, WEIGHT_NORM

CODES = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float8_e5m2}
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
        u = m / max(sqrt(v) + eps, |m| / C) + weight_decay · p
        r = min((‖p‖ / ‖u‖ · trust_lr / lr) ^ trust_scale, trust_clip)
        p = p − lr · r · u

    where m and v are divided by 1 − β^t first (``bias_correction``), ‖p‖ = sqrt(Σ clamp(p², 0.01, 1)),
    ‖u‖ = sqrt(Σ clamp(u², eps, 1)), and C = (1−β1) / sqrt((1−β2)(1−β1²/β2)) is a bound that |m|/sqrt(v) never
    exceeds in exact arithmetic. m and v are then stored in 8 bits each, scaled by a power of two per tensor and
    rounded stochastically with words from a golden-ratio sequence; no random generator is used. The rule, its
    derivation and measurements are in docs/algorithm.md; LAMB is You et al., 2020 (arXiv:1904.00962).

    Args:
        params: parameters, named parameters (``model.named_parameters()``) or group dicts; float32, bfloat16 or
            float16, any shape. Names make the rounding independent of the parameters' order.
        lr: learning rate, a float >= 0 or a one-element tensor; changing it never recompiles.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to sqrt(v), and the lower clamp of squared updates in their norm; in [2^-100, 1].
        weight_decay: decoupled weight decay, inside the trust ratio as in LAMB.
        trust_scale: exponent of the trust ratio; 0 switches the ratio off, 1 is proportional.
        trust_lr: learning rate at which the trust ratio is not changed.
        trust_clip: upper bound of the trust ratio.
        bias_correction: divide m by 1 − β1^t and v by 1 − β2^t in the update. LAMB's paper leaves it out, since its
            trust ratio normalises the update; the damped ratio here does not, and without the correction the first
            updates are several times larger. What that is worth depends on the task (docs/algorithm.md).
        maximize: ascend instead of descend.
        moment_dtype: ``"float8"``, or ``"float32"`` to keep a group's moments in FP32 under the same rule.
        compile: run the step through ``torch.compile`` (default); ``False`` runs the same functions eagerly.
        seed: enters the rounding words, with each parameter's name or position.

    State of a parameter, plain tensors: ``exp_avg`` (float8_e4m3fn) and ``exp_avg_sq`` (float8_e5m2) of the
    parameter's shape, contiguous; ``exp_avg_norm``, ``exp_avg_sq_norm`` (float32), ``step``, ``salt`` (int32), 0-d. The
    moments are the codes times their norms. ``state_dict()`` hands the codes out as uint8 views.

    A tensor whose gradient holds an inf or a NaN, or is so large (about 1e19) that v overflows, is left untouched for
    that step and counted in :attr:`skipped`.

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
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        trust_scale: float = 0.382,
        trust_lr: float = 1e-3,
        trust_clip: float = 2.0,
        bias_correction: bool = True,
        maximize: bool = False,
        moment_dtype: str = "float8",
        compile: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_scale": trust_scale,
            "trust_lr": trust_lr,
            "trust_clip": trust_clip,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
        }
        check_hyperparameters(defaults)
        if not isinstance(compile, bool):
            raise ValueError(f"Lamb16: compile={compile!r} is invalid; it must be True or False")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"Lamb16: seed={seed!r} is invalid; it must be an integer")
        self._compile, self._seed = compile, seed
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop everything that is derived from parameters and state."""
        self._stores: dict[Kind, Store] = {}
        self._plans: OrderedDict[Any, Cached] = OrderedDict()
        self._last: list[Plan] = []
        self._skipped: dict[torch.device, Tensor] = {}

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; ``closure``, if given, reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans, reductions, grads = self._current_plans()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        try:
            for plan in plans:
                device = plan.kind.device
                if device not in self._skipped:
                    self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
                plan.measure([grads[p] for p in plan.params], grad_scale)
            for reduction in reductions:
                reduction.run()
            for plan in plans:
                plan.apply(self._skipped[plan.kind.device], found_inf)
        finally:
            for plan in plans:
                plan.let_go()
        self._last = plans
        return loss

    def _current_plans(self) -> tuple[list[Plan], list[Reduction], dict[Tensor, Tensor]]:
        """The plans for the parameters that have gradients, from the cache or new, and these gradients' local parts."""
        grads: dict[Tensor, Tensor] = {}
        key: list[Any] = []
        sharded = sharded_types()
        for group in self.param_groups:
            key += (id(group), group["moment_dtype"])
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    grad = p.grad
                    if grad.layout != torch.strided or grad.dtype != p.dtype:
                        check_gradient(grad, self._name(group, i))
                    if isinstance(p, sharded) or isinstance(grad, sharded):
                        grads[p] = local_gradient(p, grad, self._name(group, i))
                    else:
                        grads[p] = grad.detach()
                    key += (id(p), grad.dtype)
        frozen = tuple(key)
        cached = self._plans.get(frozen)
        if cached is None or not all(plan.fits(self.state) for plan in cached.plans):
            if cached is not None or self._holds_dropped_states():  # all is read in again
                self._plans.clear()
                self._stores.clear()
            plans = self._make_plans(grads)
            cached = self._plans[frozen] = Cached(plans, Reduction.of(plans))
            if len(self._plans) > CACHED_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(frozen)
        for plan in cached.plans:
            plan.check_changed_groups()
        return cached.plans, cached.reductions, grads

    def _make_plans(self, grads: dict[Tensor, Tensor]) -> list[Plan]:
        """One plan for each kind of tensor; states that are missing are created once everything has been checked."""
        members: dict[Kind, list[tuple[Tensor, dict[str, Any]]]] = {}
        missing: list[tuple[Tensor, dict[str, Any], int]] = []
        for group in self.param_groups:
            check_hyperparameters(group, running=True)
            for i, p in enumerate(group["params"]):
                if p in grads:
                    check_parameter(p, self._name(group, i))
                    check_layout(p, self._name(group, i))
                    if self.state.get(p):
                        self._check_live_state(p, group, i)
                    else:
                        missing.append((p, group, i))
                    kind = Kind(p.device, p.dtype, grads[p].dtype, group["moment_dtype"] == "float8")
                    members.setdefault(kind, []).append((p, group))
        if self._compile:
            for kind, pairs in members.items():
                compile_graphs(kind, [p for p, _ in pairs])
        for p, group, i in missing:
            self.state[p].update(
                init_state(p, tensor_salt(self._seed, self._name(group, i)), group["moment_dtype"] == "float8")
            )
        return [self._make_plan(kind, pairs) for kind, pairs in members.items()]

    def _holds_dropped_states(self) -> bool:
        """Whether a store still holds a state that was taken from ``self.state``, or emptied."""
        live = {id(state) for state in self.state.values() if state}
        return any(id(entry) not in live for store in self._stores.values() for entry in store.entries)

    def _make_plan(self, kind: Kind, pairs: list[tuple[Tensor, dict[str, Any]]]) -> Plan:
        slices: list[tuple[dict[str, Any], int, int]] = []
        for i, (_, group) in enumerate(pairs):
            if not slices or slices[-1][0] is not group:
                slices.append((group, i, i))
            slices[-1] = (group, slices[-1][1], i + 1)
        params = [p for p, _ in pairs]
        store = self._stores.setdefault(kind, Store(kind.device))
        return Plan(kind, params, [self.state[p] for p in params], store, slices, self._compile)

    def _check_live_state(self, p: Tensor, group: dict[str, Any], i: int) -> None:
        """Refuse a state that does not fit its parameter; repair codes that another loader left as uint8."""
        name, float8, state = self._name(group, i), group["moment_dtype"] == "float8", self.state[p]
        missing = {*CODES, *Store.NAMES} - set(state)
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
            state[key] = codes

    # -- what can be read ----------------------------------------------------------------------------------------

    @property
    def skipped(self) -> int:
        """How many tensor updates were left out because of a non-finite gradient; reading waits for the device.

        Counted since this object was made: deepcopy and pickle keep the count, ``state_dict`` does not hold it.
        """
        return sum(int(count) for count in self._skipped.values())

    def layer_stats(self) -> dict[str, dict[str, Tensor]]:
        """Weight norm, update norm and trust ratio of the last step, per parameter name (or position).

        Returns for every non-empty parameter that had a gradient a dict of ``weight_norm``, ``update_norm`` (clamped
        as in the rule) and ``trust_ratio``: 0-d float64 tensors on the parameter's
        device. Nothing is copied to the host. For a skipped tensor the update norm and ratio are those that were not
        used.
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
                    stats[names[p]] = {
                        "weight_norm": row[WEIGHT_NORM],
                        "update_norm": row[UPDATE_NORM],
                        "trust_ratio": row[TRUST_RATIO],
                    }
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
        """Load what :meth:`state_dict` gave; codes as uint8 or fp8, kept bit for bit, as are the float32 norms.

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
            missing = set(RULES) - set(new)
            if missing:
                raise ValueError(
                    f"Lamb16.load_state_dict: group {k} has no {sorted(missing)}: this is another optimizer's state"
                )
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
        state = {}
        for key, value in state_dict["state"].items():
            if key not in known:
                state[key] = value
                continue
            p, group = known[key]
            loaded = init_state(p, int(value["salt"]) & 0xFFFFFFFF, group["moment_dtype"] == "float8")
            for name in CODES:
                part, target = like_param(p, _as_bytes(name, value[name])), local(loaded[name])
                target.view(-1).view(_bits(target)).copy_(part.reshape(-1).view(_bits(part)))
            for name in ("step", "exp_avg_norm", "exp_avg_sq_norm"):
                loaded[name].fill_(int(value[name]) if name == "step" else float(value[name]))
            state[p] = loaded
        return state

    def _name_in(self, groups: list[dict[str, Any]], group: dict[str, Any], i: int) -> str:
        index = next(k for k, g in enumerate(groups) if g is group)
        return self._name(self.param_groups[index], i)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: fp8 codes as uint8, since torch cannot unpickle fp8 tensors."""
        pickled: dict[str, Any] = super().__getstate__()
        pickled["state"] = {p: _map_codes(state, _as_bytes) for p, state in self.state.items()}
        skipped = {device: count.clone() for device, count in self._skipped.items()}
        return pickled | {"_compile": self._compile, "_seed": self._seed, "_skipped": skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.get("_skipped", self.__dict__.get("_skipped", {}))
        states = state["state"]
        new = {k: (_map_codes(v, _as_fp8) if isinstance(k, Tensor) else v) for k, v in states.items()}
        super().__setstate__(state | {"state": defaultdict(dict, new)})
        for group in self.param_groups:
            for name in RULES:
                group.setdefault(name, self.defaults[name])
        self._forget()
        self._skipped = skipped


def tensor_salt(seed: int, name: str) -> int:
    """A 32-bit salt from the seed and the parameter's name, the same on every machine."""
    digest = hashlib.blake2s(f"{seed}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


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
