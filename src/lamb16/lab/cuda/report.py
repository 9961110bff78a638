"""What a step over a list of shapes launches, reads and writes on CUDA, counted by making it on meta tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lamb16 import Lamb16
from lamb16.step.blocks import PACKED_ROW, Block, memory
from lamb16.step.kinds import Graph, Kind

from . import fake, gpus, sass
from .kernels import Binary, Kernel, Launch, Program, Resources, Slots, assemble, program

FOREACH_TENSORS = 64  # of a launch of a two-list torch._foreach_* kernel
COPIES = "copies"  # in place of a graph's name
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
    """Notes every operation that would launch a kernel; what is done on the host's tensors does not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Eager] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        lists = [x for x in args if isinstance(x, (list, tuple))]
        tensors = [x for y in [*lists, args] for x in y if isinstance(x, Tensor)]
        on_host = all(x.is_cpu for x in [*tensors, result] if isinstance(x, Tensor))
        if not (on_host or METADATA.match(str(func))):
            launches = -(-len(lists[0]) // FOREACH_TENSORS) if "foreach" in str(func) else 1
            self.seen.append(Eager(str(func), launches, sum(x.nbytes for x in tensors)))
        return result


@dataclass(frozen=True)
class Report:
    """One steady step (not the first) of Lamb16 with float32 parameters of some shapes."""

    arch: str
    shapes: str
    tensors: int
    params: int
    launches: int
    bytes_per_param: float
    slots_per_param: float  # issue slots
    spills: int
    fallbacks: list[str]
    eager: list[dict[str, Any]]
    kernels: list[dict[str, Any]]


class Code:
    """The graphs' code for one architecture, generated and compiled once for any number of shapes."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.kind = fake.kind()
        self.programs: dict[tuple[Graph, Kind], Program] = {}
        self._copying: dict[bool, Binary] = {}

    def program(self, graph: Graph, kind: Kind | None = None) -> Program:
        """A graph's code for tensors of a kind on CUDA, generated when it is first asked for."""
        key = graph, graph.kind(kind or self.kind)._replace(device=torch.device("cuda"))
        if key not in self.programs:
            self.programs[key] = program(*key, self.capability)
        return self.programs[key]

    def resources(self, kernel: Kernel | None) -> Resources:
        """What a kernel, or the copying one (None), needs, compiled when first asked for."""
        with fake.device(self.capability):
            if kernel:
                return kernel.resources(self.capability)
            return max((self.copying(k).resources for k in (False, True)), key=lambda needs: needs.registers)

    def copying(self, unpack: bool) -> Binary:
        """The copying kernel, to be called within :func:`fake.device`."""
        if unpack not in self._copying:
            from lamb16.step.cuda_copying import copy_packed_rows

            types = ["*i64", "*fp32", "*fp32", "*u8", "*u8", "*u8", "*i64", "*i32", "*i32", "i32"]
            signature = dict(zip(copy_packed_rows.arg_names, [*types, *["constexpr"] * 3], strict=True))
            constants = {"EXACT": False, "UNPACK": unpack, "PACKED_ROW": PACKED_ROW}
            self._copying[unpack] = assemble(copy_packed_rows, signature, constants, self.capability)
        return self._copying[unpack]

    def slots(self, kernel: Kernel | None, launch: Launch) -> Slots:
        """The issue slots of a launch of a kernel, or of the copying one (None)."""
        with fake.device(self.capability):
            if kernel:
                return kernel.slots(launch.arguments, self.capability)
            binary, rows = self.copying(launch.arguments["UNPACK"]), launch.arguments["in_ptr_p"].shape[0]
        each = sass.per_thread(sass.paths(binary.code))
        return Slots({pipe: n * binary.threads * rows for pipe, n in each.items()}, True)


class Recorder:
    """An executor for parameters on the meta device: it notes what a step launches on CUDA, and runs nothing."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.launches: list[tuple[str, Launch]] = []  # the graph's name, the launch
        self.copied: list[Eager] = []
        self.used: dict[str, Program] = {}

    def clear(self) -> None:
        """Forget what was launched."""
        self.launches, self.copied = [], []

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Generate the code."""
        with _disable_current_modes():
            self.used[graph.name] = self.code.program(graph, kind)

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Note the launches of the generated code."""
        with _disable_current_modes():  # what happens here is no operation of the step
            called = self.code.program(graph, kind)
            self.launches += [(graph.name, launch) for launch in called(*arguments)]
            self.copied += [Eager(f"copy to align, {graph.name}", 1, 2 * x.nbytes) for x in called.copies]

    def copy(self, _: Tensor, block: Block, operands: Sequence[int], unpack: bool) -> None:
        """Note the launch of the copying kernel."""
        if 1 in operands:
            self.launches.append((COPIES, copying(block, unpack)))


class CountedSteps:
    """A Lamb16 over meta tensors of some shapes whose steps are only counted."""

    def __init__(self, code: Code, shapes: Sequence[tuple[int, ...]], **options: Any) -> None:
        self.recorder = Recorder(code)
        self.params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.optimizer = Lamb16(self.params, lr=1e-3, weight_decay=0.01, compile=self.recorder, **options)
        self.eager: list[Eager] = []  # of the last step: operations outside the graphs

    def step(self) -> list[tuple[str, Launch]]:
        """Make one step; returns its launches."""
        self.recorder.clear()
        with EagerOperations() as eager:
            self.optimizer.step()
        self.eager = eager.seen + self.recorder.copied
        return self.recorder.launches


def copying(block: Block, unpack: bool) -> Launch:
    """The launch of the copying kernel: it reads and writes as much as the packed buffer holds."""
    copied = {k: x for k, x in zip("pgmv", memory(block), strict=True) if k != "g" or not unpack}
    moved = {f"{side}_ptr_{k}": x for side in ("in", "out") for k, x in copied.items()}
    return Launch("copy_packed_rows", moved | {"UNPACK": unpack})


def report(code: Code, title: str, shapes: Sequence[tuple[int, ...]]) -> Report:
    """Count one step over parameters of these shapes, and compile every kernel that it launches."""
    steps = CountedSteps(code, shapes)
    steps.step()
    launched = steps.step()
    params = sum(p.numel() for p in steps.params)
    moved = sum(launch.bytes_read + launch.bytes_written for _, launch in launched)
    moved += sum(operation.bytes_moved for operation in steps.eager)
    kernels = _kernels(steps.recorder, launched)
    return Report(
        arch=f"sm_{code.capability}",
        shapes=title,
        tensors=len(steps.params),
        params=params,
        launches=len(launched) + sum(operation.launches for operation in steps.eager),
        bytes_per_param=moved / params,
        slots_per_param=sum(sum(kernel["slots"].values()) for kernel in kernels) / params,
        spills=sum(kernel["spills"] for kernel in kernels),
        fallbacks=[f"{name}: {call}" for name, used in steps.recorder.used.items() for call in used.fallbacks],
        eager=[asdict(operation) for operation in steps.eager],
        kernels=kernels,
    )


def _kernels(recorder: Recorder, launched: list[tuple[str, Launch]]) -> list[dict[str, Any]]:
    """One row per kernel: how often it is launched in the step, what it moves, what it executes, what it needs."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, launch in launched:
        key = name, launch.kernel
        kernel = None if name == COPIES else recorder.used[name].kernels[launch.kernel]
        if key not in rows:
            needs = asdict(recorder.code.resources(kernel))
            rows[key] = {
                "graph": name, "kernel": launch.kernel, "launches": 0, "read": 0, "written": 0, **needs,
                "slots": {}, "exact": True,
            }  # fmt: skip
        row, slots = rows[key], recorder.code.slots(kernel, launch)
        row["launches"] += 1
        row["read"] += launch.bytes_read
        row["written"] += launch.bytes_written
        row["slots"] = sass.add(row["slots"], slots.by_pipe)
        row["exact"] &= slots.exact
    return list(rows.values())


def work(found: Mapping[str, Any]) -> list[gpus.Work]:
    """What every kernel of a report does per parameter of the step, and the operations outside the graphs."""
    params = found["params"]
    kernels = [
        gpus.Work((row["read"] + row["written"]) / params, {k: x / params for k, x in row["slots"].items()})
        for row in found["kernels"]
    ]
    return kernels + [gpus.Work(row["bytes_moved"] / params, {}) for row in found["eager"]]
