"""Every block of docs/recipes.md runs as written, and learns; without compiling, which would take longer than all."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
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
    "Gradient release in transformers' Trainer": ("transformers", "accelerate"), "Biases and norms": (),
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


def test_a_trainer_that_clips_is_refused_where_gradients_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")
    block, names = BLOCKS["Gradient release in transformers' Trainer"], {"__name__": "recipe"}
    assert "        max_grad_norm=0,\n" in block
    with torch.random.fork_rng():
        exec(COMMON, names)
        with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 would clip nothing"):
            exec(block.replace("        max_grad_norm=0,\n", ""), names)


# -- parameters without names, on two ranks --------------------------------------------------------------------------

PROGRAM = """
import hashlib, os, sys
import torch
from lamb16 import Lamb16, parameters

if os.environ["RANK"] == "0":  # a probe, before
    probe = torch.nn.Parameter(torch.ones(3))
    probe.grad = torch.ones(3)
    Lamb16([probe], compile=False).step()
original, salt = Lamb16.__init__, parameters.Parameters.salt


def bare(params):
    return [p[1] if isinstance(p, tuple) else p for p in params]


def without_names(self, params, **options):
    params = list(params)
    groups = [x | {{"params": bare(x["params"])}} for x in params] if isinstance(params[0], dict) else bare(params)
    original(self, groups, **options | {{"compile": False}})


Lamb16.__init__ = without_names
if sys.argv[1:] == ["other salts"]:
    parameters.Parameters.salt = lambda self, group, i: salt(self, group, i) + int(os.environ["RANK"])
{common}
network = model
{recipe}
weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in network.parameters()]
with open("digest of rank " + os.environ["RANK"], "w") as file:
    file.write(hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest())
"""


def digests(name: str, folder: Path, *words: str) -> set[str]:
    """Of the weights that a recipe has trained on two ranks."""
    (folder / "recipe.py").write_text(PROGRAM.format(common=COMMON, recipe=BLOCKS[name]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "recipe.py",
        *words,
    ]
    options = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | options, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {(folder / f"digest of rank {rank}").read_text() for rank in range(2)}


@pytest.mark.parametrize("name", ["transformers' Trainer", "accelerate", "FSDP2"])  # all others agree, too
def test_ranks_agree_without_names(name: str, tmp_path: Path) -> None:
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (extra: recipes)")
    assert len(digests(name, tmp_path)) == 1


def test_salts_that_differ_are_noticed(tmp_path: Path) -> None:
    assert len(digests("Biases and norms", tmp_path, "other salts")) == 2
