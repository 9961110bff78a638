"""Machine code of a kernel: which instructions a thread executes, by the pipe that they go to.

A cubin is disassembled by the ``nvdisasm`` that comes with Triton. Nothing runs: paths through the code are followed on
paper. A warp instruction takes one issue slot whether its threads are switched off by a predicate or not, so predicated
instructions count as executed. Not executed are the slow paths of IEEE division and root, which ptxas puts in
subroutines of their own and which a warp enters only for operands near the ends of float32's range, and failed
assertions.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Where instructions go, by opcode without modifiers. What the pipes execute: "Pipelines" in the Kernel Profiling Guide
# of Nsight Compute, https://docs.nvidia.com/nsight-compute/ProfilingGuide/. Of these names
#   packed    are two float32 operations in one instruction;
#   multiply  are integer multiply-adds, which the pipe of the float32 ones executes; ptxas moves and shifts with them;
#   integer   is the arithmetic logic unit, which compares and selects floats too;
#   uniform   are the uniform datapath, constants and special registers: one instruction per warp, of whose rate nothing
#             is published.
PIPES = {
    "fp32": "FADD FADD32I FFMA FFMA32I FMUL FMUL32I HADD2 HFMA2 HMUL2",
    "packed": "FADD2 FFMA2 FMUL2",
    "multiply": "IDP IMAD IMUL",
    "integer": """
        BMSK F2FP FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2 IABS IADD IADD3 IADD32I ICMP IMNMX ISETP LEA LOP LOP3
        MOV MOV32I P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VABSDIFF4 VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE
    """,
    "fp64": "DADD DFMA DMNMX DMUL DSETP",
    "conversion": "F2F F2I FRND I2F I2FP I2I I2IP",
    "special": "BREV FCHK FLO MUFU POPC",
    "shuffle": "SHFL",
    "reduce": "CREDUX REDUX",
    "memory": "ATOM ATOMG ATOMS CCTL LD LDG LDGSTS LDL LDS LDSM MATCH QSPC RED ST STG STL STS STSM",
    "uniform": """
        CS2R LDC LDCU R2UR S2R S2UR UBMSK UBREV UFLO UIADD3 UIMAD UISETP ULDC ULEA ULOP ULOP3 UMOV UP2UR UPLOP3 UPOPC
        UPRMT UR2UP USEL USGXT USHF USHL USHR UVIADD UVIMNMX UVIMNMX3 VOTEU
    """,
    "control": """
        BAR BMOV BPT BRA BREAK BRX BRXU BSSY BSYNC CALL DEPBAR ERRBAR EXIT JMP JMX KILL LDGDEPBAR LEPC MEMBAR NANOSLEEP
        NOP PREEXIT RET WARPSYNC YIELD
    """,
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}
OTHER = "other"  # the pipe of opcodes that are not in the table, which take an issue slot like all
LOADS = ("LD", "LDG", "LDGSTS")
MOST_PATHS = 4096


@dataclass(frozen=True)
class Instruction:
    """One instruction; the address is in bytes from the function's beginning, the predicate "@P0", "@!P0" or none."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """The pipe that executes it; :data:`OTHER` for an opcode that is not known."""
        return PIPE_OF.get(self.base, OTHER)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands) if self.base == "BRA" else []
        return int(found[-1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may fall through: by its predicate, or by one among its operands."""
        return self.predicate not in ("", "@PT") or "," in self.operands


@dataclass(frozen=True)
class Function:
    """A kernel, and the subroutines that it calls by their names."""

    instructions: list[Instruction]
    subroutines: dict[str, list[Instruction]] = field(default_factory=dict)


@dataclass(frozen=True)
class Path:
    """A way through a kernel: the instructions that a thread executes, by pipe, and how many branches come before it.

    ``branches`` are those in front of the first load from global memory: the questions that a combined kernel asks to
    find out which of its parts a block is of.
    """

    slots: Counter[str]
    branches: int

    @property
    def total(self) -> int:
        """Instructions per thread."""
        return sum(self.slots.values())


def disassemble(cubin: bytes) -> Function:
    """The code of the one kernel in a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-json", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> Function:
    """What ``nvdisasm -json`` printed for a cubin of one kernel."""
    _, functions = json.loads(text)
    found = {}
    for function in functions:
        lines = enumerate(function["sass-instructions"])
        found[function["function-name"]] = [
            Instruction(16 * k, x.get("predicate", ""), x["opcode"], x.get("operands", "")) for k, x in lines
        ]
    kernels = [name for name in found if not name.startswith("$")]
    if len(kernels) != 1:
        raise ValueError(f"one kernel is expected, not {kernels}")
    return Function(found.pop(kernels[0]), found)


class Graph:
    """The control flow of a function: blocks by the address of their first instruction."""

    def __init__(self, function: Function) -> None:
        code = function.instructions
        starts = {0} | {x.target for x in code if x.target is not None}
        starts |= {x.address + 16 for x in code if _ends(x)}
        self.blocks: dict[int, list[Instruction]] = {}
        for x in code:
            if x.address in starts:
                self.blocks[x.address] = []
                start = x.address
            self.blocks[start].append(x)
        self.successors = {start: self._successors(block) for start, block in self.blocks.items()}
        self.back: list[tuple[int, int]] = []  # edges that close a loop, by the loop's address
        self._find_loops(0, [], set())
        self.back.sort(key=lambda edge: edge[1])
        self.calls = {start: [_callee(x) for x in block if x.base == "CALL"] for start, block in self.blocks.items()}

    def _successors(self, block: list[Instruction]) -> list[int]:
        last = block[-1]
        after = [last.address + 16] if last.address + 16 in self.blocks else []
        if last.target is not None:
            if not last.conditional:
                return [last.target] if last.target != last.address else []
            return [last.target, *after]
        return [] if last.base in ("EXIT", "RET") and not last.conditional else after

    def _find_loops(self, start: int, above: list[int], done: set[int]) -> None:
        done.add(start)
        for after in self.successors.get(start, []):
            if after in (*above, start):
                self.back.append((start, after))
            elif after not in done:
                self._find_loops(after, [*above, start], done)

    def without_loops_and_slow_paths(self) -> dict[int, list[int]]:
        """The successors of every block, without ways back and without what leads only into what is not executed."""
        forward = {
            start: [after for after in dict.fromkeys(successors) if (start, after) not in self.back]
            for start, successors in self.successors.items()
        }
        dead = {
            start
            for start, block in self.blocks.items()
            if any("slowpath" in name for name in self.calls[start])
            or block[-1].opcode.startswith("CALL.ABS")  # of an assertion's message
            or block[-1].target == block[-1].address  # for ever
        }
        for start in self.last_first(forward):
            if forward[start] and dead.issuperset(forward[start]):
                dead.add(start)
        return {start: [x for x in after if x not in dead] for start, after in forward.items()}

    @staticmethod
    def last_first(forward: Mapping[int, Sequence[int]]) -> list[int]:
        """The blocks, each after all its successors; those that cannot be reached are left out."""
        order: dict[int, None] = {}
        rest = [(0, False)]
        while rest:
            start, done = rest.pop()
            if done:
                order[start] = None
            elif start not in order:
                rest += [(start, True), *((after, False) for after in forward[start])]
        return list(order)

    def loop(self, latch: int, header: int) -> set[int]:
        """The blocks of the loop that an edge from ``latch`` back to ``header`` closes."""
        before: dict[int, list[int]] = {}
        for start, successors in self.successors.items():
            for after in successors:
                before.setdefault(after, []).append(start)
        found, rest = {header}, [latch]
        while rest:
            start = rest.pop()
            if start not in found:
                found.add(start)
                rest += before.get(start, [])
        return found


def paths(function: Function, trips: Sequence[int] = ()) -> list[Path]:
    """The ways to a kernel's first load from global memory, each with the longest way from there to an exit.

    ``trips`` are how often the loops are gone through, one number per loop in the order of their addresses; the code of
    a loop counts so often. What a branch jumps over counts as executed, but for slow paths. A predicated exit, by which
    some threads of a block leave, is passed: another thread of the warp goes on.
    """
    graph = Graph(function)
    if len(trips) != len(graph.back):
        raise ValueError(f"the code has {len(graph.back)} loops, and {len(trips)} trip counts were given")
    weight = dict.fromkeys(graph.blocks, 1)
    for count, (latch, header) in zip(trips, graph.back, strict=True):
        for start in graph.loop(latch, header):
            weight[start] *= count
    cost = {start: Counter[str]() for start in graph.blocks}
    for start, block in graph.blocks.items():
        called = [x for name in graph.calls[start] for x in function.subroutines.get(name, [])]
        for x in (*block, *called):
            cost[start][x.pipe] += weight[start]
    forward = graph.without_loops_and_slow_paths()
    longest: dict[int, Counter[str]] = {}
    for start in graph.last_first(forward):
        rest = [longest[after] for after in forward[start]]
        longest[start] = cost[start] + max(rest, key=lambda slots: sum(slots.values()), default=Counter())
    found: list[Path] = []
    ways: list[tuple[int, Counter[str], int]] = [(0, Counter(), 0)]
    while ways:
        start, slots, branches = ways.pop()
        if any(x.base in LOADS for x in graph.blocks[start]):
            found.append(Path(slots + longest[start], branches))
            continue
        after = forward[start]
        ways += [(x, slots + cost[start], branches + (len(after) > 1)) for x in after]
        if len(found) + len(ways) > MOST_PATHS:
            raise ValueError(f"more than {MOST_PATHS} ways to the first load")
    return sorted(found, key=lambda path: (path.branches, path.total))


def loops(function: Function) -> int:
    """How many loops the code has: as many trip counts :func:`paths` needs."""
    return len(Graph(function).back)


def per_thread(found: Sequence[Path], weights: Sequence[int] = (1,)) -> dict[str, float]:
    """Instructions of a thread by pipe, on average over the blocks of a launch.

    ``weights`` are the numbers of blocks of a combined kernel's parts, in their order: its code asks for one part after
    the other whether the block is of it, so that before a later part lie more branches. Of the last two parts, which
    differ by one question, the longer way counts as the last one's. Of a kernel with one part the longest way counts.
    """
    ways = [max(found, key=lambda path: path.total)] if len(weights) == 1 else found
    if len(ways) != len(weights):
        raise ValueError(f"{len(ways)} ways through the code, for {len(weights)} parts")
    total: Counter[str] = Counter()
    for path, weight in zip(ways, weights, strict=True):
        for pipe, count in path.slots.items():
            total[pipe] += count * weight
    return {pipe: total[pipe] / sum(weights) for pipe in (*PIPES, OTHER)}


def add(*parts: Mapping[str, float]) -> dict[str, float]:
    """Slots by pipe, summed."""
    return {pipe: sum(part.get(pipe, 0.0) for part in parts) for pipe in (*PIPES, OTHER)}


def _ends(x: Instruction) -> bool:
    """Whether a block ends with an instruction."""
    return x.base in ("BRA", "EXIT", "RET", "CALL", "BRX", "JMP")


def _callee(x: Instruction) -> str:
    return x.operands.split("`(")[-1].rstrip(")")
