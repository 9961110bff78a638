"""The generated code of the step for CPUs: one loop over memory, vectors throughout, nothing made twice per row."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import sizevars

from generated import ISAS, generate, innermost, kernel, nests
from lamb16.step import examples, graph_code, inductor, update
from lamb16.step.kinds import GRAPHS, Graph, Kind

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
KINDS = {
    "float32": Kind(CPU),
    "caution": Kind(CPU, caution=True),
    "FP32 moments": Kind(CPU, float8=False),
    "bfloat16": Kind(CPU, torch.bfloat16, torch.bfloat16),
    "stochastic bfloat16": Kind(CPU, torch.bfloat16, torch.bfloat16, rounding="stochastic"),
    "stochastic float16": Kind(CPU, torch.float16, torch.float16, rounding="stochastic"),
    "exact bfloat16": Kind(CPU, torch.bfloat16, torch.bfloat16, rounding="exact"),
}
READING = [graph for graph in GRAPHS if graph.function in ("inspect", "update")]
CASES = {f"float32 {graph.name}": (graph, "float32") for graph in READING} | {
    f"{kind} update": (Graph("update"), kind) for kind in KINDS if kind != "float32"
}
CASES |= {f"exact {graph.name}": (graph, "exact bfloat16") for graph in GRAPHS[:2]}
ELEMENTWISE = re.compile(r"tmpbuf|std::array|for \(int(?:64_t)? i\b")
TWO_CASTS = "for (int i = 0; i < 2; i++)"  # of registers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_memory_is_read_in_one_loop_of_vectors(case: str, isa: str) -> None:
    graph, kind = CASES[case]
    code = generate(graph, graph.kind(KINDS[kind]), isa)
    found = nests(kernel(code))
    streaming = [nest for nest in found if re.search(r"\d+L\*x0", nest)]
    # The checksum of the weights, which needs nothing of the gradients, is a loop of its own over them.
    assert len(streaming) == (2 if graph.function == "inspect" and KINDS[kind].exact else 1)
    for nest in streaming:
        body = innermost(nest)
        assert "at::vec::" in body
        assert not ELEMENTWISE.search(body.replace(TWO_CASTS, ""))
        if not graph.global_index:  # whose indices are counted in float64
            assert "tmpbuf" not in nest
        streams = {"inspect": 1, "update": 4}[graph.function]
        assert len(re.findall(r"x1 \+ \d+L\*x0", body)) >= streams
        assert not re.search(r"in_ptr\d+\[", body)  # no scalar is loaded there
    assert not any("sqrt" in nest for nest in found if nest not in streaming)  # which copy the rows' results
    if not graph.packed:  # where codes go through a temporary
        assert not re.search(r"empty_strided_cpu\(\(\w+, \d", code)  # no temporary but one number per row


@pytest.mark.parametrize("isa", ISAS)
def test_the_help_is_needed(isa: str) -> None:
    """When one of these fails torch does it by itself: the part of inductor.py can go."""
    update = Graph("update")
    plain = kernel(generate(update, KINDS["float32"], isa, helped=False))
    body = innermost(nests(plain)[0])
    assert "tmpbuf" in body  # float32 as int32, copied element by element
    assert re.search(r"Vectorized<uint8_t>::loadu\(.*, static_cast<int64_t>\(\d+\)\)", body)
    assert re.search(r"in_ptr\d+\[", body)
    of_int16 = kernel(generate(update, KINDS["exact bfloat16"], isa, helped=False))
    assert "at::vec::" not in innermost(nests(of_int16)[0])
    in_parts = nests(kernel(generate(update, KINDS["float32"], isa, one_loop=False)))
    assert sum(bool(re.search(r"1024L\*x0", nest)) for nest in in_parts) > 1


@pytest.mark.parametrize("helped", [True, False])
def test_the_code_is_the_same_for_any_number_of_threads(helped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is without our option too, ``cpp.threads`` can go."""
    original, threads = inductor.options, torch.get_num_threads()
    if not helped:
        monkeypatch.setattr(
            inductor, "options", lambda *given: {k: v for k, v in original(*given).items() if k != "cpp.threads"}
        )
    graph, found = Graph("gather"), []
    try:
        for count in (1, 2, 3) if helped else (1, 2):
            torch.set_num_threads(count)
            found.append(kernel(generate.__wrapped__(graph, graph.kind(KINDS["float32"]), "avx2")))
    finally:
        torch.set_num_threads(threads)
    assert ("#pragma omp single" in found[0]) == helped
    assert (len(set(found)) == 1) == helped


