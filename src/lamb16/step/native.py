"""C++ for what a step does on the host with hundreds of tensors, in one call each.

It walks a list of launches, copies packed rows by addresses, looks where tensors are, and finds the largest codes.
Inductor compiles it, and keeps it on disk, as it does with its own code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Block, memory

MOST_ARGUMENTS = 128  # of a kernel that `walk` calls

# A launch is, in int64: the address of a number that is 0 where the launch is left out (or 0), the kernel's address,
# how many arguments it has, and for each the address of a number to begin with (or 0) and what is added to it.
SOURCE = """
#include <Python.h>
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

constexpr int MOST = MOST_ARGUMENTS;
using Caller = void (*)(int64_t, const int64_t*);
template <size_t> using Number = int64_t;
template <size_t... I> void call(int64_t kernel, const int64_t* a, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(Number<I>...)>(kernel)(a[I]...);
}
template <size_t N> void call_with(int64_t kernel, const int64_t* a) { call(kernel, a, std::make_index_sequence<N>()); }
template <size_t... N> constexpr std::array<Caller, sizeof...(N)> callers(std::index_sequence<N...>) {
    return {call_with<N>...};
}
static constexpr auto CALLERS = callers(std::make_index_sequence<MOST + 1>());

static void walk_one(const int64_t* program, const int64_t* end) {
    int64_t arguments[MOST];
    while (program < end) {
        const int64_t *found = program, count = program[2];
        program += 3 + 2 * count;
        if (found[0] && !*reinterpret_cast<const int64_t*>(found[0])) continue;
        for (int64_t k = 0; k < count; k++) {
            const int64_t first = found[3 + 2 * k];
            arguments[k] = found[4 + 2 * k] + (first ? *reinterpret_cast<const int64_t*>(first) : 0);
        }
        CALLERS[count](found[1], arguments);
    }
}

// `parts` has where each of them begins and ends.
extern "C" void walk(const int64_t* parts, const int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        walk_one(reinterpret_cast<const int64_t*>(parts[2 * k]), reinterpret_cast<const int64_t*>(parts[2 * k + 1]));
    }
}

// Packed rows of one operand into their buffer, or back; of tensors at address 0 nothing.
extern "C" void copy_rows(const int64_t* addresses, const int64_t* tensor_index, const int32_t* start,
                          const int32_t* length, uint8_t* buffer, const int64_t rows, const int64_t columns,
                          const int64_t size, const int64_t unpack) {
    #pragma omp parallel for if(rows > 255)
    for (int64_t i = 0; i < rows; i++) {
        const int64_t address = addresses[tensor_index[i]], bytes = length[i] * size;
        if (!address || !bytes) continue;
        uint8_t *own = reinterpret_cast<uint8_t*>(address) + start[i] * size, *packed = buffer + i * columns * size;
        if (unpack) {
            std::memcpy(own, packed, bytes);
        } else {
            std::memcpy(packed, own, bytes);
            std::memset(packed + bytes, 0, columns * size - bytes);
        }
    }
}

extern "C" void largest(const int64_t* addresses, const int64_t* bytes, uint8_t* found, const int64_t tensors) {
    #pragma omp parallel for if(tensors > 63)
    for (int64_t i = 0; i < tensors; i++) {
        const uint8_t* own = reinterpret_cast<const uint8_t*>(addresses[i]);
        uint8_t top = 0;
        for (int64_t k = 0; k < bytes[i]; k++) top = std::max<uint8_t>(top, own[k] & 0x7F);
        found[i] = top;
    }
}

