"""What methods of the optimizer are handed, and calls at the wrong time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..sharding.layout import is_sharded
from .tensors import check_parameter


def check_options(compile: Any, seed: Any, amp_scaling: Any) -> None:
    """Raise ValueError for options of the constructor that are of the wrong kind."""
    if not isinstance(compile, bool) and not callable(getattr(compile, "run", None)):
        raise ValueError(f"Lamb16: compile={compile!r} is invalid; it must be True or False")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"Lamb16: seed={seed!r} is invalid; it must be an integer")
    if not isinstance(amp_scaling, bool):
        raise ValueError(f"Lamb16: amp_scaling={amp_scaling!r} is invalid; it must be True or False")


def check_scaler(grad_scale: Any, found_inf: Any) -> None:
    """Raise ValueError for what a gradient scaler does not hand over."""
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None and (not isinstance(value, Tensor) or value.numel() != 1 or value.is_meta):
            raise ValueError(f"Lamb16: {name}={value!r} is invalid; it must be None or a tensor of one element")


def check_group_options(group: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for a group with options of the constructor that are not the optimizer's ``own``."""
    for name, value in own.items():
        if group.get(name, value) != value:
            raise ValueError(f"Lamb16: {name} cannot be set in a parameter group; give it to Lamb16(...)")


def check_names(group: dict[str, Any], i: int) -> None:
    """Raise ValueError for a group with names of which there is none for its parameter ``i``."""
    names = group["param_names"]
    if i >= len(names):
        raise ValueError(
            f"Lamb16: a parameter group has {len(group['params'])} parameters and {len(names)} names; give "
            "group['param_names'] a name for each, or add the parameters with add_param_group"
        )


def check_reloaded(offloaded: torch.device | None, what: str) -> None:
    """Raise RuntimeError where the state is away."""
    if offloaded is not None:
        raise RuntimeError(
            f"Lamb16.{what}: the state is offloaded to {offloaded}; call optimizer.reload() first (nothing was changed)"
        )


def checked_device(device: torch.device | str) -> torch.device:
    """The device with its index; ValueError for one that is not there or cannot hold a state."""
    try:
        found = torch.empty(0, device=torch.device(device)).device
    except (TypeError, RuntimeError, AssertionError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"Lamb16.offload: device={device!r} cannot be used ({cause}); give 'cpu' or another device that there is"
        ) from error
    if found.type == "meta":
        raise ValueError(f"Lamb16.offload: device={device!r} holds no data, the state would be lost; give 'cpu'")
    return found


def check_not_meta(states: Mapping[Any, Any], named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError for a parameter on the meta device whose state has data, which would be lost there."""
    for name, p in named:
        if p.is_meta and any(isinstance(x, Tensor) and not x.is_meta for x in states.get(p, {}).values()):
            raise RuntimeError(
                f"Lamb16.reload: parameter {name} is on the meta device, where its state would be lost; move the model "
                "to the device that it is trained on first. Nothing was changed."
            )


def check_replaced(known: bool, new_known: bool) -> None:
    """Raise ValueError unless the parameter to be replaced is the optimizer's, and the new one is not."""
    if not known or new_known:
        fault = "new_p is in it already" if known else "p is not one of its parameters"
        raise ValueError(f"Lamb16.resize: {fault}; give a parameter of this optimizer and the one that takes its place")


def check_resize(p: Tensor, index: Tensor, new_p: Tensor, name: str) -> None:
    """Raise ValueError unless the rows of ``new_p`` can come from the rows ``index`` of ``p``."""
    where = f"Lamb16.resize of parameter {name}"
    check_parameter(new_p, name)
    if is_sharded(p) or is_sharded(new_p) or not p.dim():
        raise ValueError(f"{where}: only plain tensors with rows can be resized, not DTensors and 0-d tensors")
    if not new_p.is_leaf or (new_p.dtype, new_p.device, new_p.shape[1:]) != (p.dtype, p.device, p.shape[1:]):
        raise ValueError(
            f"{where}: new_p is {new_p.dtype} {tuple(new_p.shape)} on {new_p.device}, expected a leaf that is "
            f"{p.dtype} with rows of {tuple(p.shape[1:])} on {p.device}"
        )
    if index.dtype != torch.int64 or index.shape != new_p.shape[:1]:
        raise ValueError(
            f"{where}: index is {index.dtype} {tuple(index.shape)}, expected int64 ({new_p.shape[0]},), a row of p or "
            "-1 for each row of new_p"
        )
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < p.shape[0]:
        raise ValueError(
            f"{where}: index holds {int(index.min())} to {int(index.max())}, but p has the rows 0 to {p.shape[0] - 1}; "
            "-1 stands for a new row"
        )


def check_float32_weights(weights: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless there is a float32 tensor of the right shape for every parameter, and no other."""
    where = "Lamb16.load_float32_weights:"
    for names, fault in ((params.keys() - weights.keys(), "are no"), (weights.keys() - params.keys(), "are also")):
        if names:
            raise ValueError(
                f"{where} there {fault} weights for {', '.join(sorted(names))}; give what float32_weights returned"
            )
    for name, p in params.items():
        x = weights[name]
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.shape != p.shape:
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{where} the weights for {name} are {found}, expected torch.float32 {tuple(p.shape)}; give what "
                "float32_weights returned"
            )
        if is_sharded(x) and not is_sharded(p):
            raise ValueError(f"{where} the weights for {name} are a DTensor, the parameter not (.full_tensor())")
