"""State that leaves the device, and comes back: colocated inference needs the memory between two phases of training.

To the host, CUDA tensors are copied into pinned memory, all copies queued on the current stream of their device. The
host waits for that stream once, at the end, before any state gets its copies. So what is in a state can be read, and
nothing on the device reads the originals any more: their memory may go to any stream, without ``record_stream``.

Back from pinned memory nothing waits. A step on the same stream comes after the copies, and the host's memory is not
used again before they are done: torch's allocator of pinned memory notes an event with every such copy. Other streams
wait for the current one, as for any tensor that is made there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .entries import SCALARS


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


def check_reloaded(offloaded: torch.device | None, what: str) -> None:
    """Raise RuntimeError where the state is away."""
    if offloaded is not None:
        raise RuntimeError(
            f"Lamb16.{what}: the state is offloaded to {offloaded}; call optimizer.reload() first (nothing was changed)"
        )


def check_not_meta(states: Mapping[Any, Any], named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError for a parameter on the meta device whose state has data, which would be lost there."""
    for name, p in named:
        if p.is_meta and any(isinstance(x, Tensor) and not x.is_meta for x in states.get(p, {}).values()):
            raise RuntimeError(
                f"Lamb16.reload: parameter {name} is on the meta device, where its state would be lost; move the model "
                "to the device that it is trained on first. Nothing was changed."
            )


def move(states: Mapping[Any, Any], device_of: Callable[[Tensor], torch.device], *, detach: bool = False) -> None:
    """Put all tensors in the states of parameters on other devices; entries that are there already stay as they are.

    DTensors keep mesh and placements. Meta tensors stay, and nothing is moved to the meta device. All copies are made
    before a state is changed.

    Args:
        states: of every parameter its state, which is changed in place; those of other keys are left alone.
        device_of: the device for a parameter's state.
        detach: copy the scalars in any case: they are views of a :class:`lamb16.store.Store`'s tables.
    """
    copies: list[tuple[dict[str, Any], str, Tensor]] = []
    scalars: dict[Any, list[tuple[dict[str, Any], str, Tensor]]] = defaultdict(list)
    waited: set[torch.device] = set()
    with torch.inference_mode(False), torch.no_grad():
        for p, state in states.items():
            device = device_of(p) if isinstance(p, Tensor) else None
            if device is None or device.type == "meta":
                continue
            for key, x in state.items():
                is_scalar = key in SCALARS
                if not isinstance(x, Tensor) or x.is_meta or (x.device == device and not (detach and is_scalar)):
                    continue
                if _is_pinned(x, device):
                    waited.add(x.device)
                if is_scalar and type(x) is Tensor:  # one copy for all of a kind, in place of thousands of a few bytes
                    scalars[x.device, device, x.dtype, x.shape].append((state, key, x))
                else:
                    copies.append((state, key, _copied(x, device)))
        for (_, device, *_), own in scalars.items():
            views = _copied(torch.stack([x for _, _, x in own]), device).unbind(0)
            copies += [(state, key, view) for (state, key, _), view in zip(own, views, strict=True)]
        for source in waited:
            torch.cuda.current_stream(source).synchronize()
    for state, key, copy in copies:
        state[key] = copy


def _is_pinned(x: Tensor, device: torch.device) -> bool:
    """Whether a copy of ``x`` on ``device`` goes to pinned memory, which is filled after the call has returned."""
    return x.device.type == "cuda" and device.type == "cpu" and torch.cuda.is_available()


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``, of the same kind; see the module's text for when it can be used."""
    copy = torch.empty_like(x, device=device, pin_memory=_is_pinned(x, device), requires_grad=False)
    return copy.copy_(x, non_blocking="cuda" in (x.device.type, device.type))