def test_without_the_pass_the_code_is_right_too() -> None:
    """What is compiled where one loop turns out to be wrong."""
    graph, kind = Graph("update"), KINDS["float32"]
    code = graph_code.compile_on(examples.example_inputs(graph, kind), graph, kind, one_loop=False)
    first, second = (examples.random_inputs(graph, kind) for _ in range(2))
    code(first)
    update.update(*second)
    blocks = [[x for block in given[0] for x in block[:4]] for given in (first, second)]
    assert all(torch.equal(x, y) for x, y in zip(*blocks, strict=True))


def test_nothing_is_moved_between_collapsed_loops() -> None:
    loop = "for(int64_t x1=0; x1<8; x1+=1)\n{\n    auto tmp0 = 1;\n}"
    plain = "at::vec::\n#pragma omp for\nfor(int64_t x0=0; x0<8; x0+=1)\n{\n" + loop + "\n}"
    assert inductor.cpu_code(inductor.INCLUDE + plain) != inductor.INCLUDE + inductor.HELPERS + plain
    collapsed = plain.replace("omp for", "omp for collapse(2)")
    assert inductor.cpu_code(inductor.INCLUDE + collapsed) == inductor.INCLUDE + inductor.HELPERS + collapsed


@pytest.mark.parametrize("kind", ["float32", "exact bfloat16"])
def test_work_done_once_gives_the_same_code(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph("update", packed=kind != "exact bfloat16")
    sizevars.stride_at_vec_range.cache_clear()
    quick = generate.__wrapped__(graph, KINDS[kind], "avx2")
    sizevars.stride_at_vec_range.cache_clear()
    monkeypatch.setattr(inductor, "done_once", contextlib.nullcontext)
    slow = generate.__wrapped__(graph, KINDS[kind], "avx2")
    assert slow.split("\n")[1:] == quick.split("\n")[1:]  # the first line numbers it


def test_what_is_not_understood_stays() -> None:
    other = "int main() { auto tmp0 = at::vec::other(1); }"
    assert inductor.cpu_code(other) == other


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor with AVX-512")
def test_the_bits_do_not_depend_on_the_instruction_set() -> None:
    """The tests that hold the compiled step to the reference, with AVX2's code."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_optimizer.py",
        "-k",
        "follows_the_reference and compiled",
    ]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


FLAGS = {"avx2": "-march=x86-64-v3 -DCPU_CAPABILITY_AVX2", "avx512": "-march=x86-64-v4 -DCPU_CAPABILITY_AVX512"}
MOST = {"avx2": 125, "avx512": 115}  # instructions of the loop that makes 8, or 16, elements


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_compiler_makes_one_tight_loop(compiler: str, isa: str, tmp_path: Path) -> None:
    if not shutil.which(compiler) or not shutil.which("objdump"):
        pytest.skip(f"no {compiler}, or no objdump")
    torch_include = Path(torch.__file__).parent / "include"
    source, built = tmp_path / "kernel.cpp", tmp_path / "kernel.o"
    source.write_text(kernel(generate(Graph("update"), KINDS["float32"], isa)).split("// Python bindings")[0])
    command = [
        compiler, "-c", "-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math", "-w",
        *FLAGS[isa].split(), "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DSTANDALONE_TORCH_HEADER",
        f"-I{torch_include}", f"-I{torch_include}/torch/csrc/api/include", "-o", str(built), str(source),
    ]  # fmt: skip
    if compiler == "g++":
        command.insert(1, "-fno-tree-loop-vectorize")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "omp.h" in done.stderr and "not found" in done.stderr:
        pytest.skip(f"{compiler} has no OpenMP")
    assert not done.returncode, done.stderr
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(built)], capture_output=True, text=True)
    loop = loop_around(listing.stdout, "vsqrtps")
    opcodes = [line.split()[0] for line in loop]
    assert len(loop) <= MOST[isa], opcodes
    assert not [x for x in opcodes if x.startswith(("vpextr", "vpinsr", "call", "vmovss", "div", "idiv"))]
    register = {"avx2": "%ymm", "avx512": "%zmm"}[isa]
    assert sum("vsqrtps" in line and register in line for line in loop) in (1, 2)  # unrolled once by clang


def loop_around(listing: str, opcode: str) -> list[str]:
    """The instructions of the smallest loop around the first one of this opcode on vectors."""
    found = re.findall(r"^ *([0-9a-f]+):\s+(.*)$", listing, re.MULTILINE)
    lines = [(int(address, 16), text.split("#")[0].strip()) for address, text in found]
    at = next(k for k, (_, text) in enumerate(lines) if text.startswith(opcode))
    for k in range(at, len(lines)):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", lines[k][1])
        if jump and int(jump[1], 16) <= lines[at][0] and int(jump[1], 16) > lines[at][0] - 0x2000:
            start = next(i for i, (address, _) in enumerate(lines) if address == int(jump[1], 16))
            return [text for _, text in lines[start : k + 1]]
    raise AssertionError("no loop")
