"""Folders that a checkpoint cannot be saved to or loaded from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def check_new(path: Path) -> None:
    """Raise ValueError for a folder that is there."""
    if path.exists():
        raise ValueError(f"lamb16.checkpoint.save: {path} exists; save every checkpoint into a folder of its own")


def check_complete(path: Path, unfinished: Path) -> None:
    """Raise ValueError for a folder without a checkpoint; ``unfinished`` is where it would be while it is saved."""
    if not (path / ".metadata").is_file():
        hint = f"; {unfinished.name} is one that was not finished" if unfinished.exists() else ""
        raise ValueError(
            f"lamb16.checkpoint.load: there is no checkpoint in {path}{hint}; name a folder that save wrote"
        )


def check_same_keys(path: Path, missing: Sequence[str], surplus: Sequence[str], unlike: Sequence[str]) -> None:
    """Raise ValueError where keys are not in the checkpoint, in it alone, or of other shapes or dtypes there."""
    for keys, fault in ((missing, "has no"), (surplus, "has also"), (unlike, "has another shape or dtype for")):
        if keys:
            raise ValueError(
                f"lamb16.checkpoint.load: {path} is not of this model and optimizer; load another one "
                f"(it {fault} {keys[0]})"
            )
