"""The manifest beside an exported step: what the package is, and the checks before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lamb16 import __version__
from lamb16.checks import PARAM_DTYPES
from lamb16.entries import TABLES
from lamb16.hyper import FLAGS, Hyper, check_hyperparameters, numbers_of
from lamb16.remainder import REMAINDER

FORMAT = 3
PACKAGE, MANIFEST = "step.pt2", "manifest.json"
MAX_DIMS = 8  # AOTI_MAX_DIMS of aoti.h
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PARAM_DTYPES}  # of weights and gradients
TABLE_INPUTS = {"scales": torch.float32, "counters": torch.int32, "sums": torch.int64}  # columns: entries.TABLES
CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")  # what torch tells apart, in order

Shape = tuple[int, ...]


class ManifestError(ValueError):
    """A folder does not hold what `lamb16 export` wrote, or not for this machine and these versions."""


class Input(NamedTuple):
    """An input of the exported step."""

    name: str
    dtype: torch.dtype
    shape: Shape


class Spec(NamedTuple):
    """What a step is exported for."""

    shapes: list[Shape]
    hyper: Hyper
    param_dtype: torch.dtype = torch.float32  # of weights and gradients

    @property
    def exact(self) -> bool:
        """Whether there are remainders of the weights."""
        return self.param_dtype == torch.bfloat16 and self.hyper.param_rounding == "exact"

    @property
    def arrays(self) -> dict[str, torch.dtype]:
        """The inputs of each tensor."""
        found = {"param": self.param_dtype, "grad": self.param_dtype}
        found |= {"exp_avg_codes": torch.uint8, "exp_avg_sq_codes": torch.uint8}
        return found | {REMAINDER: torch.int16} if self.exact else found


def inputs(spec: Spec) -> list[Input]:
    """What a step takes, in order: the inputs of each tensor, then the tables and two numbers."""
    shapes = spec.shapes
    arrays = spec.arrays.items()
    found = [Input(f"{name}.{i}", dtype, shape) for i, shape in enumerate(shapes) for name, dtype in arrays]
    found += [Input(name, dtype, (len(shapes), len(TABLES[dtype]))) for name, dtype in TABLE_INPUTS.items()]
    return [*found, Input("lr", torch.float64, (1,)), Input("grad_factor", torch.float64, (1,))]


def wrong_rounding(spec: Spec) -> str:
    """What is wrong with the weights' dtype and rounding together; nothing: an empty string."""
    if spec.param_dtype == torch.float16 and spec.hyper.param_rounding == "exact":
        return "exact rounding is for bfloat16: float16's range is too small for a remainder to complete"
    return ""


def hyper_entries(hyper: Hyper) -> dict[str, Any]:
    """The hyperparameters under their names in C; moment_dtype is always float8."""
    found: dict[str, Any] = {name: bool(x) if name in FLAGS else x for name, x in numbers_of(vars(hyper)).items()}
    return found | {"param_rounding": hyper.param_rounding}


def hyper_of(entries: dict[str, Any]) -> Hyper:
    """What :func:`hyper_entries` made entries of; raises KeyError or TypeError for names that are not there."""
    values = dict(entries)
    betas = (values.pop("beta1"), values.pop("beta2"))
    return Hyper(betas=betas, **values)


def describe(spec: Spec, device: torch.device, options: dict[str, Any], package: Path) -> dict[str, Any]:
    """The manifest of a package that lies at ``package``."""
    return {
        "format": FORMAT,
        "lamb16": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "package": {"file": PACKAGE, "sha256": digest(package)},
        "hyperparameters": hyper_entries(spec.hyper),
        "param_dtype": str(spec.param_dtype).removeprefix("torch."),
        "inductor": options,
        "tensors": _tensor_entries(spec.shapes),
        "inputs": _input_entries(spec),
    }


def _tensor_entries(shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    return [{"name": str(i), "shape": list(x), "numel": math.prod(x)} for i, x in enumerate(shapes)]


def _input_entries(spec: Spec) -> list[dict[str, Any]]:
    return [
        {"name": x.name, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)} for x in inputs(spec)
    ]


