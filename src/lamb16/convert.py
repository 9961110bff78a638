"""States of other optimizers with Adam's two moments into Lamb16's, and back.

Read are ``exp_avg`` and ``exp_avg_sq`` (torch's Adam and AdamW, LAMB of apex, timm and :mod:`lamb16.baselines`,
torchao's low-bit AdamW, whose tensors have ``dequantize``) and bitsandbytes' ``state1`` and ``state2`` (float32, or
codes for blocks with ``qmap1`` and ``absmax1``, ``qmap2`` and ``absmax2``). A state's step is in it or in its group.

Codes are rounded to nearest, so they depend on nothing but the values. A second moment above 0 never becomes 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks.foreign import check_betas, check_entries, check_extremes, check_moment, check_step
from .entries import SCALARS, chunks
from .hyper import check_hyperparameters
from .moments import BYTES, MOMENTS, are_codes
from .sharding.layout import is_sharded, like, local
from .step import fp8
from .step.factors import LAST_STEP, new_scale
from .step.fp8 import E4M3, E5M2, Format

ADAM, BITSANDBYTES = ("exp_avg", "exp_avg_sq"), ("state1", "state2")
# What else such a state may hold. What is neither here nor `added`, as amsgrad's maximum, is of a rule foreign to us.
OTHERS = {
    ADAM: {"step"},
    BITSANDBYTES: {"step", "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"},
}
OWN = ("trust_scale", "trust_lr", "moment_dtype")  # hyperparameters that no other optimizer has
SHARED = ("lr", "betas", "eps", "weight_decay", "maximize")  # hyperparameters that others have too
WRAPPED = "__bnb_optimizer_quant_state__"
KEPT = ("initial_lr",)  # schedulers'
ADDED = ("lookahead_slow_buff",)  # tensors that wrappers, here timm's, put into the state of any optimizer
BLOCKS = (256, 2048, 4096, 1024, 512, 128, 64)  # sizes that bitsandbytes has had, today's first


@dataclass
class Foreign:
    """A checked state of another optimizer: ``state`` has its moments, whole or sharded, as they were found.

    ``largest``: the largest magnitude of each, 0-d float32; of this rank's part until :func:`share`.
    """

    state: dict[str, Any]
    keys: tuple[str, str]
    step: int
    largest: list[Tensor]


def unwrapped(state: Any) -> Any:
    """A state in which nothing is nested, as bitsandbytes nests what is quantized."""
    if not isinstance(state, dict) or WRAPPED not in state:
        return state
    return {key: value for key, value in state.items() if key != WRAPPED} | state[WRAPPED]


def keys_of(state: Any) -> tuple[str, str] | None:
    """The names of another optimizer's two moments in this state."""
    if not isinstance(state, dict) or set(MOMENTS) & set(state):
        return None
    return next((keys for keys in (ADAM, BITSANDBYTES) if set(keys) <= set(state)), None)


