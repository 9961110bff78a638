"""lamb16: LAMB with 16 bits of optimizer state per parameter, as a compiled PyTorch optimizer."""

from .baselines import Lamb, PublishedLamb16
from .optimizer import Lamb16
from .release import release_gradients
from .trainers import register_timm

__version__ = "0.2.0"
__all__ = ["Lamb", "Lamb16", "PublishedLamb16", "__version__", "register_timm", "release_gradients"]
