"""`lamb16 check`: hold an exported step, and lamb16's other steps, to the C reference, bit for bit.

A C program loads the exported step through AOTInductor's C ABI and runs it beside the C reference (capi/lamb16.c,
which shares no code with PyTorch) on the same seeded inputs; the Python reference and the optimizer's eager and
compiled steps are held to the same C code from Python. Each goes on from its own results, and all are compared after
every step.
Exit status: 0 where no bit differs, 1 where one does or the export is damaged, 2 where the command
line is wrong or there is no C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamb16 import Lamb16, capi, reference
from lamb16.capi import manifest
from lamb16.capi.manifest import Exported, ManifestError, Spec
from lamb16.entries import MOMENTS, SCALARS
from lamb16.hyper import Hyper
from lamb16.lab.errors import CommandError
from lamb16.lab.study.report import table
from lamb16.parameters import tensor_salt
from lamb16.reference import State
from lamb16.remainder import REMAINDER

EXPORTED = "exported"
CHANGED = 0.5  # INPUTS_CHANGED of capi/inputs.h
Results = list[tuple[Tensor, State]]  # weights and state of every tensor
Changes = list[int]  # tensors whose middle weight something else than the step sets to CHANGED
Stepper = Callable[[list[Tensor], Hyper, float, Changes], Results]  # from gradients, hyperparameters, their factor


def add_parser(subparsers: Any) -> None:
    """Add `check` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="compare an exported step with the C reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `lamb16 export -o` wrote")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and gradients")
    parser.add_argument(
        "--only", nargs="+", choices=[EXPORTED, *STEPPERS], default=[EXPORTED, *STEPPERS], help="default: all"
    )
    parser.add_argument("--compiler", metavar="CC", help="C compiler (default: $CC, gcc, clang or cc)")


def run(args: argparse.Namespace) -> int:
    """Build, run, print the table."""
    if args.steps < 1:
        raise CommandError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.seed < 1 << 63:
        raise CommandError(f"--seed must be at least 0 and below 2^63, not {args.seed}")
    try:
        exported = manifest.read(args.folder)
        if exported.device != "cpu":
            raise CommandError(f"check runs steps for the CPU, {args.folder} is for {exported.device}", status=1)
        with tempfile.TemporaryDirectory(prefix="lamb16-check-") as scratch:
            rows = list(_rows(exported, args, Path(scratch)))
    except ManifestError as error:
        raise CommandError(str(error), status=1) from error
    except capi.NoCompilerError as error:
        raise CommandError(str(error)) from error
    except capi.BuildError as error:
        raise CommandError(" ".join(str(error).split())[:500], status=1) from error
    print(summary(rows))
    return int(any(row.differs for row in rows))


