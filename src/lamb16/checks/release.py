"""Gradient release: what it cannot be used with, and what goes wrong in an iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

DDP = (
    "lamb16.release_gradients: DistributedDataParallel averages gradients over the ranks after they would have been "
    "stepped; use torch.distributed.fsdp.fully_shard (FSDP2), whose gradients can be released"
)
CLIPPING = (
    "lamb16.release_gradients: max_grad_norm={} needs the norm of all gradients before the first is stepped, when they "
    "would all have to be there; set optimizer.max_grad_norm = None, or do not release gradients"
)
SCALER = (
    "lamb16.release_gradients: GradScaler finds no gradients to divide, since they were stepped in the backward pass, "
    "scaled as they were; train in bfloat16, which needs no scaler, or do not release gradients"
)
TWICE = (
    "lamb16.release_gradients: the gradient of parameter {} came a second time before optimizer.step(). Released "
    "gradients cannot be accumulated over several backward passes: the first has been stepped and freed. Call "
    "optimizer.step() after each backward pass, or do not release gradients"
)
LEFT = (
    "lamb16.release_gradients: parameter {} has a gradient at optimizer.step(), set by hand or after the backward "
    "pass, as DistributedDataParallel does; set it to None, or remove() the release to step it"
)


def check_release(optimizer: Any, wanted: type, bucket_bytes: Any) -> None:
    """Raise TypeError or ValueError for arguments that are not of the ``wanted`` class and no size."""
    if not isinstance(optimizer, wanted):
        raise TypeError(
            f"lamb16.release_gradients: optimizer is a {type(optimizer).__name__}; give the Lamb16 itself (of "
            "accelerate's wrapper, optimizer.optimizer)"
        )
    if not isinstance(bucket_bytes, int) or isinstance(bucket_bytes, bool) or bucket_bytes < 0:
        raise ValueError(
            f"lamb16.release_gradients: bucket_bytes={bucket_bytes!r} is invalid; it must be an integer >= 0"
        )


def check_unreleased(released: bool) -> None:
    """Raise RuntimeError where an optimizer's gradients are released already."""
    if released:
        raise RuntimeError("lamb16.release_gradients: this optimizer releases gradients already; remove() that first")


def check_not_wrapped(wrapped: Any) -> None:
    """Raise RuntimeError where a model is in DistributedDataParallel, or has it in it."""
    if wrapped:
        raise RuntimeError(DDP)


def check_unclipped(max_grad_norm: float | None) -> None:
    """Raise ValueError where gradients are to be clipped."""
    if max_grad_norm is not None:
        raise ValueError(CLIPPING.format(max_grad_norm))


def check_watched(param: Tensor, known: bool, name: Callable[[Tensor], str]) -> None:
    """Raise ValueError for a parameter that is not ``known`` to the model, RuntimeError for one with a gradient."""
    if not known:
        raise ValueError(
            f"lamb16.release_gradients: the optimizer's parameter {name(param)} is not the model's; give the "
            "module that all of them belong to"
        )
    if param.grad is not None:
        raise RuntimeError(
            f"lamb16.release_gradients: parameter {name(param)} has a gradient already; step "
            "it if that is to be, and call optimizer.zero_grad()"
        )


def warn_of_copy(released: bool) -> None:
    """Warn of a copy or pickle of an optimizer whose gradients are released, since the copy's are not."""
    if released:
        warnings.warn(
            "lamb16.release_gradients: a copy or pickle of this optimizer is an ordinary one, which steps in "
            "optimizer.step(); call release_gradients(model, optimizer) with the copies to release theirs",
            stacklevel=3,
        )


def check_members(found: int, released: int) -> None:
    """Raise RuntimeError where parameters were ``found`` for less gradients than were released."""
    if found < released:
        raise RuntimeError(
            "Lamb16: a parameter whose gradients are released has left the optimizer's groups; remove() the "
            "release before you take parameters out"
        )


def second_gradient(name: str) -> RuntimeError:
    """What is raised where a parameter's gradient has come twice."""
    return RuntimeError(TWICE.format(name))


def end_error(scaled: bool, params: Sequence[Tensor], name: Callable[[Tensor], str]) -> RuntimeError | None:
    """What is raised at the end of an iteration: a scaler has called ``step``, or a parameter has a gradient."""
    if scaled:
        return RuntimeError(SCALER)
    left = next((p for p in params if p.grad is not None), None)
    return None if left is None else RuntimeError(LEFT.format(name(left)))
