"""What is refused, with the messages. Functions here take what they look at, and know nothing of stores and plans.

- ``arguments.py``: what methods of the optimizer are handed, and calls at the wrong time
- ``tensors.py``: parameters, gradients and the memory of both and of states
- ``state.py``: states, in a step and in a state dict; names and groups of state dicts
- ``remainders.py``: remainders of exact weights, in both
- ``foreign.py``: states of other optimizers
- ``sharded.py``: DTensors that cannot be stepped, and ranks that do not agree
- ``release.py``: gradient release
- ``checkpoint.py``: checkpoints

Elsewhere are the rules of hyperparameters (``hyper.py``, with their declarations), what is wrong with a tensor subclass
(:func:`lamb16.wrapped.fault`, which looks into it), and failures of what was tried: compilers, files, devices that
are not there.
"""

from .tensors import check_gradient, check_parameter

__all__ = ["check_gradient", "check_parameter"]
