"""What Inductor is told, and where it is helped: the places at which its code for our step would be slow.

1. **One loop.** Inductor fuses a reduction into the loop of a store only if it meets the store first, but
   functionalization moves all stores into arguments to the end of the graph: the step would read everything twice. The
   pass :class:`ReductionsLast` moves the reductions behind the stores. The optimizer's graphs store to arguments that
   are the inputs' memory once more, so the one loop reads each element before it writes it; were it not one loop,
   reductions would see what is new. ``graph_code.py`` therefore tries the code before it is used, and does without the
   help if it is wrong.
2. **Casts.** ``Tensor.view(dtype)`` between float32 and int32, a load of fewer bytes than a register has, and int32 to
   uint8 are generated for CPUs as arrays copied element by element. :func:`cpu_code` makes them what they are:
   nothing, one instruction, and a few. A loop with int16 in it has no vectors at all, until :func:`vector_casts` knows
   the type.
3. **Invariants.** What does not change along a row is loaded and broadcast again for each vector, since the compiler
   must fear that a store of bytes changes it. :func:`cpu_code` moves such lines in front of the loop.
4. **Stores in place.** The exported step stores into its inputs. What is computed from these and needed later, here by
   reductions, Inductor makes temporaries of, and then fuses one reduction with what computes them. With
   :func:`fused_reductions` it fuses all: the temporaries are never stored.
5. **Outer loops.** Inductor's fusion of outer loops generates all code, finds that the loops do not fit, and generates
   it again: a quarter of the time to the first step. :func:`cpu_help` switches it off. What else Inductor does again
   and again, ``repeated_work.py`` has it do once.

docs/inductor.md has a minimal example of each, for PyTorch's tracker. What :func:`cpu_code` does it does to the text of
the generated code: where a later Inductor writes another text, the code stays as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from .repeated_work import done_once

REDUCTIONS = {torch.ops.aten.amax.default, torch.ops.aten.sum.dim_IntList}
VECTOR_TYPES = {torch.float32: "float", torch.int32: "int32_t"}
INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
# C++ that generated code may call. `load` takes N elements, `stream` fetches what is a row of 1,024 ahead too, `bytes`
# converts int32 to uint8 and `integers` back, `narrowed` to int16 and `widened` back, `kept` is its argument, of which
# the compiler is not to know that it is a constant: it would make it anew for each vector.
HELPERS = """
#ifndef LAMB16
#define LAMB16
namespace lamb16 {
using at::vec::Vectorized;
template <typename T> using Two = at::vec::VectorizedN<T, 2>;
template <typename T, int N> inline Vectorized<T> load(const T* p) {
    constexpr int size = N * sizeof(T);
    if constexpr (size == sizeof(Vectorized<T>)) return Vectorized<T>::loadu(p);
#if defined(CPU_CAPABILITY_AVX512)
    else if constexpr (size == 32) return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    else if constexpr (size == 16) return _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
#elif defined(CPU_CAPABILITY_AVX2)
    else if constexpr (size == 16) return _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p));
    else if constexpr (size == 8) return _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)p));