def added(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of another optimizer's state that are certainly not that optimizer's: text, and :data:`ADDED`."""
    return {key: value for key, value in state.items() if key in ADDED or isinstance(value, str)}


def check_foreign(state: dict[str, Any], group: dict[str, Any], param: Tensor, name: str) -> Foreign:
    """What is needed to load another optimizer's state; ``group`` is the saved one.

    Raises:
        ValueError: it does not fit the parameter, or holds what cannot be a moment.
    """
    keys = keys_of(state)
    assert keys is not None
    check_entries(set(state) - set(keys) - OTHERS[keys] - set(added(state)), name)
    largest = []
    for key in keys:
        value = state[key]
        where = f"Lamb16.load_state_dict: {key} of parameter {name}"
        check_moment(value, param, where)
        try:
            whole = moment(state, key)
        except Exception as error:
            raise ValueError(f"{where} cannot be read ({error}); convert the state to float32 first") from error
        low, high = _extremes(local(whole))
        check_extremes(low, high, where, second=key == keys[1])
        largest.append(torch.tensor(max(-low, high), dtype=torch.float32, device=local(whole).device))
    step: Any = state.get("step", group.get("step"))
    check_step(step, name)
    return Foreign(state, keys, min(int(step), LAST_STEP), largest)  # which float32 rounds up to 2^31


def moment(state: dict[str, Any], key: str) -> Tensor:
    """A moment as a floating-point tensor, this rank's part of it where it is sharded."""
    value: Tensor = state[key].to_local() if is_sharded(state[key]) else state[key]
    if key in BITSANDBYTES and value.dtype == torch.uint8:
        return _from_blocks(value, state[f"qmap{key[-1]}"], state[f"absmax{key[-1]}"])
    if type(value).dequantize is not Tensor.dequantize:
        value = value.dequantize()
    if not value.is_floating_point() or value.element_size() < 2:
        raise ValueError(f"it is {value.dtype}")
    return value


def _from_blocks(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """float32 values of bitsandbytes' codes: what is at the code's place in ``qmap`` times its block's ``absmax``."""
    flat = codes.reshape(-1)
    size = next((size for size in BLOCKS if -(-len(flat) // size) == len(absmax)), None)
    if size is None:
        raise ValueError(f"{len(absmax)} absmax for {len(flat)} codes fit no size of blocks")
    scales = absmax.to(flat.device).repeat_interleave(size)[: len(flat)]
    return (qmap.to(flat.device)[flat.int()] * scales).view(codes.shape)


def _extremes(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest element, NaN if there is one; 0 and 0 of none."""
    if not x.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(x)  # a NaN is handed on
    return float(low), float(high)


def share(found: Sequence[Foreign]) -> None:
    """Make the largest magnitudes those of whole tensors; a collective for those that are DTensors."""
    meshes: dict[Any, list[tuple[Foreign, int]]] = {}
    for one in found:
        for k, key in enumerate(one.keys):
            if is_sharded(one.state[key]):
                meshes.setdefault(one.state[key].device_mesh, []).append((one, k))
    for mesh, members in meshes.items():
        largest = torch.stack([one.largest[k] for one, k in members])
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        for (one, k), value in zip(members, largest, strict=True):
            one.largest[k] = value


def as_lamb16(foreign: Foreign, salt: int, float8: bool) -> dict[str, Any]:
    """The state by Lamb16's names, without what is derived; codes as uint8, sharded as the moments were."""
    state: dict[str, Any] = {"step": foreign.step, "salt": fp8.wrapped(salt)}
    names = zip(MOMENTS, SCALARS[:2], foreign.keys, foreign.largest, (E4M3, E5M2), strict=True)
    for name, scale_name, key, largest, fmt in names:
        whole = moment(foreign.state, key)
        scale, inverse = new_scale(largest, fmt, float8)
        state[scale_name] = scale
        moments = _encoded(whole, inverse, fmt) if float8 else whole.float()
        state[name] = like(foreign.state[key], moments) if is_sharded(foreign.state[key]) else moments
    return state


def _encoded(x: Tensor, inverse: Tensor, fmt: Format) -> Tensor:
    """uint8 codes of x times ``inverse``, to nearest."""
    codes = torch.empty(x.shape, dtype=BYTES, device=x.device)
    to_nearest = torch.zeros((), dtype=torch.int32, device=x.device)
    for chunk, out in zip(chunks(x.reshape(-1)), chunks(codes.view(-1)), strict=True):
        chunk = chunk.float()
        code = fp8.encode((chunk * inverse).abs(), to_nearest, fmt)
        signed = code | (torch.signbit(chunk).int() << 7)
        out.copy_(signed if fmt is E4M3 else torch.where(chunk > 0, code.clamp(min=1), code))
    return codes


def own_group(saved: dict[str, Any], where: str) -> dict[str, Any]:
    """Of another optimizer's group what Lamb16 takes over: :data:`SHARED`, where it is valid here.

    Raises:
        ValueError: the group has no ``betas``, so the optimizer is not of Adam's kind.
    """
    check_betas(saved, where)
    shared = {key: saved[key] for key in KEPT if key in saved}
    for key in (key for key in SHARED if key in saved):
        try:
            check_hyperparameters({key: saved[key]}, f".load_state_dict ({where})")
            shared[key] = saved[key]
        except ValueError as error:
            warnings.warn(f"{error}; this optimizer's own is kept", stacklevel=4)
    return shared


def to_adamw(state_dict: dict[str, Any], params: dict[Any, Tensor]) -> dict[str, Any]:
    """Lamb16's state dict as one of ``torch.optim.AdamW``; ``params`` are the parameters by their keys in it."""
    warnings.warn(
        "Lamb16.float32_state_dict: lr, eps and weight_decay in the groups are Lamb16's; a third to a tenth of this lr "
        "serves AdamW: set its own after loading (docs/recipes.md)",
        stacklevel=3,
    )
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    names = ("params", "param_names", *SHARED, *KEPT)
    groups = [defaults | {key: group[key] for key in names if key in group} for group in state_dict["param_groups"]]
    state = {key: _as_adam(own, params[key]) for key, own in state_dict["state"].items() if key in params}
    return {"state": state, "param_groups": groups}


def _as_adam(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"step": torch.tensor(float(state["step"]), dtype=torch.float32)}
    for name, scale_name, key, fmt in zip(MOMENTS, SCALARS[:2], ADAM, (E4M3, E5M2), strict=True):
        own = local(state[name])
        values = fp8.decode(own, fmt) * state[scale_name].to(own.device) if are_codes(own) else own
        # In the parameter's memory format, which AdamW's fused step takes for granted.
        found[key] = like(param, torch.empty_like(local(param), dtype=torch.float32).copy_(values))
    return found