def _rows(exported: Exported, args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    if EXPORTED in args.only:
        _say(EXPORTED, args.steps)
        harness = build_harness(args.compiler, scratch)
        yield run_harness(harness, exported.extract(scratch), exported, args.steps, args.seed)
    others = [name for name in STEPPERS if name in args.only]
    if others:
        _say(", ".join(others), args.steps)
        inputs = Inputs(args.compiler, scratch / "inputs")
        library = capi.Library(capi.build(scratch / "reference", args.compiler))
        yield from check_steppers(others, library, inputs, exported, args.steps, args.seed)


def _say(what: str, steps: int) -> None:
    print(f"checking {what}: {steps} steps", file=sys.stderr, flush=True)  # which may take minutes


# -- what is found ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What differed from the C reference, summed over all steps."""

    name: str
    tensors: int
    steps: int
    codes: int = 0
    scalars: int = 0  # norms, maxima, sums, checksum, step count and salt
    weights: int = 0  # with their remainders
    ulp: int = 0  # the largest difference of a weight
    skipped: int = 0  # tensor updates that the reference left out; no difference

    @property
    def differs(self) -> bool:
        """Whether any bit did."""
        return bool(self.codes or self.scalars or self.weights)


HEADER = [
    "checked against the C reference", "tensors", "steps", "mismatching codes", "mismatching scalars",
    "weights that differ", "largest difference in ulp", "skipped updates",
]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    return table(HEADER, [[str(x) for x in asdict(row).values()] for row in rows])


# -- the exported step -----------------------------------------------------------------------------------------------


def build_harness(compiler: str | None, folder: Path, harness: Path | None = None) -> Path:
    """Compile capi/harness.c, or another, with the C reference against torch's libraries; raises as `capi.build`."""
    libraries = Path(torch.__file__).parent / "lib"
    program = folder / "harness"
    sources = [harness or capi.include() / "harness.c", *(capi.include() / name for name in ("inputs.c", "lamb16.c"))]
    # DT_RPATH rather than DT_RUNPATH, because the step's library, which has neither, inherits only the former.
    link = [f"-L{libraries}", f"-Wl,--disable-new-dtags,-rpath,{libraries}", "-Wl,--no-as-needed"]
    link += ["-ltorch_cpu", "-lc10", "-ldl", "-lm"]
    macro = "-DHYPERPARAMETERS(X)=" + " ".join(f"X({name})" for name in capi.CHyper.NAMES)
    capi.run_compiler([*capi.find_compiler(compiler), *capi.FLAGS, macro], sources, program, link)
    return program


def run_harness(harness: Path, step: Path, exported: Exported, steps: int, seed: int) -> Row:
    """Run it with input checks on; raises `CommandError` (status 1) where it could not do its work."""
    done = subprocess.run(
        [str(harness), str(step)],
        input=plan(exported, steps, seed),
        env=os.environ | {"AOTI_RUNTIME_CHECK_INPUTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    words = done.stdout.split()
    found = dict(zip(words[::2], words[1::2], strict=False))
    if done.returncode not in (0, 1) or "codes" not in found:
        said = " ".join(done.stderr.split())[-500:] or "no message"
        raise CommandError(f"the exported step did not run (status {done.returncode}): {said}", status=1)
    print(done.stderr, end="", file=sys.stderr)
    return Row("exported step, run from C", **{name: int(value) for name, value in found.items()})


def plan(exported: Exported, steps: int, seed: int) -> str:
    """What the harness reads; floats in hexadecimal, so that none is rounded."""
    spec, hyper = exported.spec, capi.c_hyper(exported.spec.hyper)
    values = " ".join(float(getattr(hyper, name)).hex() for name in hyper.NAMES)
    lines = [f"{steps} {seed}", values, str(capi.DTYPES.index(spec.param_dtype)), str(len(spec.shapes))]
    for name, shape in zip(exported.names, spec.shapes, strict=True):
        lines.append(" ".join(map(str, [tensor_salt(0, name), len(shape), *shape])))
    return "\n".join(lines) + "\n"


# -- the steps in Python ---------------------------------------------------------------------------------------------


class Inputs:
    """The harness's seeded inputs (capi/inputs.h) as tensors; raises what `capi.build` does."""

    def __init__(self, compiler: str | None, folder: Path) -> None:
        path = capi.build(folder, compiler, files=[capi.include() / "inputs.c"])
        library = ctypes.CDLL(str(path))
        self._weights, self._gradient = library.inputs_weights, library.inputs_gradient
        self._lr, self._grad_factor = library.inputs_lr, library.inputs_grad_factor
        self._change = library.inputs_change
        number = ctypes.c_uint64
        self._change.argtypes, self._change.restype = [number, number], ctypes.c_int
        self._weights.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number]
        self._gradient.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number]
        self._weights.restype = self._gradient.restype = None
        self._lr.argtypes, self._grad_factor.argtypes = [ctypes.c_double, number], [number]
        self._lr.restype = self._grad_factor.restype = ctypes.c_double

    def weights(self, spec: Spec, seed: int) -> list[Tensor]:
        """The first weights of all tensors."""
        found = [torch.empty(shape) for shape in spec.shapes]
        for i, x in enumerate(found):
            self._weights(x.data_ptr(), x.numel(), seed, i)
        return [x.to(spec.param_dtype) for x in found]

    def gradients(self, spec: Spec, seed: int, step: int) -> list[Tensor]:
        """The gradients of step number ``step``."""
        found = [torch.empty(shape) for shape in spec.shapes]
        for i, x in enumerate(found):
            self._gradient(x.data_ptr(), x.numel(), seed, i, step)
        return [x.to(spec.param_dtype) for x in found]

    def changes(self, spec: Spec, step: int) -> Changes:
        """Whose middle weight is changed before step number ``step``."""
        return [i for i, x in enumerate(spec.shapes) if math.prod(x) and self._change(i, step)]

    def lr(self, lr: float, step: int) -> float:
        """The learning rate of a step, where the manifest has ``lr``."""
        return float(self._lr(lr, step))

    def grad_factor(self, step: int) -> float:
        """What the gradients of a step are multiplied by."""
        return float(self._grad_factor(step))


class ByRule:
    """Steps of a function like :func:`lamb16.reference.step`, which it takes tensor by tensor."""

    def __init__(self, rule: Any, weights: list[Tensor], names: list[str], hyper: Hyper) -> None:
        self.rule, self.skipped = rule, 0
        self.now: Results = [
            (w.clone(), reference.init(w, tensor_salt(0, name), param_rounding=hyper.param_rounding))
            for w, name in zip(weights, names, strict=True)
        ]

    def __call__(self, grads: list[Tensor], hyper: Hyper, grad_factor: float, changes: Changes) -> Results:
        change([p for p, _ in self.now], changes)
        for i, ((p, state), grad) in enumerate(zip(self.now, grads, strict=True)):
            p, state, stats = self.rule(p, grad, state, hyper, grad_factor)
            self.now[i] = p, state
            self.skipped += stats.skipped
        return self.now


def change(weights: Sequence[Tensor], changes: Changes) -> None:
    """Set the middle weights of these tensors, in place."""
    for i in changes:
        weights[i].view(-1)[weights[i].numel() // 2] = CHANGED


def by_optimizer(weights: list[Tensor], names: list[str], hyper: Hyper, compile: bool) -> Stepper:
    """Steps of Lamb16, which takes the factor as a gradient scaler's scale."""
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Lamb16(list(zip(names, params, strict=True)), **asdict(hyper), compile=compile)

    def step(grads: list[Tensor], hyper: Hyper, grad_factor: float, changes: Changes) -> Results:
        change([p.detach() for p in params], changes)
        optimizer.param_groups[0]["lr"] = hyper.lr
        scale = torch.tensor(1 / grad_factor, dtype=torch.float32)  # what the factor is the inverse of
        optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros(())  # type: ignore[attr-defined]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        try:
            optimizer.step()
        except RuntimeError as error:
            raise CommandError(str(error), status=1) from error
        return [(p.detach(), _state(optimizer.state[p])) for p in params]

    return step


def _state(entries: dict[str, Tensor]) -> State:
    tensors = {name: entries[name].view(torch.uint8) for name in MOMENTS} | {REMAINDER: entries.get(REMAINDER)}
    scalars = {name: entries[name].item() for name in SCALARS}
    return State(**tensors, **scalars | {"salt": int(scalars["salt"]) & 0xFFFFFFFF})  # type: ignore[arg-type]


# What is checked from Python: its line in the table, and how it starts from weights, names and hyperparameters.
STEPPERS: dict[str, tuple[str, Callable[[list[Tensor], list[str], Hyper], Stepper]]] = {
    "reference": ("Python reference", lambda *start: ByRule(reference.step, *start)),
    "eager": ("eager step", lambda weights, names, hyper: by_optimizer(weights, names, hyper, False)),
    "compiled": ("compiled step", lambda weights, names, hyper: by_optimizer(weights, names, hyper, True)),
}


def check_steppers(
    which: Sequence[str], library: capi.Library, inputs: Inputs, exported: Exported, steps: int, seed: int
) -> list[Row]:
    """Run these beside the C reference, all on the inputs that the harness has, and compare after every step."""
    spec, names = exported.spec, exported.names
    weights, hyper = inputs.weights(spec, seed), spec.hyper
    oracle = ByRule(library.step, weights, names, hyper)
    rows = [Row(STEPPERS[name][0], len(names), steps) for name in which]
    others = [STEPPERS[name][1](weights, names, hyper) for name in which]
    for step in range(steps):
        now = replace(hyper, lr=inputs.lr(hyper.lr, step))
        grads = inputs.gradients(spec, seed, step)
        grad_factor, changes = inputs.grad_factor(step), inputs.changes(spec, step)
        wanted = oracle(grads, now, grad_factor, changes)
        for row, other in zip(rows, others, strict=True):
            for mine, theirs in zip(other(grads, now, grad_factor, changes), wanted, strict=True):
                compare(row, mine, theirs)
    for row in rows:
        row.skipped = oracle.skipped
    return rows


def compare(row: Row, mine: tuple[Tensor, State], theirs: tuple[Tensor, State]) -> None:
    """Count what differs between two results of a tensor."""
    (p, a), (wanted, b) = mine, theirs
    if a.param_remainder is not None and b.param_remainder is not None:  # which make a difference of their own
        p, wanted = reference.joined(p, a.param_remainder), reference.joined(wanted, b.param_remainder)
    apart = (_ordinal(p) - _ordinal(wanted)).abs()
    row.weights += int((apart > 0).sum())
    row.ulp = max(row.ulp, int(apart.max()) if apart.numel() else 0)
    row.codes += int((a.exp_avg_codes != b.exp_avg_codes).sum()) + int((a.exp_avg_sq_codes != b.exp_avg_sq_codes).sum())
    row.scalars += sum(getattr(a, name) != getattr(b, name) for name in SCALARS)


def _ordinal(x: Tensor) -> Tensor:
    """Floats numbered in their order, int64; -0 is one below 0."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).long()
    return torch.where(bits < 0, -1 - (bits & (0x7FFFFFFF if x.dtype == torch.float32 else 0x7FFF)), bits)