#endif
    else return Vectorized<T>::loadu(p, N);
}
template <typename T, int N> inline Vectorized<T> stream(const T* p) {
    __builtin_prefetch(p + 1024);
    return load<T, N>(p);
}
template <typename T, int N> inline Two<T> load_two(const T* p) {
    return {load<T, N / 2>(p), load<T, N / 2>(p + N / 2)};
}
#if defined(CPU_CAPABILITY_AVX512)
inline Vectorized<uint8_t> bytes(__m512i x) { return _mm512_castsi128_si512(_mm512_cvtepi32_epi8(x)); }
inline Vectorized<uint8_t> bytes(const Two<int32_t>& x) {
    auto low = _mm256_castsi128_si256(_mm512_cvtepi32_epi8(x[0]));
    return _mm512_castsi256_si512(_mm256_inserti128_si256(low, _mm512_cvtepi32_epi8(x[1]), 1));
}
inline Two<int32_t> integers(__m512i x) {
    return {_mm512_cvtepu8_epi32(_mm512_castsi512_si128(x)), _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(x, 1))};
}
inline Vectorized<int32_t> widened(const Vectorized<int16_t>& x) {
    return _mm512_cvtepi16_epi32(_mm512_castsi512_si256(x));
}
inline Vectorized<int16_t> narrowed(const Vectorized<int32_t>& x) {
    return _mm512_castsi256_si512(_mm512_cvtepi32_epi16(x));
}
inline Two<int32_t> widened_two(const Vectorized<int16_t>& x) {
    return {_mm512_cvtepi16_epi32(_mm512_castsi512_si256(x)), _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(x, 1))};
}
inline Vectorized<int16_t> narrowed(const Two<int32_t>& x) {
    auto low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(x[0]));
    return _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(x[1]), 1);
}
inline Vectorized<float> kept(__m512 x) { asm("" : "+v"(x)); return x; }
inline Vectorized<int32_t> kept(__m512i x) { asm("" : "+v"(x)); return x; }
#elif defined(CPU_CAPABILITY_AVX2)
inline __m128i shorts(__m256i x) {
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline Vectorized<uint8_t> bytes(__m256i x) {
    return _mm256_castsi128_si256(_mm_packus_epi16(shorts(x), shorts(x)));
}
inline Vectorized<uint8_t> bytes(const Two<int32_t>& x) {
    return _mm256_castsi128_si256(_mm_packus_epi16(shorts(x[0]), shorts(x[1])));
}
inline Two<int32_t> integers(__m256i x) {
    auto low = _mm256_castsi256_si128(x);
    return {_mm256_cvtepu8_epi32(low), _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8))};
}
inline Vectorized<int32_t> widened(const Vectorized<int16_t>& x) {
    return _mm256_cvtepi16_epi32(_mm256_castsi256_si128(x));
}
inline __m128i low_halves(__m256i x) { return shorts(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF))); }
inline Vectorized<int16_t> narrowed(const Vectorized<int32_t>& x) { return _mm256_castsi128_si256(low_halves(x)); }
inline Two<int32_t> widened_two(const Vectorized<int16_t>& x) {
    return {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1))};
}
inline Vectorized<int16_t> narrowed(const Two<int32_t>& x) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low_halves(x[0])), low_halves(x[1]), 1);
}
inline Vectorized<float> kept(__m256 x) { asm("" : "+x"(x)); return x; }
inline Vectorized<int32_t> kept(__m256i x) { asm("" : "+x"(x)); return x; }
#else
inline Vectorized<uint8_t> bytes(const Vectorized<int32_t>& x) { return at::vec::convert<uint8_t>(x); }
inline Vectorized<uint8_t> bytes(const Two<int32_t>& x) { return at::vec::convert<uint8_t, 1, int32_t, 2>(x); }
inline Two<int32_t> integers(const Vectorized<uint8_t>& x) { return at::vec::convert<int32_t, 2, uint8_t, 1>(x); }
inline Vectorized<int32_t> widened(const Vectorized<int16_t>& x) { return at::vec::convert<int32_t>(x); }
inline Vectorized<int16_t> narrowed(const Vectorized<int32_t>& x) { return at::vec::convert<int16_t>(x); }
inline Two<int32_t> widened_two(const Vectorized<int16_t>& x) { return at::vec::convert<int32_t, 2, int16_t, 1>(x); }
inline Vectorized<int16_t> narrowed(const Two<int32_t>& x) { return at::vec::convert<int16_t, 1, int32_t, 2>(x); }
template <typename V> inline V kept(V x) { return x; }
#endif
}
#endif
"""


class ReductionsLast(CustomGraphPass):
    """Sorts nodes by the number of reductions on the way to them: a pass's stores come before its reductions."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        level: dict[torch.fx.Node, int] = {}
        *nodes, output = graph.nodes
        for node in nodes:
            level[node] = max((level[x] for x in node.all_input_nodes), default=0) + (node.target in REDUCTIONS)
        for node in sorted(nodes, key=level.__getitem__):  # stable
            output.prepend(node)

    def uuid(self) -> str:
        """For the cache of compiled graphs, which holds the code as :func:`cpu_code` left it.

        With the instruction set, for which the cache alone does not ask: code for AVX-512 crashes as AVX2's.
        """
        sources = [Path(__file__).with_name(name).read_bytes() for name in ("inductor.py", "repeated_work.py")]
        digest = hashlib.sha256(b"".join(sources)).hexdigest()
        return type(self).__name__ + torch.backends.cpu.get_cpu_capability() + digest


class Unchanged(ReductionsLast):
    """Leaves the order, and gives the cache its key."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Nothing to do."""


