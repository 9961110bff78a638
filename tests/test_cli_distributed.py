"""`lamb16 train --distributed` under torchrun, the example of docs/distributed.md, and `lamb16 scale`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lamb16.cli import main
from lamb16.lab import scale
from test_cli_train import MNIST

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "distributed.md").read_text()


def torchrun(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def both(tmp_path: Path, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of two processes and of one."""
    options = ("train", "--device", "cpu", "--no-log", *options)
    torchrun("-m", "lamb16", *options, "--distributed", "--json", "two.json", cwd=tmp_path)
    assert main([*options, "--threads", "1", "--json", str(tmp_path / "one.json")]) == 0
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert (two["workers"], one["workers"]) == (2, 1)
    return two, one


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    two, one = both(tmp_path, "--dataset", "digits", "--epochs", "4", "--batch-size", "100", "--eager")
    first = two["epochs"][0]["train_loss"], one["epochs"][0]["train_loss"]
    assert first[0] == pytest.approx(first[1], rel=1e-3)
    assert two["final_accuracy"] == pytest.approx(one["final_accuracy"], abs=0.02)
    assert two["final_accuracy"] > 0.9
    assert 2 < two["state_bytes_per_parameter"] < 2.003


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST files in {MNIST}")
def test_two_processes_reach_the_accuracy_of_one_on_mnist(tmp_path: Path) -> None:
    options = ("--batch-size", "512", "--lr", "0.02", "--schedule", "linear", "--epochs", "1")
    two, one = both(tmp_path, "--dataset", "mnist", "--data", str(MNIST), *options)
    assert two["final_accuracy"] == pytest.approx(one["final_accuracy"], abs=0.005)
    assert two["final_accuracy"] > 0.95


def test_without_torchrun_the_way_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--distributed"]) == 2
    assert "torchrun --nproc-per-node 2 -m lamb16 train --distributed" in capsys.readouterr().err
    assert main(["train", "--distributed", "--optimizer", "published"]) == 2
    assert "published is for one process" in capsys.readouterr().err


def test_the_documents_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "train.py").write_text(example)
    torchrun("train.py", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["20"]


def test_the_documents_tables_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale"]) == 0
    printed = capsys.readouterr().out
    for table in (scale.communication(), scale.state()):
        assert table in DOCUMENT
        assert table in printed
    assert all(
        float(name[:-1]) * {"B": 1e9, "T": 1e12}[name[-1]] <= scale.elements(m) for name, m in scale.MODELS.items()
    )
