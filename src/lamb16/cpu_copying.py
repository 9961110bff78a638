"""C++ for what a step does on the CPU with the memory of hundreds of tensors: one call for all, by their addresses.

It copies bytes and computes nothing. Inductor compiles it, and keeps it on disk, as it does with its own code.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

# Per tail its first element, its number of elements and its first packed row; a row has `row` bytes.
COPY = """
#include <cstdint>
#include <cstring>
extern "C" void kernel(const int64_t* addresses, const int64_t* places, uint8_t* buffer, const int64_t tails,
                       const int64_t size, const int64_t row, const int64_t unpack) {
    #pragma omp parallel for if(tails > 63)
    for (int64_t i = 0; i < tails; i++) {
        const int64_t* place = places + 3 * i;
        const int64_t bytes = place[1] * size, padding = (row - bytes % row) % row;
        uint8_t* own = reinterpret_cast<uint8_t*>(addresses[i]) + place[0] * size;
        uint8_t* packed = buffer + place[2] * row;
        if (unpack) {
            std::memcpy(own, packed, bytes);
        } else {
            std::memcpy(packed, own, bytes);
            std::memset(packed + bytes, 0, padding);
        }
    }
}
"""


@functools.cache
def copy() -> Callable[..., None] | None:
    """The function of :data:`COPY`, which takes tensors for pointers; None, with a warning, where there is none."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    types = ["const int64_t*", "const int64_t*", "uint8_t*", *["const int64_t"] * 4]
    try:
        found: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(types, COPY)
    except Exception as error:  # nothing has been changed yet, and torch can copy too
        log.warning("lamb16: C++ for small tensors does not compile (%s); their steps are slower", type(error).__name__)
        return None
    return found
