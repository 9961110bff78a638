"""The graphs that the tests run, which all processes of pytest-xdist compile before the tests, each by one of them.

Else every process compiles for itself whatever it meets first, and so does every rank that a test starts: two fifths of
the time of all tests. What is not named here is compiled where it is met.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lamb16.step.kinds import GRAPHS, Graph, Kind
from strategies import KINDS

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDINGS = ("exact", "stochastic", "nearest")
# Those of the properties, those of other tests, and those of which the distributed tests split inner dimensions.
OF_PROPERTIES = [
    Kind(CPU, dtype, dtype, moments == "float8", caution, "nearest" if dtype == F32 else rounding)
    for dtype, moments, rounding, caution in KINDS
]
OTHERS = [
    Kind(CPU, BF16, F32, rounding="stochastic"),
    *(Kind(CPU, dtype, dtype, float8=False, rounding="stochastic") for dtype in (BF16, F16)),
    *(Kind(CPU, BF16, BF16, float8=False, caution=True, rounding=rounding) for rounding in ("exact", "nearest")),
]
SPLIT = [Kind(CPU, caution=caution) for caution in (False, True)] + [
    Kind(CPU, BF16, BF16, caution=caution, rounding=rounding) for rounding in ROUNDINGS for caution in (False, True)
]


def graphs() -> list[tuple[Graph, Kind]]:
    """Without what makes no difference, so that none is there twice; those that take longest first."""
    found = [(graph, kind) for graph in GRAPHS for kind in (*OF_PROPERTIES, *OTHERS, *SPLIT) if _needed(graph, kind)]
    return sorted(dict.fromkeys((graph, graph.kind(kind)) for graph, kind in found), key=_work, reverse=True)


def _work(pair: tuple[Graph, Kind]) -> tuple[bool, ...]:
    graph, kind = pair
    return graph.function in ("update", "scale"), graph.packed, kind.exact, kind.param_dtype == F16


def _needed(graph: Graph, kind: Kind) -> bool:
    return kind in SPLIT or not graph.global_index


def share(folder: Path, jobs: Sequence[Callable[[], object]]) -> None:
    """Call the jobs that no other process has taken by now; called by every process with the same ``folder``."""
    folder.mkdir(exist_ok=True)
    for number, job in enumerate(jobs):
        try:
            (folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        with contextlib.suppress(Exception):  # the test that needs it will say so
            job()
