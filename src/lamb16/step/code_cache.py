"""Generated code for CPUs that is kept on disk, beside Inductor's own, so that a later process need not trace the step.

Inductor finds its code again by the traced graph, and to trace it takes three quarters of a first step whose code is
cached. Here it goes by what the graph follows from: this package's sources, torch, the settings of Inductor and the
processor. The compiled C++ is Inductor's to keep, and to make anew where it is gone.

Not on CUDA: there Inductor puts copies of unaligned tensors around the code, and its options hold while code is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def _digest(package: Path) -> str:
    """Of all modules but those of ``lab``, none of which the step uses."""
    paths = sorted(path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "lab")
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


log = logging.getLogger(__name__)

Origins = Sequence[tuple[int, str, int]]
# A digest of the package's modules as they are imported, not as they are when the first step is made.
SOURCES = _digest(Path(__file__).parents[1])
PASSES = (
    "pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass", "_pre_fusion_custom_pass", "_post_fusion_custom_pass",
)  # fmt: skip


def load(name: str) -> tuple[Callable[..., Any], Origins] | None:
    """The function of the code that is kept under this name and where its arguments come from, or None."""
    try:
        if not (_is_used() and (path := _path(name)).exists()):
            return None
        content = json.loads(path.read_text())
        origins = [(int(position), str(what), int(dim)) for position, what, dim in content["origins"]]
        return (_function(content["source"]), origins) if origins else None
    except Exception as error:  # whatever it is, the code can be made again
        log.debug("lamb16: cached code for %s is of no use: %r", name, error)
        return None


def save(name: str, generated: Any, origins: Origins) -> None:
    """Keep generated code, a ``CompiledFxGraph``; nothing happens where that cannot be, as for code with constants."""
    try:
        from torch._inductor.codecache import write_atomic

        source = getattr(generated, "source_code", "")
        if source and _is_used() and not getattr(generated, "constants", None):
            content = json.dumps({"name": name, "origins": origins, "source": source})
            write_atomic(str(_path(name)), content, make_dirs=True)
    except Exception as error:  # as where a setting has no digest, or a folder cannot be written to
        log.debug("lamb16: cannot keep code for %s: %r", name, error)


def _is_used() -> bool:
    """Whether Inductor may keep code, and it alone is to make it."""
    from torch._dynamo import config as dynamo
    from torch._dynamo.eval_frame import _stance
    from torch._inductor import config

    kept = config.fx_graph_cache and not config.force_disable_caches and Path(__file__).exists()
    usual = not dynamo.disable and _stance.stance == "default" and _stance.backend is None
    return kept and usual and not any(getattr(config, name, None) for name in PASSES)


def _function(source: str) -> Callable[..., Any]:
    """The function of generated Python code, which takes a list of arguments."""
    from torch._inductor.codecache import PyCodeCache

    function: Callable[..., Any] = PyCodeCache.load(source).call
    return function


def _path(name: str) -> Path:
    """Where code of this name is kept for the present settings."""
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.codecache import torch_key
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    settings = pickle.dumps([
        name, SOURCES, torch_key(), sys.version, torch.backends.cpu.get_cpu_capability(),
        str(cpu_vec_isa.pick_vec_isa()), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.compiler.config.cache_key_tag, config.save_config_portable(ignore_private_configs=False),
    ])  # fmt: skip
    return Path(cache_dir()) / "lamb16" / f"{hashlib.sha256(settings).hexdigest()[:32]}.json"
