"""What can be done with weights and states between steps: reading, resizing, float32 weights, leaving the device."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import remainder
from .checks.arguments import (
    check_float32_weights,
    check_not_meta,
    check_reloaded,
    check_replaced,
    check_resize,
    checked_device,
)
from .codes import REMAINDER
from .entries import init_state, resized, weight_sum
from .moments import in_float8
from .offload import move
from .parameters import Parameters
from .ready import New, add_up, checked_live_state, repair
from .sharding.exchange import refuse
from .sharding.layout import like_param
from .stepping import Stepper

if TYPE_CHECKING:
    from .release import GradientRelease


class BetweenSteps(Optimizer):
    """The part of :class:`lamb16.Lamb16` that changes, moves and reads weights and states between steps."""

    _seed: int
    _stepper: Stepper  # both made by _forget
    _offloaded: torch.device | None
    _release: GradientRelease | None = None  # what steps the parameters within backward passes

    def _forget(self) -> None:
        """Drop everything that is derived from parameters and state."""
        self._stepper = Stepper()
        self._offloaded = None

    @property
    def _parameters(self) -> Parameters:
        return Parameters(self.param_groups, self.state, self._seed)

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
        parameters = self._parameters
        check_replaced(id(p) in places, id(new_p) in places)
        group, i = places[id(p)]
        check_resize(p, index, new_p, parameters.name(group, i))
        state = self.state.get(p)
        if state:
            live = [(p, checked_live_state(parameters, p, group, i))]
            repair(self.state, self._stepper.stores, live, New([], []))
            state = resized(self.state[p], index.to(p.device), p, new_p)
        self.state.pop(p, None)
        group["params"][i] = new_p
        if state:
            self.state[new_p] = state
        if self._release is not None:
            self._release.replace(p, new_p)
        self._stepper.clear()
        self._stepper.stores.clear()
        self._stepper.last = []

    @property
    def skipped(self) -> int:
        """How many tensor updates were left out because of a non-finite gradient; reading waits for the device.

        Counted since this object was made: deepcopy and pickle keep the count, ``state_dict`` does not hold it.
        """
        return sum(int(count) for count in self._stepper.skipped.values())

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before clipping, without a gradient scaler's scale; float64, 0-d.

        Of all finite gradients, of all groups and ranks, on the first parameter's device. None where ``max_grad_norm``
        is None. Nothing is copied to the host.
        """
        return self._stepper.grad_norm

    def layer_stats(self) -> dict[str, dict[str, Tensor]]:
        """What the trust ratios of the last step came from, per parameter name (or position).

        Returns for every non-empty parameter that had a gradient a dict of ``weight_norm`` (of the weights before that
        step, as the step before left them), ``update_norm`` (of the step before that; √numel before the first), both
        clamped as in the rule, and ``trust_ratio``: 0-d float64 tensors on the parameter's device. Nothing is copied to
        the host. For a skipped tensor the ratio is the one that was not used. Empty until the first step, and from
        :meth:`offload`, :meth:`resize` or :meth:`load_state_dict` to the next one.
        """
        names = {id(p): name for name, (p, _, _) in self._parameters.named().items() if p.numel()}
        stats = {}
        for plan, tensors in self._stepper.last:
            for i, row in zip(tensors, plan.report[tensors], strict=True):
                if plan.ids[i] in names:
                    found = zip(("weight_norm", "update_norm", "trust_ratio"), row, strict=True)
                    stats[names[plan.ids[i]]] = dict(found)
        return stats

    @torch.no_grad()
    def float32_weights(self) -> dict[str, Tensor]:
        """The weights of all parameters in float32, by name (or position): copies, on the parameters' devices.

        Frozen ones that could not be stepped, as int8 weights, are left out, and :meth:`load_float32_weights` leaves
        them alone.


        Of several with one name the first has that name, the others have their group's position before it, and, where
        that is there already, a number after it: ``w``, ``0.w``, ``0.w.2``, ``1.w``. :meth:`layer_stats` does so too.

        Those that are kept exactly (``param_rounding="exact"``) with their remainders, unless somebody else has changed
        the weights since the last step. A collective for such weights that are DTensors.
        """
        named = self._parameters.named()
        return remainder.float32_weights({name: (p, self.state.get(p, {})) for name, (p, _, _) in named.items()})

    @torch.no_grad()
    def load_float32_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights to what :meth:`float32_weights` returned, and the remainders of those that are kept exactly.

        After :meth:`load_state_dict` a run goes on with the bits that it had. bfloat16 weights that are not kept
        exactly, and float16 ones, are rounded to nearest. All ranks must call this with the same, or with DTensors.

        Raises:
            ValueError: names, shapes or dtypes do not fit, on this rank or another; nothing is changed then.
        """
        parameters = self._parameters
        states = parameters.states
        error: Exception | None = None
        named = parameters.named()
        try:
            check_reloaded(self.offloaded, "load_float32_weights")
            check_float32_weights(weights, {name: p for name, (p, _, _) in named.items()})
        except (ValueError, RuntimeError) as found:
            error = found
        refuse(error, [p for p, _, _ in named.values()], "load_float32_weights")
        missing = {name: x for name, x in named.items() if remainder.is_exact(x[0], x[1]) and not states.get(x[0])}
        own: dict[Tensor, Tensor] = {}
        for name, (p, group, i) in missing.items():
            states[p] = init_state(p, parameters.salt(group, i), in_float8(group), exact=True)
            own[p] = like_param(p, weights[name]).to(p.device)
            states[p]["weight_sum"] = weight_sum(own[p])
        unnamed = parameters.unnamed()
        add_up({p: states[p] for p in own}, {p: x for p, x in own.items() if id(p) in unnamed})
        for p, group, _ in named.values():
            if remainder.is_exact(p, group) and not remainder.has_remainder(p, states[p]):
                states[p][REMAINDER] = remainder.no_remainder(p)
        remainder.load_weights({name: (p, states.get(p, {})) for name, (p, _, _) in named.items()}, weights)

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
                for x in (self._stepper.grad_norm, *self._stepper.skipped.values())
            )
            skipped = [x for x in counts if x is not None]
            total = {target: torch.stack(skipped).sum()} if skipped else {}
        move(self.state, lambda _: target, detach=True)
        self._forget()
        self._stepper.grad_norm, self._stepper.skipped, self._offloaded = norm, total, target

    def reload(self) -> None:
        """Move the state to the devices that its parameters are on by now: steps go on as if it had never been away.

        Waits for nothing: what uses the current stream comes after the copies. Repeated calls are harmless.

        Raises:
            RuntimeError: a parameter is on the meta device. Nothing is changed then, nor where memory runs out.
        """
        parameters = self._parameters
        check_not_meta(self.state, zip(chain.from_iterable(parameters.names()), parameters, strict=True))
        move(self.state, lambda p: p.device)
        self._offloaded = None

    @property
    def offloaded(self) -> torch.device | None:
        """The device that :meth:`offload` has moved the state to; None where it is on the parameters' own."""
        away = self._offloaded
        return away if away and any(state for p, state in self.state.items() if isinstance(p, Tensor)) else None
