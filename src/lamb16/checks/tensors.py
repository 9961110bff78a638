"""Parameters and gradients that cannot be stepped, and memory that cannot be written to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from operator import add, attrgetter, itemgetter, le
from typing import Any

import torch
from torch import Tensor

from ..wrapped import PLAIN, fake_mode, fault, has_memory, is_fake

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
    if group.get("param_rounding") == "exact" and param.dtype == torch.float16:
        raise ValueError(
            f"Lamb16: parameter {name} is float16, and its group has param_rounding='exact', which is for bfloat16: "
            "float16's range is too small for a remainder to complete; use 'stochastic', or bfloat16 weights"
        )


def check_sizes(shapes: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if there is a shape of a tensor that compiled steps cannot count the elements of."""
    if shapes:
        raise ValueError(
            f"Lamb16: a parameter of shape {tuple(shapes[0])} has 2^31 elements or more; compiled steps on a GPU count "
            "with 32 bits: split it, or pass compile=False"
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


def check_gradient_device(param: Tensor, grad: Tensor, name: Callable[[], str]) -> None:
    """Raise RuntimeError for a gradient that is not where its parameter is."""
    if grad.device != param.device:
        raise RuntimeError(
            f"Lamb16: parameter {name()} is on {param.device}, but its gradient on "
            f"{grad.device}; set the gradient to None when you move a parameter"
        )


def check_fake(param: Tensor, grad: Tensor, name: str) -> None:
    """Raise RuntimeError unless fake tensors are stepped under their mode, and no others there."""
    if not is_fake(param) == is_fake(grad) == fake_mode():
        raise RuntimeError(
            f"Lamb16: parameter {name}, its gradient and step must all be under FakeTensorMode, or none of them; make "
            "parameters and gradients, and call step, within the same FakeTensorMode"
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
