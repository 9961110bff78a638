"""`lamb16 scale`: what a step costs on large meshes, on paper: collectives, communicated bytes, state a rank holds.

From what tests measure on small meshes: per step and split mesh axis one MAX and one SUM, 12 and 24 bytes per tensor;
state of 2 bytes for every element of a shard, and 56 for every tensor on every rank. Weights that are kept exactly
(``param_rounding="exact"``) are not counted: 2 bytes more per element, one SUM and 16 bytes per tensor. Nothing runs.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

from lamb16.entries import TABLES
from lamb16.lab.shapes import Shape
from lamb16.lab.study.report import table
from lamb16.sharding.reduction import REDUCED_BYTES

TENSOR_BYTES = sum(dtype.itemsize * len(names) for dtype, names in TABLES.items())  # the scalar state
BLOCK = 256  # elements that share a float32 scale in 8-bit AdamW, for each of two moments


def add_parser(subparsers: Any) -> None:
    """Add `scale` to the command line."""
    subparsers.add_parser(
        "scale",
        help="communication and state of a step on large meshes, on paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(args: argparse.Namespace) -> int:
    """Print both tables."""
    print(communication(), state(), sep="\n\n")
    return 0


def decoder(layers: int, width: int, hidden: int, key_width: int, vocabulary: int) -> list[Shape]:
    """A decoder with gated feed-forward layers, grouped keys and values, no biases, separate embeddings."""
    shapes: list[Shape] = [(vocabulary, width), (vocabulary, width), (width,)]
    for _ in range(layers):
        shapes += [(width, width), (key_width, width), (key_width, width), (width, width)]
        shapes += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return shapes


MODELS = {
    "1B": decoder(16, 2048, 8192, 512, 64_128),
    "70B": decoder(80, 8192, 28_672, 1024, 128_256),
    "1T": decoder(132, 20_480, 107_520, 2560, 128_256),
}


class Mesh(NamedTuple):
    """A mesh: its ranks, over how many of them the parameters are split, along how many axes, over how many by TP."""

    name: str
    ranks: int
    split: int
    axes: int
    tensor_parallel: int = 1


MESHES = (
    Mesh("FSDP2 8", 8, 8, 1),
    Mesh("HSDP 128 x 8", 1024, 8, 1),
    Mesh("FSDP2 1,024", 1024, 1024, 1),
    Mesh("FSDP2 2,048 x TP 8", 16_384, 16_384, 2, 8),
)


def elements(shapes: list[Shape]) -> int:
    """The parameters of a model."""
    return sum(math.prod(shape) for shape in shapes)


def communication() -> str:
    """Per step and rank: collectives, what they hold, and the same beside the float32 gradients that FSDP2 reduces."""
    header = ["model", "parameters", "tensors", "mesh", "ranks", "collectives", "bytes", "of the gradients' bytes"]
    rows = []
    for name, shapes in MODELS.items():
        for mesh in MESHES:
            sent = REDUCED_BYTES * (len(shapes) + 1) * mesh.axes  # one line more: which tensors these are
            gradients = 4 * elements(shapes) / mesh.tensor_parallel
            rows.append([
                name, f"{elements(shapes):,}", str(len(shapes)), mesh.name, f"{mesh.ranks:,}",
                str(2 * mesh.axes), f"{sent:,}", f"{sent / gradients:.1e}",
            ])  # fmt: skip
    return table(header, rows)


def state(unit: float = 1e9) -> str:
    """The bytes of optimizer state a rank holds, in GB, of an even split."""
    header = ["model", "mesh", "Lamb16", "8-bit AdamW", "AdamW, LAMB", "AdamW / Lamb16"]
    rows = []
    for name, shapes in MODELS.items():
        for mesh in MESHES:
            shard = elements(shapes) / mesh.split
            own = 2 * shard + TENSOR_BYTES * len(shapes)
            eight_bit, full = (2 + 8 / BLOCK) * shard, 8 * shard + 4 * len(shapes)
            sizes = [f"{size / unit:.4f}" for size in (own, eight_bit, full)]
            rows.append([name, mesh.name, *sizes, f"{full / own:.2f}"])
    return table(header, rows)
