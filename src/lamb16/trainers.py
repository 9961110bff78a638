"""Lamb16 by its name in other libraries. docs/recipes.md shows those that need no registration."""

from __future__ import annotations

from .optimizer import Lamb16


def register_timm() -> None:
    """Make ``timm.optim.create_optimizer_v2(model, opt="lamb16")`` and ``"lookahead_lamb16"`` work.

    Hyperparameters go through as keywords. Names of parameters do not: timm drops them.

    Raises:
        ImportError: timm is not installed, or older than 1.0.
    """
    try:
        from timm.optim._optim_factory import OptimInfo, default_registry
    except ImportError as error:
        raise ImportError("lamb16.register_timm: timm is missing or too old; install timm>=1.0") from error
    description = "LAMB with 16 bits of optimizer state per parameter"
    if not default_registry.list_optimizers("lamb16"):
        default_registry.register(OptimInfo(name="lamb16", opt_class=Lamb16, description=description, has_betas=True))
