"""Tensor subclasses: which of them are stepped, and the plain tensor that holds their elements.

Generated code reads and writes memory. It is to see plain strided tensors only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PLAIN = {Tensor, nn.Parameter}


def is_fake(tensor: Tensor) -> bool:
    """Whether this is, or wraps, a FakeTensor, which has no memory. Does not import what makes them."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    if module is None or type(tensor) in PLAIN:
        return False
    while is_traceable_wrapper_subclass(tensor):
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    return isinstance(tensor, module.FakeTensor)


def has_memory(tensor: Tensor) -> bool:
    """Whether a plain tensor's elements are somewhere; fake and meta tensors, and empty ones, need no place."""
    return not tensor.numel() or tensor.is_meta or is_fake(tensor) or tensor.data_ptr() != 0


def fake_mode() -> bool:
    """Whether a FakeTensorMode is active."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def plain(tensor: Tensor) -> Tensor:
    """The plain tensor with the elements of ``tensor``, detached, in the same memory; a FakeTensor stays one.

    Raises:
        TypeError: there is no such tensor; see :func:`fault`.
    """
    if type(tensor) in PLAIN:
        return tensor.detach()
    if hasattr(tensor, "wait"):  # AsyncCollectiveTensor: it is still being communicated
        return plain(tensor.wait())
    if is_fake(tensor) and not is_traceable_wrapper_subclass(tensor):
        return tensor.detach()
    wrong = fault(tensor)
    if wrong is not None:
        raise TypeError(f"Lamb16: a {wrong}")
    (inner,) = _wrapped(tensor).values() or (None,)
    return tensor.detach().as_subclass(Tensor) if inner is None else plain(inner)


def fault(tensor: Tensor) -> str | None:
    """What of a tensor cannot be stepped, as the words after "is a", with the remedy; None where it can be."""
    kind = type(tensor).__name__
    if hasattr(tensor, "device_mesh"):  # DTensor
        with torch.no_grad():
            return fault(tensor.to_local())  # type: ignore[attr-defined]
    if tensor.is_nested:
        return "nested tensor; optimize its parts, as parameters of their own"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return "tensor of torch.func (vmap, grad, functionalize); call step outside of the transform"
    if type(tensor) in PLAIN or hasattr(tensor, "wait"):
        return None
    if not is_traceable_wrapper_subclass(tensor):
        if is_fake(tensor) or type(tensor).__torch_dispatch__ == Tensor.__torch_dispatch__:
            return None
        return f"{kind}, which does not say what it wraps (it has no __tensor_flatten__); optimize a plain tensor"
    inner = _wrapped(tensor)
    if len(inner) != 1:
        return (
            f"{kind}, which wraps {len(inner)} tensors ({', '.join(inner)}); optimize a plain tensor, and make the "
            f"{kind} from it in forward"
        )
    ((name, only),) = inner.items()
    if (only.shape, only.dtype, only.layout, only.device) != (tensor.shape, tensor.dtype, tensor.layout, tensor.device):
        return (
            f"{kind} of {tensor.dtype} and shape {tuple(tensor.shape)}, which wraps a tensor of another kind ({name}: "
            f"{only.dtype}, {tuple(only.shape)}); optimize a plain tensor, and make the {kind} from it in forward"
        )
    if hasattr(only, "device_mesh"):
        return f"{kind} around a DTensor; make a DTensor around the {kind} instead (distribute_tensor)"
    return fault(only)


def _wrapped(tensor: Tensor) -> dict[str, Any]:
    """The tensors in a wrapper, by attribute; none in what is no wrapper.

    What detaching drops is left out: it is derived, as the scale that torchao computes ahead for its float8 weights.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return {}
    with torch.no_grad():
        tensor = tensor.detach()
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
