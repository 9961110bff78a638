"""What Lamb16 refuses: parameters and gradients by name, state dicts by their first fault."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from operator import add, attrgetter, itemgetter, le
from typing import Any

import torch
from torch import Tensor

from .entries import DERIVED, ENTRIES, MAXIMA, MOMENTS, SCALARS, chunks
from .hyper import MOMENT_DTYPES
from .remainder import check_remainder
from .sharding.layout import is_sharded, local
from .wrapped import PLAIN, fake_mode, fault, has_memory, is_fake

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_parameter(param: Tensor, name: str) -> None:
    """Raise TypeError or ValueError for a parameter that cannot be optimized."""
    wrong = fault(param)
    if wrong is not None:
        raise TypeError(f"Lamb16: parameter {name} is a {wrong}")
    if param.is_complex():
        raise TypeError(
            f"Lamb16: parameter {name} is complex ({param.dtype}), which has no fp8 moments; "
            "optimize torch.view_as_real(parameter) instead"
        )
    if param.layout != torch.strided:
        raise TypeError(f"Lamb16: parameter {name} is sparse ({param.layout}); only dense parameters are supported")
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"Lamb16: parameter {name} has dtype {param.dtype}; supported are float32, bfloat16 and float16 "
            "(convert it with .float())"
        )
    if getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"Lamb16: parameter {name} belongs to FullyShardedDataParallel, whose flat shards hide which layer an "
            "element is of; use torch.distributed.fsdp.fully_shard (FSDP2), or DistributedDataParallel for NO_SHARD"
        )
    if hasattr(param, "ds_id"):
        raise TypeError(
            f"Lamb16: parameter {name} is partitioned by DeepSpeed's ZeRO-3, which hides which layer an element is of; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def check_rounding(param: Tensor, group: dict[str, Any], name: str) -> None:
    """Raise ValueError for a parameter whose weights its group cannot keep exactly."""
    if group["param_rounding"] == "exact" and param.dtype == torch.float16:
        raise ValueError(
            f"Lamb16: parameter {name} is float16, and its group has param_rounding='exact', which is for bfloat16: "
            "float16's range is too small for a remainder to complete; use 'stochastic', or bfloat16 weights"
        )


def check_gradient(param: Tensor, grad: Tensor, name: str) -> None:
    """Raise RuntimeError for a gradient that cannot be used."""
    wrong = fault(grad)
    if wrong is not None:
        raise RuntimeError(f"Lamb16: the gradient of parameter {name} is a {wrong}")
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"Lamb16 does not support sparse gradients, and parameter {name} has one ({grad.layout}); "
            "build the embedding with sparse=False"
        )
    if grad.dtype not in PARAM_DTYPES:
        raise RuntimeError(
            f"Lamb16: the gradient of parameter {name} has dtype {grad.dtype}; expected float32, bfloat16 or float16"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"Lamb16: parameter {name} has shape {tuple(param.shape)}, but its gradient {tuple(grad.shape)}; set the "
            "gradient to None when you change a parameter's shape"
        )


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


def check_gradient_memory(grad: Tensor, name: str) -> None:
    """Raise RuntimeError for a gradient whose memory was freed."""
    if not has_memory(grad):
        raise RuntimeError(
            f"Lamb16: the gradient of parameter {name} has no memory (its storage was resized to 0 bytes); bring it "
            "back before step, or set it to None"
        )


def check_memory(tensors: Sequence[Tensor], names: Callable[[], Sequence[str]], inference: bool) -> None:
    """Raise ValueError unless every element of these plain tensors, which a step writes to, has memory of its own.

    ``names`` returns what they are called. Tensors without elements are nobody's. ``inference``: whether step is called
    in inference mode.
    """
    if _are_apart(tensors):
        return
    placed = []
    for x, what in zip(tensors, names(), strict=True):
        if not x.numel() or x.is_meta or is_fake(x):
            continue
        if not inference and x.is_inference():
            raise ValueError(
                f"Lamb16: {what} is an inference tensor, which cannot be written to here; call step under "
                "torch.inference_mode() too, or clone the tensor outside of it"
            )
        if x.is_neg():
            raise ValueError(f"Lamb16: {what} is a lazily negated view; give it memory of its own (.resolve_neg())")
        begin, whole = x.data_ptr(), x.is_contiguous()
        end = begin + x.nbytes
        if not whole:
            reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            end = begin + x.element_size() * (1 + reach)
        storage = x.untyped_storage()
        if not begin or end > storage.data_ptr() + storage.nbytes():
            raise ValueError(
                f"Lamb16: {what} has no memory (its storage was resized to {storage.nbytes()} bytes); bring it back "
                "before step"
            )
        if not whole and _overlaps_itself(x):
            raise ValueError(
                f"Lamb16: elements of {what} share memory (shape {tuple(x.shape)}, strides {x.stride()}: an expanded "
                "or overlapping view); optimize the tensor that it is a view of, or give it its own memory (.clone())"
            )
        placed.append((begin, end, x, what))
    placed.sort(key=itemgetter(0))
    for k, (_, end, x, what) in enumerate(placed):
        for n in range(k + 1, len(placed)):
            begin, _, y, other = placed[n]
            if begin >= end:
                break
            if x.device == y.device and _share_elements(x, y):
                raise ValueError(
                    f"Lamb16: {what} and {other} share memory; give each its own (.clone()), or optimize only one"
                )


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether they are beyond doubt plain contiguous tensors of which each has memory of its own."""
    if not set(map(type, tensors)) <= PLAIN or any(map(attrgetter("is_meta"), tensors)):
        return False
    if any(map(Tensor.is_inference, tensors)) or any(map(Tensor.is_neg, tensors)):
        return False
    begins, storages = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.untyped_storage, tensors))
    ends = list(map(add, begins, map(attrgetter("nbytes"), tensors)))
    reach = map(add, map(torch.UntypedStorage.data_ptr, storages), map(torch.UntypedStorage.nbytes, storages))
    places = sorted(zip(begins, ends, strict=True))
    return (
        all(begins)
        and all(map(Tensor.is_contiguous, tensors))
        and all(map(le, ends, reach))
        and all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    )


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements are in the same place."""
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride <= reach:  # not nested, as those of most tensors are
            return len(torch.unique(_places(x))) < x.numel()
        reach += stride * (n - 1)
    return False


def _share_elements(x: Tensor, y: Tensor) -> bool:
    """Whether the memory of two tensors, of which that of y begins within that of x, has bytes in common."""
    if x.is_contiguous() or x.element_size() != y.element_size():
        return True
    apart = y.data_ptr() - x.data_ptr()
    return bool(apart % x.element_size()) or bool(torch.isin(_places(y) + apart // x.element_size(), _places(x)).any())


def _places(x: Tensor) -> Tensor:
    """Where the elements are, counted from the first one, int64 [numel]."""
    places = torch.zeros((), dtype=torch.int64)
    for n, stride in zip(x.shape, x.stride(), strict=True):
        places = places[..., None] + torch.arange(n) * stride
    return places.view(-1)


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


def check_fake(param: Tensor, grad: Tensor, name: str) -> None:
    """Raise RuntimeError unless fake tensors are stepped under their mode, and no others there."""
    if not is_fake(param) == is_fake(grad) == fake_mode():
        raise RuntimeError(
            f"Lamb16: parameter {name}, its gradient and step must all be under FakeTensorMode, or none of them; make "
            "parameters and gradients, and call step, within the same FakeTensorMode"
        )


def check_state(state: dict[str, Any], param: Tensor, name: str, moment_dtype: str) -> None:
    """Raise ValueError unless ``state`` is a Lamb16 state for ``param`` with codes as uint8 or fp8.

    What version 0.1 did not have may be missing; entries that others added are theirs to check.
    """
    if not set(ENTRIES) - set(DERIVED) <= set(state):
        raise ValueError(
            f"Lamb16.load_state_dict: the state of parameter {name} has the entries {sorted(map(str, state))}, not "
            f"{sorted(ENTRIES)}: this is the state of another optimizer"
        )
    for key, dtype in zip(MOMENTS, MOMENT_DTYPES[moment_dtype], strict=True):
        value = state[key]
        allowed = (dtype,) if moment_dtype == "float32" else (dtype, torch.uint8)
        if not isinstance(value, Tensor) or value.dtype not in allowed:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is {found}, expected "
                f"{' or '.join(map(str, allowed))} for moment_dtype={moment_dtype!r}"
            )
        if is_sharded(value) and not is_sharded(param):
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is sharded (a DTensor), the parameter not; "
                "gather it first (get_optimizer_state_dict with StateDictOptions(full_state_dict=True))"
            )
        if value.dtype != torch.float32 and _has_nan(local(value), key):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} holds NaN codes: it is damaged")
        if value.shape != param.shape:
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} has shape {tuple(value.shape)}, but the parameter "
                f"has shape {tuple(param.shape)}: the checkpoint belongs to another model"
            )
    check_remainder(state, param, name, ".load_state_dict")
    for key in (key for key in SCALARS if key in state and key not in MAXIMA):
        value = state[key]
        if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.numel() != 1):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} is {value!r}, expected one number")
        if not math.isfinite(float(value)):
            raise ValueError(f"Lamb16.load_state_dict: {key} of parameter {name} is {float(value)!r}")
    for key in ("exp_avg_scale", "exp_avg_sq_scale"):
        _check_scale(float(state[key]), key, name)
    if not 0 <= int(state["step"]) < 2**31:
        raise ValueError(
            f"Lamb16.load_state_dict: step of parameter {name} is {int(state['step'])}, expected 0..2^31-1"
        )
    for key, most in (
        ("weight_sum", param.numel() << 20),
        ("update_sum", param.numel() << 20),
        ("mask_count", param.numel()),
        ("param_checksum", 2**32 - 1),
    ):
        if key in state and not 0 <= int(state[key]) <= most:
            raise ValueError(
                f"Lamb16.load_state_dict: {key} of parameter {name} is {int(state[key])}, expected 0..{most}: the "
                "checkpoint belongs to another model or is damaged"
            )


def warn_of_other_moments(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> None:
    """Warn of groups whose moments are kept in another way from here on than the optimizer was made for."""
    for k, (new, old) in enumerate(zip(saved, own, strict=True)):
        if new["moment_dtype"] != old["moment_dtype"]:
            warnings.warn(
                f"Lamb16.load_state_dict: group {k} has moment_dtype={new['moment_dtype']!r} in the state, and "
                f"{old['moment_dtype']!r} in the optimizer, which goes on with the state's",
                stacklevel=3,
            )


def _check_scale(value: float, key: str, name: str) -> None:
    if not (2.0**-126 <= value < math.inf and math.frexp(value)[0] == 0.5):
        raise ValueError(
            f"Lamb16.load_state_dict: {key} of parameter {name} is {value!r}, expected a positive power of two: the "
            "checkpoint was cast to a smaller dtype or is damaged. Keep 0-d entries out of such a cast (float16 loses "
            "them, bfloat16 does not)"
        )


def _has_nan(codes: Tensor, key: str) -> bool:
    """Whether fp8 codes of a first (e4m3fn) or second (e5m2) moment hold a NaN or an infinity."""
    largest = torch.zeros((), dtype=torch.uint8, device=codes.device)
    for chunk in chunks(codes.reshape(-1).view(torch.uint8)):
        if chunk.numel():
            largest = torch.maximum(largest, (chunk & 0x7F).max())
    return int(largest) > (0x7E if key == "exp_avg_codes" else 0x7B)


def check_state_dict(state_dict: Any) -> None:
    """Raise ValueError unless ``state_dict`` is made like an optimizer's."""
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get(key), kind):
            raise ValueError(f"Lamb16.load_state_dict: no optimizer state dict: it has no {kind.__name__} {key!r}")


def check_groups(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless both have the same groups of the same sizes."""
    if len(saved) != len(current):
        raise ValueError(
            f"Lamb16.load_state_dict: the state dict has {len(saved)} parameter groups, this optimizer {len(current)}"
        )
    for k, (a, b) in enumerate(zip(saved, current, strict=True)):
        if "params" not in a:
            raise ValueError(f"Lamb16.load_state_dict: group {k} of the state dict has no 'params'")
        if len(a["params"]) != len(b["params"]):
            raise ValueError(
                f"Lamb16.load_state_dict: group {k} of the state dict has {len(a['params'])} parameters, "
                f"the optimizer's has {len(b['params'])}"
            )


def check_unknown_states(state_dict: dict[str, Any]) -> None:
    """Raise ValueError for a state that belongs to no parameter."""
    named = {key for group in state_dict["param_groups"] for key in group["params"]}
    unknown = [key for key in state_dict["state"] if isinstance(key, int) and key not in named]
    if unknown:
        raise ValueError(f"Lamb16.load_state_dict: there is a state for {unknown[0]!r}, which no parameter group names")
