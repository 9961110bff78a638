"""Every block of docs/recipes.md runs as written, and learns; without compiling, which would take longer than all."""

import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lamb16 import Lamb16

DOC = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
SECTIONS = [section.partition("\n") for section in re.split(r"^## ", DOC, flags=re.MULTILINE)[1:]]
BLOCKS = {
    title: "\n".join(code)
    for title, _, text in SECTIONS
    if (code := re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
COMMON = BLOCKS.pop("A model and data", "")
NEEDS = {
    "transformers' Trainer": ("transformers", "accelerate"), "Lightning": ("lightning",), "accelerate": ("accelerate",),
    "timm": ("timm",), "PEFT": ("peft",), "FSDP2": (), "Gradient release": (), "Phases without steps": (),
    "Biases and norms": (),
}  # fmt: skip


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    yield
    torch.distributed.destroy_process_group()


def test_every_recipe_is_run() -> None:
    assert COMMON
    assert set(BLOCKS) == set(NEEDS)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NEEDS)
def test_the_recipe_runs_and_learns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (extra: recipes)")
    if name == "FSDP2":
        request.getfixturevalue("one_rank")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")
    assert Lamb16.__init__.__kwdefaults__ is not None
    monkeypatch.setattr(Lamb16.__init__, "__kwdefaults__", Lamb16.__init__.__kwdefaults__ | {"compile": False})
    names: dict[str, Any] = {"__name__": "recipe"}
    with torch.random.fork_rng():
        exec(COMMON, names)
        before = names["model"](names["x"], names["y"])["loss"].item()
        exec(BLOCKS[name], names)
    after = names["model"](names["x"], labels=names["y"])["loss"].item()
    assert after < before / 2, "of a loss of about 1"
    assert names.get("skipped", 0) == 0
