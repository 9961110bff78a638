"""Fixtures that all tests share."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import helpers
from lamb16.step import graph_code
from ranks import Ranks

WHOLE = 1000  # tests; fewer need few of the graphs


def pytest_collection_finish(session: pytest.Session) -> None:
    """A process of several that run all tests first exports and compiles its part of what they need."""
    if "PYTEST_XDIST_WORKER" in os.environ and len(session.items) > WHOLE and helpers.DEVICE.type == "cpu":
        import precompiled

        factory = session.config._tmp_path_factory
        exports = {"step": EXPORT} | {name: export_of_halves(name) for name in HALVES}
        jobs: list[Callable[[], object]] = [partial(exported_once, factory, *export) for export in exports.items()]
        jobs += [partial(graph_code.compile_once, graph, kind) for graph, kind in precompiled.graphs()]
        precompiled.share(factory.getbasetemp().parent / "precompiled", jobs)


@pytest.fixture(autouse=True)
def modes() -> Iterator[None]:
    """No test leaves a mode of torch's to the next."""
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(params=["eager", "compiled"])
def compile_mode(request: pytest.FixtureRequest) -> bool:
    """``compile=`` for Lamb16, once each; the graphs are compiled once per process."""
    return bool(request.param == "compiled")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for what runs on several ranks."""
    pool = Ranks()
    yield pool
    pool.stop()


# A large tensor, two small ones that share a block, one that does not, an empty one; no hyperparameter has its default.
EXPORT = [
    "--shapes", "70x31", "5", "5", "7x3", "0", "--lr", "0.02", "--betas", "0.8", "0.99", "--eps", "1e-5",
    "--weight-decay", "0.1", "--trust-scale", "0.5", "--trust-lr", "0.01", "--trust-clip", "1.5",
    "--no-bias-correction", "--no-nesterov", "--caution", "--maximize", "--threads", "1",
]  # fmt: skip


def exported_once(factory: pytest.TempPathFactory, name: str, words: list[str]) -> Path:
    """The folder that `lamb16 export` writes, by the first process of pytest-xdist's that needs it, for all of them."""
    from lamb16.cli import main

    temporary = factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "exports" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():  # whole, or not at all
            assert main(["export", *words, "-o", f"{folder}.part"]) == 0
            os.rename(f"{folder}.part", folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lamb16 export` writes; not to be changed."""
    return exported_once(tmp_path_factory, "step", EXPORT)


# Weights and gradients with 16 bits, in every way of rounding; a large tensor, and two small ones that share a block.
HALVES = {"exact": "bfloat16", "nearest": "bfloat16", "stochastic": "float16"}


def export_of_halves(rounding: str) -> list[str]:
    words = ["--shapes", "2050", "5", "5", "--threads", "1", "--weight-decay", "0.1", "--lr", "0.02"]
    return [*words, "--param-dtype", HALVES[rounding], "--param-rounding", rounding]


@pytest.fixture(scope="session", params=HALVES)
def exported_halves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for bfloat16 or float16, in a folder with the name of the rounding."""
    return exported_once(tmp_path_factory, request.param, export_of_halves(request.param))


@pytest.fixture
def exported_copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))
