"""lamb16: LAMB with 16 bits of optimizer state per parameter, as a compiled PyTorch optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING

from .optimizer import Lamb16

if TYPE_CHECKING:
    from .baselines import Lamb, PublishedLamb16
    from .release import release_gradients
    from .trainers import register_timm

__version__ = "0.2.0"
__all__ = ["Lamb", "Lamb16", "PublishedLamb16", "__version__", "register_timm", "release_gradients"]

# Public names that are imported when they are first asked for, with their modules.
_LATER = {
    "Lamb": "baselines",
    "PublishedLamb16": "baselines",
    "register_timm": "trainers",
    "release_gradients": "release",
}


def __getattr__(name: str) -> object:
    if name in _LATER.values():  # the module itself
        return import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
