"""What Inductor is told, and where it is helped: the places at which its code for our step would be slow.

1. **One loop.** Inductor fuses a reduction into the loop of a store only if it meets the store first, but
   functionalization moves all stores into arguments to the end of the graph: the step would read everything twice. The
   pass :class:`ReductionsLast` moves the reductions behind the stores. The optimizer's graphs store to arguments that
   are the inputs' memory once more, so the one loop reads each element before it writes it; were it not one loop,
   reductions would see what is new. ``compiled.py`` therefore tries the code before it is used, and does without the
   pass if it is wrong.
2. **Bits.** ``Tensor.view(dtype)`` between float32 and int32 is generated for CPUs as an array copied lane by lane.
   :func:`vector_casts` makes it ``at::vec::cast``, which is no instruction at all.
3. **Stores in place.** The exported step stores into its inputs. What is computed from these and needed later, here by
   reductions, Inductor makes temporaries of, and then fuses one reduction with what computes them. With
   :func:`fused_reductions` it fuses all: the temporaries are never stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

REDUCTIONS = {torch.ops.aten.amax.default, torch.ops.aten.sum.dim_IntList}
VECTOR_TYPES = {torch.float32: "float", torch.int32: "int32_t"}


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
        """For the cache of compiled graphs, which holds what :func:`vector_casts` makes too."""
        return "lamb16 2"


REDUCTIONS_LAST = ReductionsLast()  # one object, so that equal options are equal


@contextlib.contextmanager
def vector_casts() -> Iterator[None]:
    """A context in which Inductor reinterprets vectors of float32 and int32 in registers."""
    from torch._inductor.codegen.cpp import CppVecOverrides
    from torch._inductor.virtualized import V

    original: Any = CppVecOverrides.to_dtype_bitcast

    def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> Any:
        if dtype in VECTOR_TYPES and src_dtype in VECTOR_TYPES and getattr(x, "is_vec", False):
            to, count = VECTOR_TYPES[dtype], V.kernel._get_num_vectors(dtype)
            if count == 1:
                return f"at::vec::cast<{to}>({x})"
            each = f"for (int i = 0; i < {count}; i++) y[i] = at::vec::cast<{to}>({x}[i]);"
            return f"[&]() {{ at::vec::VectorizedN<{to}, {count}> y; {each} return y; }}()"
        return original(x, dtype, src_dtype)

    with mock.patch.object(CppVecOverrides, "to_dtype_bitcast", staticmethod(to_dtype_bitcast)):
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


def options(device: torch.device, one_loop: bool = True) -> dict[str, Any]:
    """Inductor's options for this kind of device."""
    # A bfloat16 weight's square is the rounded one's; and on CUDA no contraction of a multiply and an add.
    found: dict[str, Any] = {"emulate_precision_casts": True}
    found |= {"post_grad_custom_post_pass": REDUCTIONS_LAST} if one_loop else {}
    if device.type == "cpu":
        # Otherwise the CPU code stores the moments in a temporary instead of keeping them in registers.
        names = ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold")
        return found | dict.fromkeys(names, 10_000) | {"cpp.dynamic_threads": True}  # code for any number of threads
    return found | {
        # IEEE division, so that GPUs give the CPU's bits.
        "eager_numerics.division_rounding": True,
        # One launch for a whole group; the memory that the last check fears for is not there: nothing is stored.
        "combo_kernels": True,
        "combo_kernel_max_num_nodes": 64,
        "combo_kernel_max_num_args": 1000,
        "combo_kernel_peak_memory_pct_threshold": None,
    }
