"""The structures of ``lamb16.h`` as Python hands them over, and whether a library has the same ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from lamb16 import hyper


class LayoutError(OSError):
    """The structures of a library are not those that :mod:`lamb16.capi` hands over."""


class CHyper(ctypes.Structure):
    """lamb16_hyper: the fields are those of :data:`lamb16.hyper.NUMBERS`, flags int32 and the others double.

    The last is a lamb16_rounding, the place of param_rounding in :data:`lamb16.hyper.ROUNDINGS`.
    """

    _fields_ = [(name, ctypes.c_int32 if name in hyper.FLAGS else ctypes.c_double) for name in hyper.NUMBERS] + [
        ("param_rounding", ctypes.c_int32)
    ]
    NAMES = tuple(field[0] for field in _fields_)


class CTensor(ctypes.Structure):
    """lamb16_tensor. What follows the pointers has the name and meaning of a field of :class:`State`."""

    _fields_ = [
        ("numel", ctypes.c_size_t),
        ("param_dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("exp_avg_codes", ctypes.c_void_p),
        ("exp_avg_sq_codes", ctypes.c_void_p),
        ("param_remainder", ctypes.c_void_p),
        ("exp_avg_scale", ctypes.c_float),
        ("exp_avg_sq_scale", ctypes.c_float),
        ("exp_avg_max", ctypes.c_float),
        ("exp_avg_sq_max", ctypes.c_float),
        ("weight_sum", ctypes.c_int64),
        ("update_sum", ctypes.c_int64),
        ("mask_count", ctypes.c_int64),
        ("param_checksum", ctypes.c_int64),
        ("step", ctypes.c_int32),
        ("salt", ctypes.c_uint32),
    ]
    SCALARS = tuple(field[0] for field in _fields_[8:])

    def results(self) -> dict[str, Any]:
        """The scalars, all of which a step may have changed."""
        return {name: getattr(self, name) for name in self.SCALARS}


class CStats(ctypes.Structure):
    """lamb16_stats."""

    _fields_ = [
        ("weight_norm", ctypes.c_double),
        ("update_norm", ctypes.c_double),
        ("trust_ratio", ctypes.c_double),
        ("skipped", ctypes.c_int32),
    ]


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "lamb16_hyper": CHyper, "lamb16_tensor": CTensor, "lamb16_stats": CStats,
}  # fmt: skip
NOWHERE = ctypes.c_size_t(-1).value


def check_layout(offset: Callable[[bytes, bytes], int]) -> None:
    """Raise LayoutError where a library, by its ``lamb16_offset``, has other structures."""
    for name, structure in STRUCTURES.items():
        own = {field[0]: getattr(structure, field[0]).offset for field in structure._fields_}
        for field, wanted in {**own, "": ctypes.sizeof(structure)}.items():
            found = offset(name.encode(), field.encode())
            if found != wanted:
                what = f"its field {field}" if field else "its size"
                raise LayoutError(
                    f"lamb16 (C): {name} is out of step with Python: {what} is "
                    f"{'not there' if found == NOWHERE else f'{found} bytes'}, expected {wanted}; bring lamb16.h and "
                    "lamb16.c in step with lamb16/hyper.py and lamb16/capi/structures.py, and build the library again"
                )
