"""The C reference: the functions of its library as Python calls; ``building.py`` builds it.

``lamb16.h`` documents the functions. :class:`Library` takes and returns what :mod:`lamb16.reference` does, so that
``library.step`` stands wherever ``reference.step`` does; what it computes comes from C alone.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamb16 import hyper
from lamb16.capi.building import (
    COMPILERS,
    FLAGS,
    BuildError,
    NoCompilerError,
    build,
    find_compiler,
    include,
    run_compiler,
    sources,
)
from lamb16.capi.structures import CHyper, CStats, CTensor, LayoutError, check_layout
from lamb16.hyper import ROUNDINGS, Hyper
from lamb16.reference import State, Stats

__all__ = (
    "COMPILERS", "DTYPES", "FLAGS", "NEAREST", "BuildError", "CHyper", "CStats", "CTensor", "LayoutError", "Library",
    "NoCompilerError", "StatusError", "build", "c_hyper", "find_compiler", "include", "load", "run_compiler", "sources",
)  # fmt: skip

NEAREST = 0x80000000  # the word with which the encoders round to nearest
OK, NULL_POINTER = 0, 1  # of lamb16_status; the others are only handed on
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights and gradients, in the order of lamb16_dtype


class StatusError(ValueError):
    """A function of the library refused its arguments and changed nothing; ``status`` is its lamb16_status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"lamb16 (C), status {status}: {message}")
        self.status = status


@functools.cache
def load() -> Library:
    """The C reference, built with the first compiler found, once per process."""
    with tempfile.TemporaryDirectory(prefix="lamb16-capi-") as folder:
        return Library(build(folder))  # once it is loaded its file is not needed


def _signatures() -> dict[str, tuple[type | None, list[type]]]:
    """Result and arguments of every function of the header."""
    pointer, size, word = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
    hyper, tensor, stats = (ctypes.POINTER(x) for x in (CHyper, CTensor, CStats))
    status, number, double, byte = ctypes.c_int, ctypes.c_float, ctypes.c_double, ctypes.c_uint8
    found: dict[str, tuple[type | None, list[type]]] = {
        "status_string": (ctypes.c_char_p, [status]),
        "default_hyper": (None, [hyper]),
        "offset": (size, [ctypes.c_char_p, ctypes.c_char_p]),
        "hash": (word, [word]),
        "word": (word, [ctypes.c_uint64, word, ctypes.c_int32]),
        "words": (status, [ctypes.c_uint64, word, ctypes.c_int32, pointer, size]),
        "round_weights": (status, [pointer, pointer, ctypes.c_int32, ctypes.c_int32, pointer, pointer, size]),
        "widen_weights": (status, [pointer, pointer, ctypes.c_int32, pointer, size]),
        "init": (status, [tensor]),
        "check": (status, [tensor, hyper]),
        "step": (status, [tensor, hyper, double, stats]),
        "step_list": (status, [tensor, size, hyper, double, stats]),
        "grad_norm": (status, [tensor, size, ctypes.POINTER(double)]),
        "clip_factor": (double, [double, double]),
    }
    for name in ("e4m3", "e5m2"):
        found |= {
            f"encode_{name}": (byte, [number, word]),
            f"decode_{name}": (number, [byte]),
            f"scale_{name}": (number, [number]),
            f"encode_{name}_array": (status, [pointer, pointer, pointer, size]),
            f"decode_{name}_array": (status, [pointer, pointer, size]),
        }
    return found


