"""Float32 weights that an optimizer is to go on with: of all parameters, with the remainders of exact ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks.arguments import check_float32_weights, check_reloaded
from .codes import REMAINDER
from .entries import init_state, weight_sum
from .moments import in_float8
from .parameters import Parameters
from .ready import add_up
from .remainder import has_remainder, is_exact, load_weights, no_remainder
from .sharding.exchange import refuse
from .sharding.layout import like_param


def load_float32_weights(parameters: Parameters, weights: Mapping[str, Tensor], offloaded: torch.device | None) -> None:
    """See :meth:`lamb16.Lamb16.load_float32_weights`; ``offloaded``: where the states are, if they are away."""
    states = parameters.states
    error: Exception | None = None
    named = parameters.named()
    try:
        check_reloaded(offloaded, "load_float32_weights")
        check_float32_weights(weights, {name: p for name, (p, _, _) in named.items()})
    except (ValueError, RuntimeError) as found:
        error = found
    refuse(error, [p for p, _, _ in named.values()], "load_float32_weights")
    missing = {name: x for name, x in named.items() if is_exact(x[0], x[1]) and not states.get(x[0])}
    own: dict[Tensor, Tensor] = {}
    for name, (p, group, i) in missing.items():
        states[p] = init_state(p, parameters.salt(group, i), in_float8(group), exact=True)
        own[p] = like_param(p, weights[name]).to(p.device)
        states[p]["weight_sum"] = weight_sum(own[p])
    unnamed = parameters.unnamed()
    add_up({p: states[p] for p in own}, {p: x for p, x in own.items() if id(p) in unnamed})
    for p, group, _ in named.values():
        if is_exact(p, group) and not has_remainder(p, states[p]):
            states[p][REMAINDER] = no_remainder(p)
    load_weights({name: (p, states.get(p, {})) for name, (p, _, _) in named.items()}, weights)