REDUCTIONS_LAST, UNCHANGED = ReductionsLast(), Unchanged()  # one object of each, so that equal options are equal


@contextlib.contextmanager
def vector_casts() -> Iterator[None]:
    """A context in which Inductor reinterprets vectors of float32 and int32 in registers, and has some of int16."""
    from torch._inductor.codegen import cpp
    from torch._inductor.codegen.cpp import CppVecOverrides
    from torch._inductor.virtualized import V

    original: Any = CppVecOverrides.to_dtype_bitcast
    convert: Any = CppVecOverrides.to_dtype

    def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> Any:
        if dtype in VECTOR_TYPES and src_dtype in VECTOR_TYPES and getattr(x, "is_vec", False):
            to, count = VECTOR_TYPES[dtype], V.kernel._get_num_vectors(dtype)
            if count == 1:
                return f"at::vec::cast<{to}>({x})"
            each = f"for (int i = 0; i < {count}; i++) y[i] = at::vec::cast<{to}>({x}[i]);"
            return f"[&]() {{ at::vec::VectorizedN<{to}, {count}> y; {each} return y; }}()"
        return original(x, dtype, src_dtype)

    def to_dtype(x: Any, dtype: torch.dtype, src_dtype: Any = None, use_compute_types: bool = True) -> Any:
        if torch.int16 not in (dtype, x.dtype):
            return convert(x, dtype, src_dtype, use_compute_types)
        two = V.kernel._get_num_vectors(torch.int32) == 2
        name = {torch.int16: "narrowed", torch.int32: "widened_two" if two else "widened"}[dtype]
        found = V.kernel.cse.generate(V.kernel.compute, f"lamb16::{name}({x})", dtype=dtype)
        found.update_on_args("to_dtype", (x, dtype), {"src_dtype": x.dtype})
        return found

    with (
        mock.patch.object(cpp, "VECTORIZABLE_DTYPES", [*cpp.VECTORIZABLE_DTYPES, torch.int16]),
        mock.patch.multiple(
            CppVecOverrides, to_dtype_bitcast=staticmethod(to_dtype_bitcast), to_dtype=staticmethod(to_dtype)
        ),
    ):
        yield


@contextlib.contextmanager
def fused_reductions() -> Iterator[None]:
    """A context in which Inductor's CPU code may have several reductions in the loop that computes what they read.

    Its fusion of outer loops alone is switched off: it cannot handle what comes of that.
    """
    from torch._inductor.codegen.cpp import CppScheduling

    original: Any = CppScheduling.can_fuse_vertical

    def can_fuse_vertical(self: Any, node1: Any, node2: Any) -> bool:
        return original(self, node1, node2) or (
            node1.is_reduction()
            and not (node1.is_template() or node2.is_template())
            and self._can_fuse_horizontal_impl(node1, node2)
            and not _needs_reduction(node1.get_nodes(), node2)
        )

    with mock.patch.multiple(
        CppScheduling, can_fuse_vertical=can_fuse_vertical, can_fuse_vertical_outer_loop=lambda *_: False
    ):
        yield


def _needs_reduction(nodes: Any, reader: Any) -> bool:
    """Whether one of the nodes that ``reader`` reads from is a reduction among them, or follows from one."""
    reductions = {node.get_name() for node in nodes if node.is_reduction()}
    names = {dep.name for dep in reader.read_writes.reads}
    read = [node for node in nodes if names & set(node.get_buffer_names())]
    return any(reductions & ({node.get_name()} | set(node.ancestors)) for node in read)


def cpu_code(code: str) -> str:
    """Generated C++ with what is said above under 2 and 3."""
    if INCLUDE not in code or "at::vec::" not in code:
        return code
    code = LOAD.sub(load, code)
    code = TO_BYTES.sub("lamb16::bytes(", code)
    code = code.replace("at::vec::convert<int32_t,2,uint8_t,1>(", "lamb16::integers(")
    lines = code.split("\n")
    for k in reversed(range(len(lines))):
        pragma = next((line for line in reversed(lines[:k]) if "#pragma" in line), "")
        if (loop := LOOP.match(lines[k])) and pragma is not lines[k - 1] and "collapse(" not in pragma:
            end = next(i for i in range(k, len(lines)) if lines[i] == f"{loop[1]}}}")
            lines[k:end] = with_invariants_first(loop[2], lines[k:end])
    return "\n".join(lines).replace(INCLUDE, INCLUDE + HELPERS, 1)


