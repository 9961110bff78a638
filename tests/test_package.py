"""The public surface, and what is shipped."""

import ast
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

import lamb16
from helpers import missing, parameters
from lamb16.reference import Hyper


def test_public_names() -> None:
    assert sorted(lamb16.__all__) == [
        "Lamb",
        "Lamb16",
        "PublishedLamb16",
        "__version__",
        "register_timm",
        "release_gradients",
    ]
    for name in ("Lamb", "Lamb16", "PublishedLamb16"):
        assert issubclass(getattr(lamb16, name), torch.optim.Optimizer)


def test_star_import_brings_the_public_names_only() -> None:
    names: dict[str, object] = {}
    exec("from lamb16 import *", names)
    assert set(names) - {"__builtins__"} == set(lamb16.__all__)


def test_version_is_a_release() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev|\.post)\d+)?", lamb16.__version__)


def test_types_are_shipped() -> None:
    assert (Path(lamb16.__file__).parent / "py.typed").is_file()


def test_the_signature_is_the_documented_one() -> None:
    assert str(inspect.signature(lamb16.Lamb16)).replace("'", "").replace('"', "") == (
        "(params: ParamsT, lr: float | Tensor = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-06, "
        "weight_decay: float = 0.0, *, trust_scale: float = 0.382, trust_lr: float = 0.001, trust_clip: float = 2.0, "
        "bias_correction: bool = True, nesterov: bool = True, caution: bool = False, maximize: bool = False, "
        "moment_dtype: str = float8, param_rounding: str = stochastic, max_grad_norm: float | None = None, "
        "compile: bool | Executor = True, seed: int = 0, amp_scaling: bool = False) -> None"
    )


def test_every_argument_is_described() -> None:
    text, _, _ = str(inspect.getdoc(lamb16.Lamb16)).partition("Raises:")
    described = re.findall(r"^    (\w+): ", text, re.MULTILINE)
    assert described == list(inspect.signature(lamb16.Lamb16).parameters)
    assert missing(described) == set(), "fields of Hyper that the constructor lacks"


def test_the_defaults_of_optimizer_and_reference_agree() -> None:
    group = lamb16.Lamb16(parameters()).param_groups[0]
    assert {name: group[name] for name in Hyper.__dataclass_fields__} == vars(Hyper())


def test_importing_brings_neither_compiler_nor_command_line() -> None:
    code = "import sys, torch; before = set(sys.modules); import lamb16; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = done.stdout.split()
    assert "lamb16.optimizer" in added
    unwanted = ("torch._inductor", "torchvision", "sklearn", "matplotlib", "lamb16.cli", "lamb16.lab")
    assert [name for name in added if name.startswith(unwanted)] == []


def test_no_module_is_too_long_to_read() -> None:
    lines = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 350} == {}


def test_public_names_that_are_imported_later_are_there() -> None:
    code = (
        "import sys, lamb16; assert 'lamb16.release' not in sys.modules; "
        "assert set(lamb16.__all__) <= set(dir(lamb16)); "
        "print(*(getattr(lamb16, name).__name__ for name in lamb16.__all__ if name != '__version__')); "
        "print(hasattr(lamb16, 'no_such_name'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*(name for name in lamb16.__all__ if name != "__version__"), "False"]


def test_the_command_line_brings_no_command_before_it_is_run() -> None:
    code = "import sys, lamb16.cli; print(*(name for name in sys.modules if name.startswith('lamb16.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lamb16.cli" in done.stdout.split()
    assert [name for name in done.stdout.split() if name.startswith("lamb16.lab")] == []


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lamb16"


def importing(folder: str) -> set[str]:
    """The modules that import something of this folder, at their top or in a function, or have its name in a text."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(folder in name.split(".") for node in ast.walk(ast.parse(path.read_text())) for name in imported(node))
    }


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module or ''}.{alias.name}" for alias in node.names]
    is_name = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("lamb16.")
    return [node.value] if is_name else []


def test_the_command_line_alone_imports_the_lab() -> None:
    assert {name for name in importing("lab") if not name.startswith("lab/")} == {"cli.py"}


def test_what_the_step_stands_on_does_not_import_it() -> None:
    """Where shards lie and what ranks can exchange; the reduction of a step stands on it."""
    assert {name for name in importing("step") if name.startswith("sharding/")} == {"sharding/reduction.py"}


def test_a_wheel_is_built_with_all_modules(tmp_path: Path) -> None:
    """Built from the source tree without the network, and installed into an empty folder, from where it works."""
    pip = [sys.executable, "-m", "pip", "-q"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *built], check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"lamb16-{lamb16.__version__}-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"lamb16/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    assert sources | {"lamb16/py.typed", "lamb16/capi/lamb16.h", "lamb16/capi/lamb16.c"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name]
    assert {Path(name).suffix for name in names if name.startswith("lamb16/lab/")} == {".py"}
    assert wheel.stat().st_size < 400_000
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True)
    code = "import lamb16; print(lamb16.__file__, lamb16.__version__)"
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, check=True)
    assert run.stdout.decode().split() == [str(target / "lamb16/__init__.py"), lamb16.__version__]
