"""docs/c-api.md: its C program is exported for, built and run as the document says, and learns."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lamb16
from lamb16 import capi
from lamb16.capi.manifest import Spec, inputs
from lamb16.hyper import Hyper

DOCUMENT = (Path(__file__).parents[1] / "docs" / "c-api.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_program_learns(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler named cc")
    (program,) = blocks("c")
    (commands,) = [block for block in blocks("sh") if "regression.c" in block]
    assert commands.startswith("lamb16 export ")
    (tmp_path / "regression.c").write_text(program)
    script = commands.replace("lamb16 export", f"{sys.executable} -m lamb16 export", 1)
    script = script.replace("$(python ", f"$({sys.executable} ").replace("\npython ", f"\n{sys.executable} ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(lamb16.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "regression.c:" not in done.stderr, "the compiler has something to say"
    losses = [float(x) for x in re.findall(r"^step \d+: loss (.*)$", done.stdout, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 5
    assert losses[-1] < 1e-4 < 10 < losses[0]


def test_the_table_of_inputs_is_the_exported_order() -> None:
    """With the remainders, which are there with exact rounding alone; the dtypes are those of float32 weights."""
    rows = re.findall(r"^\| `(\w+)(?:\.0)?` \| (\w+) \|", DOCUMENT, re.MULTILINE)
    exact = inputs(Spec([(3,)], Hyper(param_rounding="exact"), torch.bfloat16))
    usual = {x.name: x.dtype for x in inputs(Spec([(3,)], Hyper()))}
    assert rows == [(x.name.removesuffix(".0"), str(usual.get(x.name, x.dtype)).removeprefix("torch.")) for x in exact]


def test_the_numbers_of_statuses_dtypes_and_roundings_are_the_headers() -> None:
    header = (capi.include() / "lamb16.h").read_text()
    named = set(re.findall(r"`(LAMB16_\w+)` = (\d+)", DOCUMENT))
    enums = re.findall(r"typedef enum {(.*?)} lamb16_(\w+);", header, re.DOTALL)
    numbers = {enum: set(re.findall(r"\b(LAMB16_\w+) = (\d+)", body)) for body, enum in enums}
    assert named <= set.union(*numbers.values())
    assert numbers["dtype"] | numbers["rounding"] <= named
    assert named & numbers["status"], "those about 16-bit weights"