class Library:
    """The functions of a built library. ``c`` are the bare C functions by their names without ``lamb16_``.

    Raises:
        OSError: there is no library at the path, or it is another one.
        LayoutError: a structure has other fields than the one of this module.
    """

    def __init__(self, path: str | Path) -> None:
        library = ctypes.CDLL(str(Path(path).resolve()))
        self.c = {}
        for name, (result, arguments) in _signatures().items():
            try:
                function = getattr(library, f"lamb16_{name}")
            except AttributeError as error:
                raise OSError(f"{path} is not the lamb16 C library: it has no function lamb16_{name}") from error
            function.restype, function.argtypes = result, arguments
            self.c[name] = function
        check_layout(self.c["offset"])

    def status_string(self, status: int) -> str:
        """What a status means."""
        text: bytes = self.c["status_string"](status)
        return text.decode()

    def _call(self, name: str, *arguments: object) -> None:
        status = self.c[name](*arguments)
        if status != OK:
            raise StatusError(status, self.status_string(status))

    # -- the step ------------------------------------------------------------------------------------------------

    def init(self, param: Tensor, salt: int, param_rounding: str = "stochastic") -> State:
        """The state before the first step, as :func:`lamb16.reference.init` gives it."""
        weights = _checked("weights", param, DTYPES, param.shape)
        codes = [torch.full(param.shape, 0xFF, dtype=torch.uint8) for _ in range(2)]
        remainder = None
        if param.dtype == torch.bfloat16 and param_rounding == "exact":
            remainder = torch.ones(param.shape, dtype=torch.int16)
        tensor = _struct(weights, None, codes, remainder, step=-1, salt=salt & 0xFFFFFFFF)
        self._call("init", ctypes.byref(tensor))
        return State(exp_avg_codes=codes[0], exp_avg_sq_codes=codes[1], param_remainder=remainder, **tensor.results())

    def step(
        self, p: Tensor, grad: Tensor, state: State, h: Hyper, grad_factor: float = 1.0
    ) -> tuple[Tensor, State, Stats]:
        """One step for one tensor, with the arguments and results of :func:`lamb16.reference.step`.

        ``p`` and ``grad`` are on the CPU, of one shape and float32, bfloat16 or float16 each; the codes of ``state``
        uint8 of that shape, and its remainders int16. Nothing is changed in place.

        Raises:
            ValueError: a shape, dtype or device is another, moment_dtype is not "float8", or there are remainders
                though param_rounding is not "exact" or the weights are not bfloat16.
            StatusError: a hyperparameter, the factor or a part of the state is out of range, or remainders are missing.
        """
        return self.step_list([(p, grad, state)], h, grad_factor)[0]

    def step_list(
        self, tensors: Sequence[tuple[Tensor, Tensor, State]], h: Hyper, grad_factor: float = 1.0
    ) -> list[tuple[Tensor, State, Stats]]:
        """One step for each (weights, gradient, state), all with the same hyperparameters; as :meth:`step`."""
        if h.moment_dtype != "float8":
            raise ValueError(f"lamb16 (C): moment_dtype={h.moment_dtype!r} is not supported; it must be 'float8'")
        held = [_copies(k, *tensor, h) for k, tensor in enumerate(tensors)]
        structs = (CTensor * len(held))(*(_struct_of(*copies) for copies in held))
        stats = (CStats * len(held))()
        self._call("step_list", structs, len(held), ctypes.byref(c_hyper(h)), grad_factor, stats)
        return [_results(*args) for args in zip(held, structs, stats, strict=True)]

    def grad_norm(self, grads: Sequence[Tensor]) -> float:
        """The norm over gradients, as :func:`lamb16.reference.grad_norm` gives it."""
        held = [_checked(f"gradient {k}", grad, DTYPES, grad.shape) for k, grad in enumerate(grads)]
        structs = (CTensor * len(held))(
            *(CTensor(numel=x.numel(), grad=x.data_ptr(), grad_dtype=DTYPES.index(x.dtype)) for x in held)
        )
        norm = ctypes.c_double()
        self._call("grad_norm", structs, len(held), ctypes.byref(norm))
        return norm.value

    def clip_factor(self, norm: float, max_norm: float) -> float:
        """What gradients of this norm are multiplied by, as :func:`lamb16.reference.clip_factor` gives it."""
        found: float = self.c["clip_factor"](norm, max_norm)
        return found

    # -- rounding ------------------------------------------------------------------------------------------------

    def words(self, first: int, salt: int, t: int, count: int) -> Tensor:
        """The rounding words of elements ``first`` to ``first + count - 1`` in step ``t``: int32 bits, [count]."""
        words = torch.empty(count, dtype=torch.int32)
        self._call("words", first, salt & 0xFFFFFFFF, t, words.data_ptr(), count)
        return words

    def encode(self, x: Tensor, words: Tensor, format: str) -> Tensor:
        """The uint8 codes of float32 ``x`` with int32 ``words``, of one shape; ``format`` is "e4m3" or "e5m2"."""
        x, words = _checked("x", x, (torch.float32,), x.shape), _checked("words", words, (torch.int32,), x.shape)
        codes = torch.empty(x.shape, dtype=torch.uint8)
        self._call(f"encode_{format}_array", x.data_ptr(), words.data_ptr(), codes.data_ptr(), x.numel())
        return codes

    def decode(self, codes: Tensor, format: str) -> Tensor:
        """The float32 values of uint8 codes."""
        codes = _checked("codes", codes, (torch.uint8,), codes.shape)
        x = torch.empty(codes.shape)
        self._call(f"decode_{format}_array", codes.data_ptr(), x.data_ptr(), codes.numel())
        return x

    def round_weights(
        self, x: Tensor, dtype: torch.dtype, rounding: str, words: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """float32 ``x`` rounded to bfloat16 or float16, and with "exact" the int16 remainders.

        ``words`` are int32 of x's shape, needed for "stochastic" alone.
        """
        x = _checked("x", x, (torch.float32,), x.shape)
        words = None if words is None else _checked("words", words, (torch.int32,), x.shape)
        weights = torch.empty(x.shape, dtype=dtype)
        remainder = torch.empty(x.shape, dtype=torch.int16) if rounding == "exact" else None
        numbers = DTYPES.index(dtype), ROUNDINGS.index(rounding)
        arrays = (_pointer(words), *numbers, weights.data_ptr(), _pointer(remainder))
        self._call("round_weights", x.data_ptr(), *arrays, x.numel())
        return weights, remainder

    def widen_weights(self, weights: Tensor, remainder: Tensor | None = None) -> Tensor:
        """The float32 values of bfloat16 or float16 weights; with remainders, of the exact weights."""
        weights = _checked("weights", weights, DTYPES[1:], weights.shape)
        remainder = None if remainder is None else _checked("remainder", remainder, (torch.int16,), weights.shape)
        x, dtype = torch.empty(weights.shape), DTYPES.index(weights.dtype)
        self._call("widen_weights", weights.data_ptr(), _pointer(remainder), dtype, x.data_ptr(), x.numel())
        return x


def c_hyper(h: Hyper) -> CHyper:
    """The struct for these hyperparameters; a param_rounding that there is not becomes -1."""
    numbers = hyper.numbers_of(vars(h))
    rounding = ROUNDINGS.index(h.param_rounding) if h.param_rounding in ROUNDINGS else -1
    flags = {name: int(x) for name, x in numbers.items() if name in hyper.FLAGS}
    return CHyper(**numbers | flags, param_rounding=rounding)


def _copies(k: int, p: Tensor, grad: Tensor, state: State, h: Hyper) -> tuple[Tensor, Tensor, State]:
    """What C may write to: weights, codes and remainders of its own, contiguous."""
    p = _checked(f"weights of tensor {k}", p, DTYPES, p.shape).clone()
    grad = _checked(f"gradient of tensor {k}", grad, DTYPES, p.shape)
    kinds = {"exp_avg_codes": torch.uint8, "exp_avg_sq_codes": torch.uint8}
    if state.param_remainder is not None:
        if h.param_rounding != "exact" or p.dtype != torch.bfloat16:
            raise ValueError(
                f"lamb16 (C): param_remainder of tensor {k} is for bfloat16 weights and param_rounding='exact', not "
                f"for {p.dtype} and {h.param_rounding!r}; set it to None"
            )
        kinds["param_remainder"] = torch.int16
    arrays = {
        name: _checked(f"{name} of tensor {k}", getattr(state, name), (dtype,), p.shape).clone()
        for name, dtype in kinds.items()
    }
    return p, grad, replace(state, **arrays)  # type: ignore[arg-type]


def _checked(name: str, x: Tensor, dtypes: Sequence[torch.dtype], shape: torch.Size) -> Tensor:
    if x.dtype not in dtypes or x.device.type != "cpu" or x.shape != shape:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(
            f"lamb16 (C): {name} is {x.dtype} {tuple(x.shape)} on {x.device}; "
            f"it must be {wanted} {tuple(shape)} on the CPU"
        )
    return x.detach().contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _struct(
    p: Tensor, grad: Tensor | None, codes: Sequence[Tensor], remainder: Tensor | None, **scalars: Any
) -> CTensor:
    dtypes = DTYPES.index(p.dtype), 0 if grad is None else DTYPES.index(grad.dtype)
    return CTensor(p.numel(), *dtypes, *map(_pointer, (p, grad, *codes, remainder)), **scalars)


def _struct_of(p: Tensor, grad: Tensor, state: State) -> CTensor:
    scalars = {name: getattr(state, name) for name in CTensor.SCALARS} | {"salt": state.salt & 0xFFFFFFFF}
    return _struct(p, grad, (state.exp_avg_codes, state.exp_avg_sq_codes), state.param_remainder, **scalars)


def _results(held: tuple[Tensor, Tensor, State], tensor: CTensor, stats: CStats) -> tuple[Tensor, State, Stats]:
    p, _, state = held
    found = Stats(stats.weight_norm, stats.update_norm, stats.trust_ratio, bool(stats.skipped))
    return p, replace(state, **tensor.results()), found
