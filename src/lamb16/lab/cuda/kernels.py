"""Reading generated code: its Triton kernels, as cubins, in Triton's interpreter, or only counted."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lamb16.step.kinds import Graph, Kind

from . import fake, sass


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name, its arguments by name."""

    kernel: str
    arguments: dict[str, Any]

    @property
    def bytes_read(self) -> int:
        """The bytes of all tensors that the kernel reads; each is read once."""
        return self._bytes("in_")

    @property
    def bytes_written(self) -> int:
        """The bytes of all tensors that the kernel writes."""
        return self._bytes("out_", "in_out_")

    def _bytes(self, *prefixes: str) -> int:
        return sum(
            x.nbytes for name, x in self.arguments.items() if isinstance(x, Tensor) and name.startswith(prefixes)
        )


@dataclass(frozen=True)
class Resources:
    """What a kernel needs on an architecture, by ptxas; memory in bytes per block (shared) or thread (the others)."""

    registers: int
    spills: int
    shared: int
    ptx_lines: int


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for an architecture."""

    resources: Resources
    cubin: bytes
    threads: int  # of a block

    @functools.cached_property
    def code(self) -> sass.Function:
        """Its machine code."""
        return sass.disassemble(self.cubin)


@dataclass(frozen=True)
class Slots:
    """Issue slots of a launch, counted per thread: a warp instruction has 32.

    ``exact``: whether the way of every block is known. Otherwise all take the longest, and loops may count too often.
    """

    by_pipe: dict[str, float]
    exact: bool


class Kernel:
    """A Triton kernel with the block sizes that Inductor starts from."""

    def __init__(self, name: str, tuner: Any) -> None:
        self.name, self.tuner = name, tuner
        self.config = tuner.configs[0]
        self.binaries: dict[int, Binary] = {}

    def bind(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """The positional arguments of a launch by their names."""
        names = [name for name in self.tuner.fn.arg_names if name not in self.config.kwargs]
        return dict(zip(names, arguments, strict=False))

    def grid(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        """How many blocks Inductor would launch."""
        from torch._inductor.runtime.triton_heuristics import GridExpr

        expression = GridExpr.from_meta(self.tuner.inductor_meta, self.config)
        values = dict(arguments)
        for line in expression.prefix:
            exec(line, {}, values)
        x, y, z = (int(eval(str(g), {}, values)) for g in (expression.x_grid, expression.y_grid, expression.z_grid))
        return x, y, z

    def parts(self, arguments: dict[str, Any]) -> list[int]:
        """How many blocks Inductor would launch for each of the kernels that are combined in this one."""
        blocks = math.prod(self.grid(arguments))
        meta = self.tuner.inductor_meta.get("combo_grid_meta")
        if meta is None:
            return [blocks]
        parts = []
        for k in range(meta["num_kernels"]):
            rows = meta[f"xnumel_{k}"] or arguments[f"xnumel_{k}"]
            block = self.config.kwargs.get(f"XBLOCK_{k}", self.config.kwargs.get("XBLOCK", 1))
            parts.append(rows if meta[f"no_x_dim_{k}"] else -(-rows // block))
        return parts if sum(parts) == blocks else [blocks]

    def slots(self, arguments: dict[str, Any], capability: int) -> Slots:
        """Issue slots of a launch. To be called within :func:`fake.device`.

        A reduction's loops are gone through as often as its length and its block size say, which is more often than
        they are where the assembler made several rounds of the source's loop one.
        """
        binary = self.binary(capability)
        loops = sass.loops(binary.code)
        lengths = [x for name, x in arguments.items() if name.startswith("r0_numel")]
        rounds = -(-max(lengths, default=1) // self.config.kwargs.get("R0_BLOCK", 1))
        parts = self.parts(arguments)
        ways = sass.paths(binary.code, [rounds] * loops)
        exact = len(ways) == len(parts) and not loops
        each = sass.per_thread(ways, parts if len(ways) == len(parts) else [sum(parts)])
        return Slots({pipe: n * binary.threads * sum(parts) for pipe, n in each.items()}, exact)

    def resources(self, capability: int) -> Resources:
        """What it needs on an architecture; to be called within :func:`fake.device`."""
        return self.binary(capability).resources

    def binary(self, capability: int) -> Binary:
        """Compile it to PTX and to a cubin with the bundled ptxas, once; to be called within :func:`fake.device`."""
        if capability not in self.binaries:
            meta = self.tuner._create_compile_meta(self.config)
            options = self.tuner._create_compile_options(self.config, meta)
            self.binaries[capability] = assemble(
                self.tuner.fn,
                meta["signature"],
                meta["constants"],
                capability,
                attributes=meta["configs"][0],
                options=options,
            )
        return self.binaries[capability]


def assemble(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    attributes: Any = None,
    options: dict[str, Any] | None = None,
) -> Binary:
    """Compile a Triton function. To be called within :func:`fake.device`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(function, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert binary.asm["cubin"]
    registers, spills = _ptxas(binary.asm["ptx"], capability)
    needs = Resources(registers, spills, int(binary.metadata.shared), binary.asm["ptx"].count("\n"))
    return Binary(needs, binary.asm["cubin"], 32 * int(binary.metadata.num_warps))


def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread, and bytes spilled (stores and loads), as the assembler reports them."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={target[1]}", str(file), "-o", str(file.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    return int(registers[1]), sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


class Program:
    """The generated code of one graph: a function of the step function's arguments, and its kernels."""

    def __init__(self, name: str, generated: fake.Generated) -> None:
        """To be called within :func:`fake.device`."""
        self.name, self.generated, code = name, generated, generated.code
        self.kernels: dict[str, Kernel] = {}
        self.launches: list[Launch] = []
        self.copies: list[Tensor] = []  # arguments of the last call that would be copied, since they are not aligned
        self.interpret = False
        self.device = torch.device("meta")
        self.namespace: dict[str, Any] = {"__name__": "generated", "__file__": name}
        with mock.patch("torch._inductor.async_compile.AsyncCompile") as compiler:
            compiler.return_value.triton = self._load
            exec(compile(code, f"<{name}>", "exec"), self.namespace)
        self.namespace.update(
            get_raw_stream=lambda _: 0,
            empty_strided_cuda=self._empty,
            copy_if_misaligned=lambda x: x,
        )
        self.fallbacks = sorted(set(re.findall(r"(?:torch\.ops|aten|extern_kernels)\.[\w.]+(?=\()", _calls(code))))

    def _load(self, name: str, source: str, device_str: str = "cuda") -> Any:
        from torch._inductor.codecache import PyCodeCache

        self.kernels[name] = Kernel(name, getattr(PyCodeCache.load(source), name))
        launcher = mock.Mock()
        launcher.run = functools.partial(self._launch, self.kernels[name])
        return launcher

    def _empty(self, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty_strided(size, stride, dtype=dtype, device=self.device)
        tensor.temporary = True  # type: ignore[attr-defined]  # for those who count
        return tensor

    def _launch(self, kernel: Kernel, *arguments: Any, stream: int) -> None:
        bound = kernel.bind(arguments)
        self.launches.append(Launch(kernel.name, bound))
        if self.interpret:
            kernel.tuner.fn[kernel.grid(bound)](**bound, **kernel.config.kwargs)

    def __call__(self, *arguments: Any, interpret: bool = False) -> list[Launch]:
        """Call it with the step function's arguments; returns what was launched.

        On meta tensors nothing is computed. With ``interpret`` the kernels run on CPU tensors, in a process in which
        TRITON_INTERPRET=1 was set before Triton was imported.
        """
        self.launches, self.interpret = [], interpret
        self.device = torch.device("cpu" if interpret else "meta")
        received = self.generated.arguments(arguments)
        expected = zip(received, self.generated.aligned, strict=True)
        self.copies = [x for x, aligned in expected if aligned and not fake.is_aligned(x)]
        with _no_device():
            self.namespace["call"](received)
        return self.launches


def _calls(code: str) -> str:
    """The part of the generated code that runs at every call."""
    return code[code.index("def call(") :].split("\ndef ")[0]


@contextlib.contextmanager
def _no_device() -> Iterator[None]:
    with mock.patch.object(torch.cuda, "_DeviceGuard"), mock.patch.object(torch.cuda, "set_device"):
        yield


def program(graph: Graph, of: Kind, capability: int) -> Program:
    """Generate and read a graph's code."""
    generated = fake.generate(graph, of, capability)
    with fake.device(capability):
        return Program(graph.name, generated)
