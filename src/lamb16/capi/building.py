"""Where the sources of the C reference are, and how to build it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("gcc", "clang")
FLAGS = ("-std=c11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pedantic")


class NoCompilerError(RuntimeError):
    """There is no C compiler."""


class BuildError(RuntimeError):
    """The compiler refused the sources, or wrote nothing; the message holds the command or what it said."""


def include() -> Path:
    """The folder with ``lamb16.h``, for a compiler's -I."""
    return Path(__file__).parent


def sources() -> list[Path]:
    """The C files to compile."""
    return [include() / "lamb16.c"]


def find_compiler(compiler: str | None = None) -> list[str]:
    """The command of a C compiler: the given one, else $CC (which may have arguments), gcc, clang or cc.

    Raises:
        NoCompilerError: it is not on the PATH, or none of these is.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    wanted = [[compiler]] if compiler else [chosen, *([name] for name in (*COMPILERS, "cc"))]
    for words in wanted:
        found = shutil.which(words[0]) if words else None
        if found:
            return [found, *words[1:]]
    names = ", ".join(words[0] for words in wanted if words)
    raise NoCompilerError(f"no C compiler: {names} not found on the PATH; install gcc or clang, or name one in CC")


def build(
    folder: str | Path,
    compiler: str | None = None,
    flags: Sequence[str] = FLAGS,
    files: Sequence[Path] | None = None,
) -> Path:
    """Compile the C reference into a shared library and return its path, ``folder/liblamb16.so``.

    Args:
        folder: made if it is missing.
        compiler: its name or path; None for the first one found.
        flags: of the compiler, in place of :data:`FLAGS`; -fPIC, -shared, the include path and -lm are added.
        files: other C files in place of :func:`sources`.

    Raises:
        NoCompilerError: there is no such compiler.
        BuildError: it failed, or wrote no library.
    """
    folder = Path(folder)
    library = folder / "liblamb16.so"
    command = [*find_compiler(compiler), *flags, "-fPIC", "-shared"]
    folder.mkdir(parents=True, exist_ok=True)
    run_compiler(command, files or sources(), library, ["-lm"])
    return library


def run_compiler(command: Sequence[str], files: Sequence[Path], output: Path, link: Sequence[str]) -> None:
    """Compile files with ``lamb16.h`` on the include path; raises BuildError."""
    arguments = [*command, f"-I{include()}", *map(str, files), "-o", str(output), *link]
    if output.is_file():  # it would hide that none was written
        output.unlink()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(arguments)} failed with status {done.returncode}:\n{done.stderr}")
    if not output.is_file():
        raise BuildError(
            f"{command[0]} wrote no {output.name}: it is no C compiler, or was told not to link; name gcc or clang, "
            f"without such options. The command: {' '.join(arguments)}"
        )
