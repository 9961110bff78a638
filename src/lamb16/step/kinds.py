"""What the graphs of the step are: which functions in which forms, and what their code is specialised on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..moments import graph_dtype


class Kind(NamedTuple):
    """What compiled code is specialised on."""

    device: torch.device
    param_dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32
    float8: bool = True
    caution: bool = False
    rounding: str = "nearest"  # of weights with 16 bits

    @property
    def exact(self) -> bool:
        """Whether there are remainders of the weights."""
        return self.rounding == "exact"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of weights, gradients, codes and, if there are, remainders, as the graphs see them."""
        moment = graph_dtype(self.float8)
        return self.param_dtype, self.grad_dtype, moment, moment, *[torch.int16] * self.exact

    @property
    def group(self) -> int:
        """Large tensors of a call. CUDA launches one kernel for all; on the CPU a loop per tensor gains nothing."""
        return 1 if self.device.type == "cpu" else 16

    @property
    def reading_group(self) -> int:
        """Large tensors of a call of ``inspect``, which does less with each; a multiple of :attr:`group`."""
        return 1 if self.group == 1 else 2 * self.group


class Graph(NamedTuple):
    """A step function in one of its forms."""

    function: str
    packed: bool = False
    global_index: bool = False  # update: of tensors that are split along inner dimensions
    squares: bool = False  # inspect: the sums of squares

    @property
    def name(self) -> str:
        """The function and, in words, its form."""
        forms = [form.replace("_", " ") for form in self._fields[1:] if getattr(self, form)]
        return " ".join([self.function, *forms])

    def kind(self, kind: Kind) -> Kind:
        """Without what makes no difference to this function."""
        if self.function == "update":
            return kind
        exact = kind.exact and not (self.squares or self.function == "norm")
        param_dtype, rounding = (kind.param_dtype, kind.rounding) if exact else (torch.float32, "nearest")
        general = Kind(kind.device, param_dtype, rounding=rounding)
        if self.function in ("gather", "norm"):
            return general
        if self.function == "inspect":
            return general._replace(grad_dtype=kind.grad_dtype)
        general = general._replace(float8=kind.float8)
        return general if self.function == "scale" else general._replace(caution=kind.caution)


GRAPHS = (
    Graph("inspect"), Graph("inspect", packed=True),
    Graph("inspect", squares=True), Graph("inspect", packed=True, squares=True),
    Graph("gather"), Graph("norm"), Graph("scale"), Graph("fold"),
    Graph("update"), Graph("update", packed=True),
    Graph("update", global_index=True), Graph("update", packed=True, global_index=True),
)  # fmt: skip
