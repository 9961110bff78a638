"""The C reference: where its sources are, how to build it, and the functions of its library as Python calls.

``lamb16.h`` documents the functions. :class:`Library` takes and returns what :mod:`lamb16.reference` does, so that
``library.step`` stands wherever ``reference.step`` does; what it computes comes from C alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamb16 import hyper
from lamb16.hyper import Hyper
from lamb16.reference import State, Stats

COMPILERS = ("gcc", "clang")
FLAGS = ("-std=c11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pedantic")
NEAREST = 0x80000000  # the word with which the encoders round to nearest
OK, NULL_POINTER = 0, 1  # of lamb16_status; the others are only handed on


class NoCompilerError(RuntimeError):
    """There is no C compiler."""


class BuildError(RuntimeError):
    """The compiler refused the sources, or wrote nothing; the message holds the command or what it said."""


class StatusError(ValueError):
    """A function of the library refused its arguments and changed nothing; ``status`` is its lamb16_status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"lamb16 (C), status {status}: {message}")
        self.status = status


def include() -> Path:
    """The folder with ``lamb16.h``, for a compiler's -I."""
    return Path(__file__).parent


def sources() -> list[Path]:
    """The C files to compile."""
    return [include() / "lamb16.c"]


def find_compiler(compiler: str | None = None) -> list[str]:
    """The command of a C compiler: the given one, else $CC (which may have arguments), gcc, clang or cc.

    Raises:
        NoCompilerError: it is not on the PATH, or none of these is.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    wanted = [[compiler]] if compiler else [chosen, *([name] for name in (*COMPILERS, "cc"))]
    for words in wanted:
        found = shutil.which(words[0]) if words else None
        if found:
            return [found, *words[1:]]
    names = ", ".join(words[0] for words in wanted if words)
    raise NoCompilerError(f"no C compiler: {names} not found on the PATH; install gcc or clang, or name one in CC")


def build(
    folder: str | Path,
    compiler: str | None = None,
    flags: Sequence[str] = FLAGS,
    files: Sequence[Path] | None = None,
) -> Path:
    """Compile the C reference into a shared library and return its path, ``folder/liblamb16.so``.

    Args:
        folder: made if it is missing.
        compiler: its name or path; None for the first one found.
        flags: of the compiler, in place of :data:`FLAGS`; -fPIC, -shared, the include path and -lm are added.
        files: other C files in place of :func:`sources`.

    Raises:
        NoCompilerError: there is no such compiler.
        BuildError: it failed, or wrote no library.
    """
    folder = Path(folder)
    library = folder / "liblamb16.so"
    command = [*find_compiler(compiler), *flags, "-fPIC", "-shared"]
    folder.mkdir(parents=True, exist_ok=True)
    run_compiler(command, files or sources(), library, ["-lm"])
    return library


def run_compiler(command: Sequence[str], files: Sequence[Path], output: Path, link: Sequence[str]) -> None:
    """Compile files with ``lamb16.h`` on the include path; raises BuildError."""
    arguments = [*command, f"-I{include()}", *map(str, files), "-o", str(output), *link]
    if output.is_file():  # it would hide that none was written
        output.unlink()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(arguments)} failed with status {done.returncode}:\n{done.stderr}")
    if not output.is_file():
        raise BuildError(
            f"{command[0]} wrote no {output.name}: it is no C compiler, or was told not to link; name gcc or clang, "
            f"without such options. The command: {' '.join(arguments)}"
        )


@functools.cache
def load() -> Library:
    """The C reference, built with the first compiler found, once per process."""
    with tempfile.TemporaryDirectory(prefix="lamb16-capi-") as folder:
        return Library(build(folder))  # once it is loaded its file is not needed


class CHyper(ctypes.Structure):
    """lamb16_hyper: the fields are those of :data:`lamb16.hyper.NUMBERS`, flags int32 and the others double."""

    _fields_ = [(name, ctypes.c_int32 if name in hyper.FLAGS else ctypes.c_double) for name in hyper.NUMBERS]


class CTensor(ctypes.Structure):
    """lamb16_tensor. What follows the pointers has the name and meaning of a field of :class:`State`."""

    _fields_ = [
        ("numel", ctypes.c_size_t),
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("exp_avg_codes", ctypes.c_void_p),
        ("exp_avg_sq_codes", ctypes.c_void_p),
        ("exp_avg_scale", ctypes.c_float),
        ("exp_avg_sq_scale", ctypes.c_float),
        ("exp_avg_max", ctypes.c_float),
        ("exp_avg_sq_max", ctypes.c_float),
        ("weight_sum", ctypes.c_int64),
        ("update_sum", ctypes.c_int64),
        ("mask_count", ctypes.c_int64),
        ("step", ctypes.c_int32),
        ("salt", ctypes.c_uint32),
    ]
    SCALARS = tuple(field[0] for field in _fields_[5:])

    def results(self) -> dict[str, Any]:
        """The scalars that a function may have changed: all but the salt."""
        return {name: getattr(self, name) for name in self.SCALARS if name != "salt"}


class CStats(ctypes.Structure):
    """lamb16_stats."""

    _fields_ = [
        ("weight_norm", ctypes.c_double),
        ("update_norm", ctypes.c_double),
        ("trust_ratio", ctypes.c_double),
        ("skipped", ctypes.c_int32),
    ]


def _signatures() -> dict[str, tuple[type | None, list[type]]]:
    """Result and arguments of every function of the header."""
    pointer, size, word = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
    hyper, tensor, stats = (ctypes.POINTER(x) for x in (CHyper, CTensor, CStats))
    status, number, double, byte = ctypes.c_int, ctypes.c_float, ctypes.c_double, ctypes.c_uint8
    found: dict[str, tuple[type | None, list[type]]] = {
        "status_string": (ctypes.c_char_p, [status]),
        "default_hyper": (None, [hyper]),
        "hash": (word, [word]),
        "word": (word, [ctypes.c_uint64, word, ctypes.c_int32]),
        "words": (status, [ctypes.c_uint64, word, ctypes.c_int32, pointer, size]),
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

    def status_string(self, status: int) -> str:
        """What a status means."""
        text: bytes = self.c["status_string"](status)
        return text.decode()

    def _call(self, name: str, *arguments: object) -> None:
        status = self.c[name](*arguments)
        if status != OK:
            raise StatusError(status, self.status_string(status))

    # -- the step ------------------------------------------------------------------------------------------------

    def init(self, param: Tensor, salt: int) -> State:
        """The state before the first step, as :func:`lamb16.reference.init` gives it."""
        weights = _checked("weights", param, torch.float32, param.shape)
        codes = [torch.full(param.shape, 0xFF, dtype=torch.uint8) for _ in range(2)]
        tensor = CTensor(param.numel(), weights.data_ptr(), None, *(x.data_ptr() for x in codes), step=-1)
        self._call("init", ctypes.byref(tensor))
        return State(exp_avg_codes=codes[0], exp_avg_sq_codes=codes[1], salt=salt, **tensor.results())

    def step(
        self, p: Tensor, grad: Tensor, state: State, h: Hyper, grad_factor: float = 1.0
    ) -> tuple[Tensor, State, Stats]:
        """One step for one tensor, with the arguments and results of :func:`lamb16.reference.step`.

        ``p`` and ``grad`` are float32 on the CPU, of one shape; the codes of ``state`` uint8 of that shape. Nothing is
        changed in place.

        Raises:
            ValueError: a shape, dtype or device is another, or moment_dtype is not "float8".
            StatusError: a hyperparameter, the factor or a part of the state is out of range.
        """
        return self.step_list([(p, grad, state)], h, grad_factor)[0]

    def step_list(
        self, tensors: Sequence[tuple[Tensor, Tensor, State]], h: Hyper, grad_factor: float = 1.0
    ) -> list[tuple[Tensor, State, Stats]]:
        """One step for each (weights, gradient, state), all with the same hyperparameters; as :meth:`step`."""
        if h.moment_dtype != "float8":
            raise ValueError(f"lamb16 (C): moment_dtype={h.moment_dtype!r} is not supported; it must be 'float8'")
        held = [_copies(k, *tensor) for k, tensor in enumerate(tensors)]
        structs = (CTensor * len(held))(*(_struct(*copies) for copies in held))
        stats = (CStats * len(held))()
        self._call("step_list", structs, len(held), ctypes.byref(c_hyper(h)), grad_factor, stats)
        return [_results(*args) for args in zip(held, structs, stats, strict=True)]

    def grad_norm(self, grads: Sequence[Tensor]) -> float:
        """The norm over float32 gradients, as :func:`lamb16.reference.grad_norm` gives it."""
        held = [_checked(f"gradient {k}", grad, torch.float32, grad.shape) for k, grad in enumerate(grads)]
        structs = (CTensor * len(held))(*(CTensor(numel=grad.numel(), grad=grad.data_ptr()) for grad in held))
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
        x, words = _checked("x", x, torch.float32, x.shape), _checked("words", words, torch.int32, x.shape)
        codes = torch.empty(x.shape, dtype=torch.uint8)
        self._call(f"encode_{format}_array", x.data_ptr(), words.data_ptr(), codes.data_ptr(), x.numel())
        return codes

    def decode(self, codes: Tensor, format: str) -> Tensor:
        """The float32 values of uint8 codes."""
        codes = _checked("codes", codes, torch.uint8, codes.shape)
        x = torch.empty(codes.shape)
        self._call(f"decode_{format}_array", codes.data_ptr(), x.data_ptr(), codes.numel())
        return x


def c_hyper(h: Hyper) -> CHyper:
    """The struct for these hyperparameters."""
    numbers = hyper.numbers_of(vars(h))
    return CHyper(**{name: int(x) if name in hyper.FLAGS else x for name, x in numbers.items()})


def _copies(k: int, p: Tensor, grad: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """What C may write to: weights and codes of its own, contiguous."""
    p = _checked(f"weights of tensor {k}", p, torch.float32, p.shape).clone()
    grad = _checked(f"gradient of tensor {k}", grad, torch.float32, p.shape)
    codes_m, codes_v = (
        _checked(f"{name} of tensor {k}", getattr(state, name), torch.uint8, p.shape).clone()
        for name in ("exp_avg_codes", "exp_avg_sq_codes")
    )
    return p, grad, replace(state, exp_avg_codes=codes_m, exp_avg_sq_codes=codes_v)


def _checked(name: str, x: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if x.dtype != dtype or x.device.type != "cpu" or x.shape != shape:
        raise ValueError(
            f"lamb16 (C): {name} is {x.dtype} {tuple(x.shape)} on {x.device}; "
            f"it must be {dtype} {tuple(shape)} on the CPU"
        )
    return x.detach().contiguous()


def _struct(p: Tensor, grad: Tensor, state: State) -> CTensor:
    memory = (x.data_ptr() for x in (p, grad, state.exp_avg_codes, state.exp_avg_sq_codes))
    scalars = {name: getattr(state, name) for name in CTensor.SCALARS} | {"salt": state.salt & 0xFFFFFFFF}
    return CTensor(p.numel(), *memory, **scalars)


def _results(held: tuple[Tensor, Tensor, State], tensor: CTensor, stats: CStats) -> tuple[Tensor, State, Stats]:
    p, _, state = held
    found = Stats(stats.weight_norm, stats.update_norm, stats.trust_ratio, bool(stats.skipped))
    return p, replace(state, **tensor.results()), found
