"""Generated code that is kept on disk, beside Inductor's own, so that a later process need not trace the step again.

Inductor finds its code again by the traced graph, and to trace it takes three quarters of a first step whose code is
cached. Here it goes by what the graph follows from: this package's sources, the versions of torch and Python, the
settings of Inductor and the processor. What the code needs (compiled C++ or kernels) is Inductor's to keep, and to make
anew where it is gone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

Origins = Sequence[tuple[int, str, int]]


def load(name: str) -> tuple[Callable[..., Any], Origins] | None:
    """The function of the code that is kept under this name and where its arguments come from, or None."""
    if not _is_used():
        return None
    try:
        content = json.loads(_path(name).read_text())
        return _function(content["source"]), [tuple(origin) for origin in content["origins"]]
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever it is, the code can be made again
        log.debug("lamb16: cached code for %s is of no use: %r", name, error)
        return None


def save(name: str, generated: Any, origins: Origins) -> None:
    """Keep generated code, a ``CompiledFxGraph``; nothing happens where that cannot be, as for code with constants."""
    source = getattr(generated, "source_code", "")
    if not (_is_used() and source) or getattr(generated, "constants", None):
        return
    from torch._inductor.codecache import write_atomic

    try:
        content = json.dumps({"name": name, "origins": origins, "source": source})
        write_atomic(str(_path(name)), content, make_dirs=True)
    except OSError as error:
        log.debug("lamb16: cannot keep code for %s: %r", name, error)


def _is_used() -> bool:
    """Whether Inductor may keep code, and code is to be used at all."""
    from torch._dynamo import config as dynamo
    from torch._dynamo.eval_frame import _stance
    from torch._inductor import config

    kept = config.fx_graph_cache and not config.force_disable_caches
    return kept and not dynamo.disable and _stance.stance == "default"


def _function(source: str) -> Callable[..., Any]:
    """The function of generated Python code, which takes a list of arguments."""
    from torch._inductor.codecache import PyCodeCache

    function: Callable[..., Any] = PyCodeCache.load(source).call
    return function


def _path(name: str) -> Path:
    """Where code of this name is kept for the present settings."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    settings = pickle.dumps([
        name, _sources(), torch.__version__, sys.version, torch.backends.cpu.get_cpu_capability(), _gpu(),
        os.environ.get("CXX"), torch.are_deterministic_algorithms_enabled(), config.save_config_portable(),
    ])  # fmt: skip
    return Path(cache_dir()) / "lamb16" / f"{hashlib.sha256(settings).hexdigest()[:32]}.json"


@functools.cache
def _sources() -> str:
    """A digest of the package's modules."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _gpu() -> tuple[Any, ...]:
    if not torch.cuda.is_available():
        return ()
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.cuda
