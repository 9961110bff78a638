"""What a step over a list of shapes launches, reads and writes on CUDA, counted by making it on meta tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lamb16 import Lamb16
from lamb16.compiled import Step
from lamb16.packing import TablePacking
from lamb16.update import PIECE

from . import fake
from .kernels import Graph, Launch, Resources, assemble, graph

FOREACH_TENSORS = 64  # of a launch of a two-list torch._foreach_* kernel
COPIES = "copies"  # in place of a step function's name
METADATA = re.compile(
    r"profiler\.|aten\.(view|slice|select|detach|alias|as_strided|expand|unsqueeze|unbind|split\w*|empty\w*|t)\b"
)


@dataclass(frozen=True)
class Eager:
    """One operation outside the compiled graphs, and how many kernels it launches."""

    name: str
    launches: int
    bytes_moved: int


class EagerOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Eager] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not METADATA.match(str(func)):
            lists = [x for x in args if isinstance(x, (list, tuple))]
            tensors = [x for y in [*lists, args] for x in y if isinstance(x, Tensor)]
            launches = -(-len(lists[0]) // FOREACH_TENSORS) if "foreach" in str(func) else 1
            self.seen.append(Eager(str(func), launches, sum(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Report:
    """One steady step (not the first) of Lamb16 with float32 parameters of some shapes."""

    arch: str
    shapes: str
    tensors: int
    params: int
    launches: int
    bytes_per_param: float
    spills: int
    fallbacks: list[str]
    eager: list[dict[str, Any]]
    kernels: list[dict[str, Any]]


class Code:
    """The step functions' code for one architecture, generated and compiled once for any number of shapes."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.kind = fake.kind()
        self._graphs: dict[str, Graph] = {}
        self._resources: dict[tuple[str, str], Resources] = {}

    def graph(self, name: str) -> Graph:
        """A step function's code, generated when it is first asked for."""
        if name not in self._graphs:
            self._graphs[name] = graph(name, self.kind, self.capability)
        return self._graphs[name]

    def resources(self, name: str, kernel: str) -> Resources:
        """What a kernel of a step function needs, compiled when first asked for."""
        key = name, kernel
        if key not in self._resources:
            with fake.device(self.capability):
                own = name == COPIES
                compile = copy_resources if own else self._graphs[name].kernels[kernel].resources
                self._resources[key] = compile(self.capability)
        return self._resources[key]


def copy_resources(capability: int) -> Resources:
    """What the copying kernel needs, to be called within :func:`fake.device`."""
    from .copying import copy_pieces

    types = ["*i64"] * 4 + ["*fp32", "*fp32", "*u8", "*u8", "*i32"]
    signature = dict(zip(copy_pieces.arg_names, [*types, "constexpr", "constexpr"], strict=True))
    both = [assemble(copy_pieces, signature, {"UNPACK": k, "PIECE": PIECE}, capability) for k in (False, True)]
    return max(both, key=lambda needs: needs.registers)


class Steps:
    """A Lamb16 over meta tensors of some shapes whose step functions only count."""

    def __init__(self, code: Code, shapes: Sequence[tuple[int, ...]]) -> None:
        self.code = code
        self.launches: list[tuple[str, Launch]] = []  # of the last step: the step function, the launch
        self.eager: list[Eager] = []  # of the last step
        self.copied: list[Eager] = []
        params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        for p in params:
            p.grad = torch.empty_like(p)
        self.optimizer = Lamb16(params, lr=1e-3, weight_decay=0.01, compile=False)
        (self.plan,) = self.optimizer._current_plans()[0]
        self.plan.functions = Step(*(self._recorder(name) for name in Step._fields))
        if self.plan.tails:
            self.plan.packing = TablePacking(self.plan.tails, self.plan.packed, self.plan.codes, self._copied)

    def take(self) -> list[tuple[str, Launch]]:
        """Make one step; returns its launches."""
        self.launches, self.copied = [], []
        with EagerOperations() as eager:
            self.optimizer.step()
        self.eager = eager.seen + self.copied
        return self.launches

    def _recorder(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            with _disable_current_modes():  # what happens here is no operation of the step
                graph = self.code.graph(name)
                self.launches.extend((name, launch) for launch in graph(*arguments))
                self.copied += [Eager(f"copy to align, {name}", 1, 2 * x.nbytes) for x in graph.copies]

        return call

    def _copied(self, *arguments: Any) -> None:
        *tensors, unpack = arguments
        self.launches.append((COPIES, copying(tensors, unpack)))


def copying(tensors: Sequence[Tensor], unpack: bool) -> Launch:
    """The launch of the copying kernel: it reads and writes as much as the packed buffer holds."""
    copied = {k: x for k, x in zip("pgmv", tensors[4:8], strict=True) if k != "g" or not unpack}
    moved = {f"{side}_ptr_{k}": x for side in ("in", "out") for k, x in copied.items()}
    return Launch("copy_pieces", moved | {"UNPACK": unpack})


def report(code: Code, title: str, shapes: Sequence[tuple[int, ...]]) -> Report:
    """Count one step over parameters of these shapes, and compile every kernel that it launches."""
    steps = Steps(code, shapes)
    steps.take()
    launched = steps.take()
    params = sum(p.numel() for p in steps.plan.params)
    moved = sum(launch.bytes_read + launch.bytes_written for _, launch in launched)
    moved += sum(operation.bytes_moved for operation in steps.eager)
    kernels = _kernels(code, launched)
    names = sorted({name for name, _ in launched} & set(Step._fields))
    return Report(
        arch=f"sm_{code.capability}",
        shapes=title,
        tensors=len(steps.plan.params),
        params=params,
        launches=len(launched) + sum(operation.launches for operation in steps.eager),
        bytes_per_param=moved / params,
        spills=sum(kernel["spills"] for kernel in kernels),
        fallbacks=[f"{name}: {call}" for name in names for call in code.graph(name).fallbacks],
        eager=[asdict(operation) for operation in steps.eager],
        kernels=kernels,
    )


def _kernels(code: Code, launched: list[tuple[str, Launch]]) -> list[dict[str, Any]]:
    """One row a kernel: how often it is launched in the step, what it moves, what it needs."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, launch in launched:
        key = name, launch.kernel
        if key not in rows:
            needs = asdict(code.resources(name, launch.kernel))
            rows[key] = {"graph": name, "kernel": launch.kernel, "launches": 0, "read": 0, "written": 0, **needs}
        rows[key]["launches"] += 1
        rows[key]["read"] += launch.bytes_read
        rows[key]["written"] += launch.bytes_written
    return list(rows.values())
