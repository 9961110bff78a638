"""What a command raises for what the user can put right."""

from __future__ import annotations

import importlib
from typing import Any


class CommandError(Exception):
    """What the user can put right: shown as one line, without a traceback; the command ends with `status`."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def require(module: str) -> Any:
    """Import `module`, which the extra `train` brings, or raise a `CommandError` that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = "install it with: pip install 'lamb16[train]'"
        raise CommandError(f"this needs '{module}' ({error}); {hint}") from error