// How many tensors of a list are not where `known` says, which has `width` of them in each of its `rows`; -1 where one
// is no plain tensor. With `note` it says so afterwards.
extern "C" int64_t look(PyObject* tensors, void* (*data_ptr)(PyObject*), PyObject* tensor, PyObject* parameter,
                        int64_t* known, const int64_t* rows, int64_t width, int64_t note) {
    int64_t changed = 0, count = PyList_GET_SIZE(tensors);
    for (int64_t k = 0; k < count; k++) {
        PyObject* x = PyList_GET_ITEM(tensors, k);
        if (Py_TYPE(x) != (PyTypeObject*)tensor && Py_TYPE(x) != (PyTypeObject*)parameter) return -1;
        int64_t* place = known + (rows ? rows[k / width] * width + k % width : k);
        int64_t address;
        try {
            address = reinterpret_cast<int64_t>(data_ptr(x));
        } catch (...) {
            return -1;
        }
        changed += *place != address;
        if (note) *place = address;
    }
    return changed;
}
""".replace("MOST_ARGUMENTS", str(MOST_ARGUMENTS))


class Library(NamedTuple):
    """The functions; ``walk`` and ``copy_rows`` let other threads of Python run meanwhile, ``look`` does not."""

    walk: Any
    copy_rows: Any
    largest: Any
    look: Any
    types: tuple[int, int, int]  # what `look` has to know of Python


def library() -> Library:
    """The functions of :data:`SOURCE`; raises what Inductor does where C++ does not compile."""
    if not _loaded:
        _loaded.append(_load())
    return _loaded[0]


def _load() -> Library:
    from torch._C._dynamo import guards
    from torch._inductor.codecache import CppCodeCache

    data_ptr: int = guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    free = CppCodeCache.load(SOURCE)
    look = ctypes.PyDLL(free._name).look
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    look.restype, look.argtypes = number, [ctypes.py_object, *[pointer] * 5, number, number]
    for function, pointers, numbers in ((free.walk, 1, 1), (free.copy_rows, 5, 4), (free.largest, 3, 1)):
        function.restype, function.argtypes = None, [pointer] * pointers + [number] * numbers
    return Library(free.walk, free.copy_rows, free.largest, look, (data_ptr, id(Tensor), id(nn.Parameter)))


def loaded() -> Library | None:
    """The functions, if a compiled step has loaded them before."""
    return _loaded[0] if _loaded else None


_loaded: list[Library] = []


def look(tensors: list[Tensor], known: Tensor, index: Tensor | None, width: int, note: bool) -> int:
    """How many of these plain tensors do not begin where ``known`` says, or begin there from now on, with ``note``.

    ``known`` int64 has ``width`` addresses per row, ``index`` int64 the rows that are meant, if not all. -1: one of the
    tensors is no plain one.
    """
    there = loaded()
    if there is not None:
        rows = None if index is None else index.data_ptr()
        found: int = there.look(tensors, *there.types, known.data_ptr(), rows, width, note)
        return found
    if not set(map(type, tensors)) <= {Tensor, nn.Parameter}:
        return -1
    rows_known = known.view(-1, width)
    before = rows_known if index is None else rows_known[index]
    now = torch.tensor(list(map(Tensor.data_ptr, tensors)), dtype=torch.int64).view(-1, width)
    changed: Any = (now != before[: len(now)]).sum().tolist()
    if note:
        rows_known[torch.arange(len(now)) if index is None else index] = now
    return int(changed)


def address_of(function: Any) -> int:
    """Where a function of the library begins."""
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


def copy_arguments(table: Tensor, block: Block, operand: int, unpack: bool) -> list[int]:
    """Of ``copy_rows``."""
    buffer = memory(block)[operand]
    tables = table[operand], block.tensor_index, block.start, block.length, buffer
    addresses = [x.data_ptr() for x in tables if x is not None]
    return [*addresses, *buffer.shape, buffer.element_size(), int(unpack)]


def largest(codes: Sequence[Tensor]) -> Tensor | None:
    """The largest magnitude among the codes of each of these tensors, uint8 [tensors].

    None if they are not contiguous ones in the CPU's memory, or no compiled step has loaded the library before.
    """
    there = loaded()
    if there is None or set(map(type, codes)) - {Tensor} or not all(map(attrgetter("is_cpu"), codes)):
        return None
    if not all(map(Tensor.is_contiguous, codes)):
        return None
    found = torch.empty(len(codes), dtype=torch.uint8)
    addresses, sizes = (torch.tensor(list(map(what, codes))) for what in (Tensor.data_ptr, Tensor.numel))
    there.largest(addresses.data_ptr(), sizes.data_ptr(), found.data_ptr(), len(codes))
    return found
