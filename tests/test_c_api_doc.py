"""docs/c-api.md: its C program is exported for, built and run as the document says, and learns."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lamb16

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
    from lamb16.capi.manifest import inputs

    rows = re.findall(r"^\| `(\w+)(?:\.0)?` \| (\w+) \|", DOCUMENT, re.MULTILINE)
    assert rows == [(x.name.removesuffix(".0"), str(x.dtype).removeprefix("torch.")) for x in inputs([(3,)])]
