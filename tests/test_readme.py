"""The README: its commands are the ones that CI runs, its example runs as written, its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_readmes_test_command() -> None:
    commands = [block.strip() for block in blocks("sh") if "pytest" in block]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_example_runs_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("python")
    monkeypatch.setattr("lamb16.optimizer.Lamb16.__init__.__kwdefaults__", {**_eager()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names: dict[str, object] = {}
        exec(example, names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.item() < 1.5, "below the 2.3 of guessing"


def _eager() -> dict[str, object]:
    """The constructor's keyword defaults with compile=False: graphs for this one example would take longer than it."""
    from lamb16 import Lamb16

    assert Lamb16.__init__.__kwdefaults__ is not None
    return Lamb16.__init__.__kwdefaults__ | {"compile": False}
