"""C++ for what a step does on the CPU with the memory of hundreds of tensors: one call for all, by their addresses.

It copies bytes, and looks for the largest. Inductor compiles it, and keeps it on disk, as it does with its own code.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Of tensor i the first packed element, how many there are and the first packed row, of `row` bytes, are in `places`.
SOURCE = """
#include <algorithm>
#include <cstdint>
#include <cstring>
enum { PACK, UNPACK, LARGEST };
extern "C" void kernel(const int64_t* addresses, const int64_t* places, uint8_t* buffer, const int64_t tensors,
                       const int64_t size, const int64_t row, const int64_t task) {
    #pragma omp parallel for if(tensors > 63)
    for (int64_t i = 0; i < tensors; i++) {
        const int64_t* place = places + 3 * i;
        const int64_t bytes = place[1] * size, padding = (row - bytes % row) % row;
        uint8_t* own = reinterpret_cast<uint8_t*>(addresses[i]) + place[0] * size;
        uint8_t* packed = buffer + place[2] * row;
        if (task == UNPACK) {
            std::memcpy(own, packed, bytes);
        } else if (task == PACK) {
            std::memcpy(packed, own, bytes);
            std::memset(packed + bytes, 0, padding);
        } else {
            uint8_t largest = 0;
            for (int64_t k = 0; k < bytes; k++) largest = std::max<uint8_t>(largest, own[k] & 0x7F);
            *packed = largest;
        }
    }
}
"""
PACK, UNPACK, LARGEST = range(3)


@functools.cache
def kernel() -> Callable[..., None] | None:
    """The function of :data:`SOURCE`, which takes tensors for pointers; None, with a warning, where there is none."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    types = ["const int64_t*", "const int64_t*", "uint8_t*", *["const int64_t"] * 4]
    try:
        found: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(types, SOURCE)
    except Exception as error:  # nothing has been changed yet, and torch can copy too
        log.warning("lamb16: C++ for small tensors does not compile (%s); their steps are slower", type(error).__name__)
        return None
    return found


def largest(codes: Sequence[Tensor]) -> Tensor | None:
    """The largest magnitude among the codes of each of these tensors, uint8 [tensors].

    None if they are not contiguous ones in the CPU's memory, or no compiled step has loaded the kernel before.
    """
    function = kernel() if kernel.cache_info().currsize else None
    if function is None or set(map(type, codes)) - {Tensor} or not all(map(attrgetter("is_cpu"), codes)):
        return None
    if not all(map(Tensor.is_contiguous, codes)):
        return None
    found = torch.empty(len(codes), dtype=torch.uint8)
    numbers = [[0] * len(codes), list(map(Tensor.numel, codes)), list(range(len(codes)))]
    places = torch.tensor(numbers).T.contiguous()
    function(torch.tensor(list(map(Tensor.data_ptr, codes))), places, found, len(codes), 1, 1, LARGEST)
    return found
