"""Gradient release: each parameter is stepped in the backward pass, when its gradient is there, which is then freed.

Small tensors are gathered in *buckets*, each of which is one step over its members. Buckets are made in the first
backward pass, in the order in which gradients come, and are kept: so steps find their plans.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from .checks.release import (
    check_not_wrapped,
    check_release,
    check_unclipped,
    check_unreleased,
    check_watched,
    end_error,
    second_gradient,
)
from .checks.tensors import check_memory
from .optimizer import Lamb16
from .sharding.layout import is_sharded, local

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

BUCKET_BYTES = 16 << 20


def release_gradients(model: nn.Module, optimizer: Lamb16, *, bucket_bytes: int = BUCKET_BYTES) -> GradientRelease:
    """Step every parameter within the backward pass and free its gradient, so that never all gradients exist at once.

    The bits are those of an ordinary step. From here on ``optimizer.step()`` marks the end of an iteration and changes
    nothing, and so does ``zero_grad()``; schedulers work as ever. After a backward pass every ``grad`` is None: what
    reads or changes gradients between ``backward()`` and ``step()`` finds none (``Tensor.register_hook`` does).

    So clipping that a trainer does clips nothing, and nothing says so. Turn it off: ``max_grad_norm=0`` for
    transformers' Trainer, whose default clips at 1.0, and no ``gradient_clip_val`` for Lightning's.

    A parameter whose gradient takes ``bucket_bytes`` or more is stepped at once. Smaller ones wait for each other until
    theirs take that much together, or the backward pass ends. So at any time the gradients take less than twice
    ``bucket_bytes`` and one gradient; more where they come in another order than in the first pass, or where parameters
    have none in some passes, whose buckets wait until the end.

    A backward pass that raises leaves stepped what was stepped, and drops the gradients that were waiting.

    DTensors (FSDP2, tensor parallelism) are stepped with two collectives for each bucket; ``optimizer.step()`` then has
    two as well, by which ranks that stepped different buckets find that out. Sizes are those of whole tensors there.

    Args:
        model: the module that all parameters of ``optimizer`` belong to.
        optimizer: steps the parameters. A copy or pickle of it is an ordinary optimizer, and warned of.
        bucket_bytes: bytes of gradients that are gathered for a step; 0 steps each parameter on its own.

    Returns:
        What ends this: its ``remove()``, or leaving it as a context manager.

    Raises:
        TypeError: ``optimizer`` is no Lamb16.
        ValueError: ``bucket_bytes`` is no integer >= 0, parameters are not the model's or share memory,
            ``max_grad_norm`` is set.
        RuntimeError: gradients are released already, or some are there; the model is, or has in it,
            DistributedDataParallel. From a forward pass: the model is within DistributedDataParallel. From a
            backward pass: a parameter's gradient comes a second time before ``optimizer.step()`` or ``zero_grad()``;
            what ``optimizer.step()`` raises of gradients and states. From ``optimizer.step()``: a GradScaler has called
            it, or a parameter has a gradient.
    """
    check_release(optimizer, Lamb16, bucket_bytes)
    check_unreleased(optimizer._release is not None)
    check_not_wrapped(any(isinstance(module, DistributedDataParallel) for module in model.modules()))
    return GradientRelease(model, optimizer, bucket_bytes)


# Whose gradients are released, and how often: copies of a model have its hooks, too.
_MODELS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class GradientRelease:
    """Gradients of an optimizer's parameters are stepped and freed in the backward pass; :func:`release_gradients`."""

    def __init__(self, model: nn.Module, optimizer: Lamb16, bucket_bytes: int) -> None:
        from torch._dynamo.decorators import skip  # Dynamo is not imported before it is needed

        self.bucket_bytes = bucket_bytes
        self._buckets = Buckets()
        self._bucket_of = self._buckets.of  # looked into at every gradient
        self._model, self._optimizer = ref(model), ref(optimizer)
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._hooks: dict[int, RemovableHandle] = {}
        self._sharded = False
        self._seen: set[int] = set()  # the parameters whose gradients have come in this iteration
        self._passes: dict[int, ref[_Pass]] = {}  # that are under way; checkpointing nests them
        self._removed = False
        self._begun = False  # whether anything has been stepped in this iteration
        self._error: Exception | None = None  # of the step to come
        self.watch([p for group in optimizer.param_groups for p in group["params"]])
        self._ddp = model.register_forward_pre_hook(_refuse_ddp)
        _MODELS[model] = _MODELS.get(model, 0) + 1
        skip(_arrived)  # _disable_dynamo would take a microsecond of every call
        optimizer._stepper.clear()
        optimizer._release = self

    def remove(self) -> None:
        """End the release: ``optimizer.step()`` and ``zero_grad()`` are the ordinary ones again."""
        optimizer, model = self._optimizer(), self._model()
        with self._lock:
            for hook in [*self._hooks.values(), self._ddp]:
                hook.remove()
            if model is not None and not self._removed:
                _MODELS[model] -= 1
            self._removed = True
            if optimizer is not None and optimizer._release is self:
                optimizer._release = None
                optimizer._stepper.clear()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -- for the optimizer ---------------------------------------------------------------------------------------

    def watch(self, params: Sequence[Tensor]) -> None:
        """Release the gradients of these parameters of the optimizer; raises with nothing changed."""
        optimizer, model = self._optimizer(), self._model()
        if optimizer is None or model is None:
            return
        check_unclipped(optimizer.max_grad_norm)
        own = set(map(id, model.parameters()))
        for p in params:
            check_watched(p, id(p) in own, self._name)
        judged = optimizer._parameters.judged()
        places = [(group, i) for group, i in judged if group["params"][i].requires_grad]
        check_memory(
            [local(group["params"][i]) for group, i in places],
            lambda: [f"parameter {optimizer._parameters.name(group, i)}" for group, i in places],
            torch.is_inference_mode_enabled(),
        )
        may_thaw = {id(group["params"][i]) for group, i in judged}
        for p in params:
            if id(p) in may_thaw:
                self._hook(p)

    def _hook(self, p: Tensor) -> None:
        trained = p.requires_grad
        p.requires_grad_(True)  # torch gives no hook to what is frozen, and may thaw
        hook = p.register_post_accumulate_grad_hook(partial(_arrived, ref(self)))  # type: ignore[no-untyped-call]
        p.requires_grad_(trained)
        self._hooks[id(p)] = hook
        self._sharded |= is_sharded(p)

    def replace(self, p: Tensor, new_p: Tensor) -> None:
        """``new_p`` has taken the place of ``p`` in the optimizer."""
        if (hook := self._hooks.pop(id(p), None)) is not None:
            hook.remove()
        self._buckets.replace(id(p), id(new_p))
        self._hook(new_p)

    def check(self) -> None:
        """Raise the error of this step, if there is one; where parameters are shared, the other ranks raise with it."""
        optimizer = self._optimizer()
        if self._error is not None:
            raise self._error
        if optimizer is not None:
            check_unclipped(optimizer.max_grad_norm)

    def end(self, scaled: bool) -> None:
        """``optimizer.step()`` was called, ``scaled`` by a GradScaler: the next gradients are another iteration's."""
        with self._lock:
            self.forget()
            optimizer = self._optimizer()
            assert optimizer is not None
            params = [p for group in optimizer.param_groups for p in group["params"]]
            error = end_error(scaled, params, self._name)
            if error is not None or self._sharded:
                self._step({}, error)

    @_disable_dynamo
    def forget(self) -> None:
        """The next gradients are another iteration's."""
        with self._lock:
            self._seen.clear()
            self._begun = False

    # -- in the backward pass ------------------------------------------------------------------------------------

    @_disable_dynamo
    def _begin(self, task: int) -> None:
        """A backward pass has begun; its end is called, or freed where the pass fails."""
        end = _Pass(self, task)
        self._passes[task] = ref(end, partial(_failed, ref(self), task))
        torch.autograd.Variable._execution_engine.queue_callback(end)

    @_disable_dynamo
    def _step_bucket(self, bucket: Bucket) -> None:
        gradients, bucket.gradients = bucket.gradients, {}
        self._step(gradients)

    @_disable_dynamo
    @torch.no_grad()
    def _step(self, gradients: dict[int, Tensor], error: Exception | None = None) -> None:
        """Step parameters, by id, with these gradients, or raise the error."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._error = error
        try:
            plans = optimizer._step(None, None, gradients)
            if plans:
                optimizer._stepper.last = [*optimizer._stepper.last, *plans] if self._begun else [*plans]
                self._begun = True
        finally:
            self._error = None

    def ended(self, task: int) -> None:
        """A backward pass has ended: step what waits, unless the pass is part of another."""
        with self._lock:
            try:
                if len(self._passes) == 1:
                    for bucket in self._buckets.order:
                        if bucket.gradients:
                            self._step_bucket(bucket)
            except BaseException:  # whose traceback may keep the pass, which is then not freed
                self.failed(task)
                raise
            del self._passes[task]

    def failed(self, task: int) -> None:
        """A backward pass has failed: the next one begins anew."""
        with self._lock:
            del self._passes[task]
            self.forget()
            self._buckets.drop_gradients()

    def _name(self, p: Tensor) -> str:
        optimizer = self._optimizer()
        for group in optimizer.param_groups if optimizer is not None else ():
            for i, other in enumerate(group["params"]):
                if other is p:
                    return optimizer._parameters.name(group, i)  # type: ignore[union-attr]
        return "?"


class Bucket:
    """Parameters that are stepped together."""

    def __init__(self) -> None:
        self.members: set[int] = set()  # ids of parameters
        self.bytes, self.full = 0, False
        self.gradients: dict[int, Tensor] = {}  # those that wait


class Buckets:
    """All buckets, made in the order in which gradients come in the first backward pass, and kept."""

    def __init__(self) -> None:
        self.of: dict[int, Bucket] = {}  # by their members; never replaced, a release holds it too
        self.order: list[Bucket] = []
        self._open = Bucket()

    @_disable_dynamo
    def place(self, key: int, size: int, bucket_bytes: int) -> Bucket:
        """The bucket for a parameter that has none; it is full with ``bucket_bytes`` of gradients."""
        bucket = Bucket() if size >= bucket_bytes else self._open
        if not bucket.members:
            self.order.append(bucket)
        bucket.members.add(key)
        bucket.bytes += size
        bucket.full = bucket.bytes >= bucket_bytes
        if bucket.full and bucket is self._open:
            self._open = Bucket()
        self.of[key] = bucket
        return bucket

    def replace(self, key: int, new: int) -> None:
        """Another parameter has taken the place of one."""
        bucket = self.of.pop(key, None)
        if bucket is not None:
            self.of[new] = bucket
            bucket.members ^= {key, new}

    def drop_gradients(self) -> None:
        """Drop the gradients that wait."""
        for bucket in self.order:
            bucket.gradients.clear()


class _Pass:
    """What autograd calls at the end of a backward pass, and frees where the pass fails."""

    def __init__(self, release: GradientRelease, task: int) -> None:
        self.release, self.task = release, task

    @_disable_dynamo
    def __call__(self) -> None:
        self.release.ended(self.task)


# These hold what they call by weak references: a model does not keep an optimizer alive.


def _arrived(release: ref[GradientRelease], p: Tensor) -> None:
    """A parameter's gradient is complete: take it, and step what is to be stepped with it. The parameters' hook."""
    self, grad = release(), p.grad
    if self is None or grad is None:
        return
    key, p.grad = id(p), None
    with self._lock:
        if (task := _current_pass()) not in self._passes:
            self._begin(task)
        if key in self._seen:
            self._step({}, second_gradient(self._name(p)))
        self._seen.add(key)
        bucket = self._bucket_of.get(key)
        if bucket is None:
            bucket = self._buckets.place(key, grad.nbytes, self.bucket_bytes)
        bucket.gradients[key] = grad
        del grad
        if bucket.full and len(bucket.gradients) == len(bucket.members):
            self._step_bucket(bucket)


_current_pass = torch._C._current_graph_task_id


def _failed(release: ref[GradientRelease], task: int, _: Any) -> None:
    found = release()
    if found is not None:
        found.failed(task)


def _refuse_ddp(model: nn.Module, _: Any) -> None:
    """Raise RuntimeError where a model whose gradients are released is called by DistributedDataParallel."""
    active = DistributedDataParallel._active_ddp_module
    check_not_wrapped(active is not None and _MODELS.get(model) and any(module is model for module in active.modules()))
