"""A CUDA device that is not there: enough of one for Dynamo and Inductor to generate code, and for nothing else.

The step functions are compiled by ``torch.compile`` itself with the project's own options, on fake tensors, so that
the code is what a GPU of the architecture would get. Everything that is stubbed is listed in :func:`device`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lamb16.step import examples, graph_code
from lamb16.step.graph_code import Origin
from lamb16.step.kinds import Graph, Kind

# Of an H100; only the capability is varied. They decide block sizes, not what is launched or moved.
PROPERTIES = {
    "name": "fake",
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "total_memory": 80 << 30,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 << 20,
}


@dataclass(frozen=True)
class Generated:
    """The code of a graph, and how the function ``call`` in it gets the step function's arguments."""

    code: str
    counted_bytes: int  # Inductor's own count of what is read and written, for the example inputs
    origins: list[Origin]
    aligned: list[bool]  # whether the code expects an argument's memory at a multiple of 16 bytes

    def arguments(self, arguments: Any) -> list[Any]:
        """The arguments of ``call`` for those of the step function."""
        flat = examples.flatten(arguments)
        return [origin.value(flat) for origin in self.origins]


def kind(param_dtype: torch.dtype = torch.float32, float8: bool = True, caution: bool = False) -> Kind:
    """The kind of tensors that code is generated for."""
    return Kind(torch.device("cuda"), param_dtype, param_dtype, float8, caution)


def generate(graph: Graph, of: Kind, capability: int) -> Generated:
    """The Python and Triton code that Inductor generates for a graph.

    ``capability`` is 75, 80, 90, 100 and so on.
    """
    from torch._inductor.graph import GraphLowering

    code: list[tuple[str, int]] = []
    received: list[Any] = []

    def compile_to_module(lowering: Any) -> Any:
        text, _ = lowering.codegen()
        code.append((text.value, int(lowering.count_bytes()[0])))
        return SimpleNamespace(call=call)

    def call(arguments: list[Any]) -> tuple[()]:
        received.extend(arguments)
        return ()

    torch._dynamo.reset()
    with device(capability), mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        with FakeTensorMode(shape_env=ShapeEnv()):
            arguments = examples.example_inputs(graph, of)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            compiled_code = graph_code.compile_on(arguments, graph, of)
    torch._dynamo.reset()
    assert isinstance(compiled_code, graph_code.Code)
    return Generated(*code[0], compiled_code.origins, [isinstance(x, Tensor) and is_aligned(x) for x in received])


def is_aligned(x: Tensor) -> bool:
    """Whether a tensor starts at a multiple of 16 bytes of its memory."""
    return int(x.storage_offset()) * x.element_size() % 16 == 0


@contextlib.contextmanager
def device(capability: int) -> Iterator[None]:
    """A context in which CUDA seems to be there, with this compute capability, as long as nothing runs on it."""
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(**PROPERTIES, major=major, minor=minor)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        get_device_interface=lambda: torch.cuda,
        get_device_capability=lambda *_: (major, minor),
    )
    # These ask the driver for the current device before they notice that the tensor is fake. They are not replaced on
    # torch.Tensor: a class whose __getitem__ was once set and deleted is taken for a sequence ever after.
    methods = {"__getitem__": _getitem, "__setitem__": _setitem, "__invert__": _invert, "copy_": _copy}
    stubs: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: (major, minor),
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda *_: None,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
            "_lazy_init": lambda: None,
            "_exchange_device": lambda _: 0,
            "_maybe_exchange_device": lambda _: 0,
        },
        CudaInterface: {
            "is_available": staticmethod(lambda: True),
            "current_device": staticmethod(lambda: 0),
            "device_count": staticmethod(lambda: 1),
            "get_device_properties": staticmethod(lambda *_: properties),
            "get_compute_capability": staticmethod(lambda *_: capability),
        },
        CudaInterface.Worker: {
            "current_device": staticmethod(lambda: 0),
            "set_device": staticmethod(lambda _: None),
            "get_device_properties": staticmethod(lambda *_: properties),
        },
        torch.accelerator: {"current_device_index": lambda: 0, "is_available": lambda: False},
        FakeTensor: methods,
        FunctionalTensor: methods,
        # Patterns of matrix products, made by tracing on the device.
        joint: {"lazy_init": lambda *_: None},
        post: {"lazy_init": lambda *_: None},
        triton_helpers: {"set_driver_to_gpu": lambda: None},
    }
    before = runtime.driver._active
    # What was found out about the real machine is forgotten, and afterwards what was found out about this one.
    answers = [x for x in vars(torch.utils._triton).values() if hasattr(x, "cache_clear")]
    answers.append(DeviceProperties.create)
    for answer in answers:
        answer.cache_clear()
    with contextlib.ExitStack() as stack:
        for target, values in stubs.items():
            for key, value in values.items():
                stack.enter_context(mock.patch.object(target, key, value))
        # Folding constants would compute them on the device.
        options = {"fx_graph_cache": False, "compile_threads": 1, "joint_graph_constant_folding": False}
        stack.enter_context(torch._inductor.config.patch(options))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        runtime.driver.set_active(driver)
        try:
            yield
        finally:
            runtime.driver._active = before
            for answer in answers:
                answer.cache_clear()


def _getitem(x: Tensor, index: Any) -> Tensor:
    dim = 0
    items = index if isinstance(index, tuple) else (index,)
    for item in items:
        if item is Ellipsis:
            dim += x.dim() - (len(items) - 1)  # no None beside it
            continue
        if isinstance(item, int):
            x = torch.ops.aten.select.int(x, dim, item)
            continue
        if item is None:
            x = torch.ops.aten.unsqueeze.default(x, dim)
        elif isinstance(item, Tensor):
            x = torch.ops.aten.index.Tensor(x, [None] * dim + [item])
        elif item != slice(None):
            x = torch.ops.aten.slice.Tensor(x, dim, item.start, item.stop, item.step or 1)
        dim += 1
    return x


def _setitem(x: Tensor, index: Any, value: Tensor) -> None:
    if isinstance(index, Tensor):
        torch.ops.aten.index_put_.default(x, [index], value)
    else:
        _copy(_getitem(x, index), value)


def _invert(x: Tensor) -> Tensor:
    inverted: Tensor = torch.ops.aten.bitwise_not.default(x)
    return inverted


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        copied: Tensor = torch.ops.aten.copy_.default(x, source)
        return copied
