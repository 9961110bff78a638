"""Kernels whose time on a GPU is published, with the model's time: a check of the model, not of the optimizer.

They are the Triton kernels by which torchao quantizes to float8 in blocks. torchao's benchmark of them on an H100 is in
https://github.com/pytorch/ao/blob/main/benchmarks/prototype/blockwise_fp8_training/README.md ("Current H100 Results",
captured on 2026-03-20, "NVIDIA H100 80GB HBM3"), the median of the public wrapper call's times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import fake, sass
from .gpus import GPUS, Prediction, Work, predict
from .kernels import assemble

BLOCK = 128  # elements of a float8 block, torchao's default
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")


@dataclass(frozen=True)
class Published:
    """A kernel, the shape that it was timed on, and the time."""

    name: str
    rows: int
    columns: int
    seconds: float
    tile: bool  # whether a scale is that of 128 x 128 elements; otherwise of 1 x 128
    parameters: tuple[str, ...]  # of the kernel, those that are not compiled in

    @property
    def elements(self) -> int:
        """Of the matrix."""
        return self.rows * self.columns

    @property
    def moved(self) -> float:
        """Bytes: bfloat16 read, float8 and float32 scales written; what torchao counts too."""
        return self.elements * (2 + 1) + 4 * self.elements / (BLOCK * BLOCK if self.tile else BLOCK)


POINTERS = (
    "x_ptr", "x_stride_dim_0", "x_stride_dim_1", "y_ptr", "y_stride_dim_0", "y_stride_dim_1",
    "s_ptr", "s_stride_dim_0", "s_stride_dim_1",
)  # fmt: skip
PUBLISHED = (
    Published("act_quant_lhs", 32768, 4096, 150.86e-6, False, (*POINTERS, "M")),
    Published("act_quant_lhs", 131072, 4096, 586.98e-6, False, (*POINTERS, "M")),
    Published("weight_quant_rhs", 32768, 4096, 144.99e-6, True, POINTERS),
    Published("weight_quant_rhs", 131072, 4096, 555.30e-6, True, POINTERS),
)


@dataclass(frozen=True)
class Checked:
    """A published time and the model's, for the configuration of torchao's list that the model finds fastest."""

    published: Published
    prediction: Prediction  # per element
    work: Work  # per element
    options: str
    range: tuple[float, float]  # issue slots per element of the leanest and of the most wasteful configuration


def check() -> Iterator[Checked]:
    """Compile every published kernel in all its configurations for an H100; torchao is needed."""
    from torchao.prototype.blockwise_fp8_training import kernels

    for item in PUBLISHED:
        tuner = getattr(kernels, f"triton_fp8_blockwise_{item.name}_kernel")
        found = []
        for config in tuner.configs:
            if config.num_stages == tuner.configs[0].num_stages:  # there is no loop that it would make a difference to
                found.append((_work(tuner.fn, item, config), _name(config)))
        slots = [work.total for work, _ in found]
        predictions = [(predict([work], H100), work, name) for work, name in found]
        best, work, name = min(predictions, key=lambda x: (x[0].time, x[1].total))
        yield Checked(item, best, work, name, (min(slots), max(slots)))


def _work(function: Any, item: Published, config: Any) -> Work:
    types = {"x_ptr": "*bf16", "y_ptr": "*fp8e4nv", "s_ptr": "*fp32"}
    strides = {"x_stride_dim_1": 1, "y_stride_dim_1": 1, "s_stride_dim_0": 1}
    if item.tile:
        strides = {"x_stride_dim_1": 1, "y_stride_dim_0": 1, "s_stride_dim_0": 1}
    sizes = {"M": item.rows, "K": item.columns, "N": item.columns}
    constants: dict[str, Any] = {"BLOCK_SIZE": BLOCK, "EPS": 1e-12, **config.kwargs, **strides}
    constants |= {name: sizes[name] for name in function.arg_names if name in sizes and name not in item.parameters}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    # As Triton's launcher finds out: addresses and sizes that are multiples of 16.
    attributes = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(function.arg_names) if name not in constants}
    with fake.device(H100.capability):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        binary = assemble(function, signature, constants, H100.capability, attributes=attributes, options=options)
    each = sass.per_thread(sass.paths(binary.code))
    block = BLOCK * constants.get("NUM_GROUPS", BLOCK)
    return Work(item.moved / item.elements, {k: n * binary.threads / block for k, n in each.items()})


def _name(config: Any) -> str:
    return ", ".join(f"{k}={x}" for k, x in {**config.kwargs, "num_warps": config.num_warps}.items())


def ratio(checked: Checked) -> float:
    """The published time by the model's; 1 is what a model without losses would have."""
    found = checked.published.seconds / (checked.prediction.time * checked.published.elements)
    assert math.isfinite(found)
    return found