def digest(package: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(package.read_bytes()).hexdigest()


def write(manifest: dict[str, Any], path: Path) -> None:
    """As JSON, one entry of a list on each line."""
    path.write_text(json.dumps(manifest, indent=1) + "\n")


@dataclass(frozen=True)
class Exported:
    """An exported step whose manifest has been checked."""

    package: Path
    device: str
    spec: Spec
    names: list[str]

    def extract(self, folder: Path) -> Path:
        """Unpack the step's shared library into ``folder`` and return its path; raises ManifestError."""
        try:
            with zipfile.ZipFile(self.package) as archive:
                found = [name for name in archive.namelist() if name.endswith(".so")]
                if len(found) != 1:
                    raise ManifestError(f"{self.package} holds {len(found)} shared libraries, not one: export it again")
                target = folder / "step.so"
                target.write_bytes(archive.read(found[0]))
                return target
        except (zipfile.BadZipFile, EOFError) as error:
            raise ManifestError(f"{self.package} is damaged ({error}): export it again") from error


def read(folder: Path) -> Exported:
    """Read and check what `lamb16 export` wrote into ``folder``; raises ManifestError with one line."""
    path = folder / MANIFEST
    content = _load(path)
    _check_versions(content, path)
    try:
        hyper = hyper_of(content["hyperparameters"])
        shapes = [tuple(int(n) for n in entry["shape"]) for entry in content["tensors"]]
        package, sha = folder / content["package"]["file"], content["package"]["sha256"]
        listed = content["tensors"], content["inputs"]
        spec = Spec(shapes, hyper, DTYPES[content["param_dtype"]])
        device, cpu = content["device"], content["cpu"]
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{path} lacks or misstates {error}: export it again") from error
    try:
        check_hyperparameters(asdict(hyper), f" ({path})")
    except (ValueError, OverflowError) as error:
        raise ManifestError(str(error)) from error
    if hyper_entries(hyper) != content["hyperparameters"] or wrong_rounding(spec):
        raise ManifestError(f"{path}: its hyperparameters are not those of a step: export it again")
    if any(min(x, default=0) < 0 or len(x) > MAX_DIMS or math.prod(x) >= 1 << 31 for x in shapes):
        raise ManifestError(f"{path}: it has a shape that no step can have: export it again")
    if listed != (_tensor_entries(shapes), _input_entries(spec)):
        raise ManifestError(f"{path}: its inputs are not those of a step over its tensors: export it again")
    _check_cpu(cpu, path)
    if not package.is_file():
        raise ManifestError(f"{package} is missing: export it again")
    if digest(package) != sha:
        raise ManifestError(f"{package} is damaged or of another export: its SHA-256 is not the one in {path}")
    return Exported(package, device, spec, [entry["name"] for entry in content["tensors"]])


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ManifestError(
            f"cannot read {path} ({error.strerror}): name a folder that `lamb16 export -o` wrote"
        ) from error
    except ValueError as error:
        raise ManifestError(f"{path} is damaged ({error}): export it again") from error
    if not isinstance(content, dict) or "format" not in content or "lamb16" not in content:
        raise ManifestError(f"{path} is no manifest of `lamb16 export`")
    return content


def _check_versions(content: dict[str, Any], path: Path) -> None:
    wanted = {"format": FORMAT, "lamb16": __version__, "torch": torch.__version__}
    for name, value in wanted.items():
        if content.get(name) != value:
            raise ManifestError(f"{path} is of {name} {content.get(name)}, this is {name} {value}: export it again")


def _check_cpu(cpu: Any, path: Path) -> None:
    """Refuse code for vector instructions that this processor lacks, as far as torch tells processors apart.

    The code is compiled for all instructions of the processor it was made on, and may die of an illegal one on another.
    """
    mine = torch.backends.cpu.get_cpu_capability()
    if cpu != mine and not (
        cpu in CPU_LEVELS and mine in CPU_LEVELS and CPU_LEVELS.index(cpu) < CPU_LEVELS.index(mine)
    ):
        raise ManifestError(f"{path}: the step was compiled for {cpu}, this processor has {mine}: export it here")