def load(found: re.Match[str]) -> str:
    """The call that loads a vector; but for codes the next row too of what depends on two variables, read once."""
    kind, two, address, count = found.groups()
    if two:
        return f"lamb16::load_two<{kind}, {count}>({address})"
    function = "stream" if kind != "uint8_t" and len(set(re.findall(r"\bx\d+\b", address))) > 1 else "load"
    return f"lamb16::{function}<{kind}, {count}>({address})"


LOAD = re.compile(
    r"at::vec::VectorizedN?<(float|uint8_t|int(?:32|16)_t|at::BFloat16|at::Half)(,2)?>"
    r"::loadu\(([^,]*), static_cast<int64_t>\((\d+)\)\)"
)
TO_BYTES = re.compile(r"at::vec::convert<uint8_t(?:,1,int32_t,2)?>\(")
LOOP = re.compile(r"( *)for\(int64_t (x\d+)=")
WRITTEN = re.compile(r"out_ptr|tmp_acc|\bx\d+_|\[&\]")  # what may vary beside names that are assigned
STATEMENT = re.compile(r" *(?:auto (tmp\d+) = |TORCH_CHECK\()(.*);$")
BROADCAST = re.compile(r"(at::vec::Vectorized<(?:float|int32_t)>\(\w+\));$")


def with_invariants_first(variable: str, loop: list[str]) -> list[str]:
    """The lines of an innermost loop over ``variable`` behind those of its statements that do not depend on it."""
    if any(LOOP.match(line) for line in loop[1:]) or any("C10_UNLIKELY" in line for line in loop):
        return loop
    varying, first, rest = {variable}, [], []
    shifts = {x for line in loop for x in re.findall(r"(?:<<|>>) (tmp\d+)", line)}  # which immediates are better for
    for line in loop:
        statement = STATEMENT.match(line)
        names = set(re.findall(r"\b(?:tmp|x)\d+\b", statement[2] if statement else line))
        if statement and not names & varying and not WRITTEN.search(statement[2]):
            first.append(line if statement[1] in shifts else BROADCAST.sub(r"lamb16::kept(\1);", line))
            continue
        varying |= set(re.findall(r"auto (tmp\d+) =", line))
        rest.append(line)
    return first + rest


@contextlib.contextmanager
def cpu_help() -> Iterator[None]:
    """A context in which Inductor's code for CPUs goes through :func:`cpu_code`, and :func:`vector_casts` holds.

    Outer loops are not fused, and work that Inductor repeats is done once, for GPUs too.
    """
    from torch._inductor.codegen.cpp import CppScheduling, KernelGroup

    original: Any = KernelGroup.codegen_group

    def codegen_group(self: Any, name: Any = None) -> str:
        return cpu_code(original(self, name))

    apart = mock.patch.multiple(CppScheduling, can_fuse_vertical_outer_loop=lambda *_: False)
    with mock.patch.object(KernelGroup, "codegen_group", codegen_group), apart, vector_casts(), done_once():
        yield


def options(device: torch.device, one_loop: bool = True) -> dict[str, Any]:
    """Inductor's options for this kind of device."""
    # A bfloat16 weight's square is the rounded one's; and on CUDA no contraction of a multiply and an add.
    found: dict[str, Any] = {"emulate_precision_casts": True}
    found["post_grad_custom_post_pass"] = REDUCTIONS_LAST if one_loop else UNCHANGED
    if device.type == "cpu":
        # Otherwise the CPU code stores the moments in a temporary instead of keeping them in registers.
        names = ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold")
        # Code for any number of threads. What is done once in a parallel region is marked as such only if there are
        # several threads at that moment; the code may be used by others, and is found again by them in the cache.
        return found | dict.fromkeys(names, 10_000) | {"cpp.dynamic_threads": True, "cpp.threads": 2}
    return found | {
        # IEEE division, so that GPUs give the CPU's bits.
        "eager_numerics.division_rounding": True,
        # One launch for a whole group; the memory that the last check fears for is not there: nothing is stored.
        "combo_kernels": True,
        "combo_kernel_max_num_nodes": 64,
        "combo_kernel_max_num_args": 1000,
        "combo_kernel_peak_memory_pct_threshold": None,
    }
