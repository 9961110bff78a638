"""Work that Inductor repeats for every operation of a loop, done once: a third to a half of the time to compile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary


@contextlib.contextmanager
def done_once() -> Iterator[None]:
    """A context in which the same code is generated in less time; docs/inductor.md says what is repeated otherwise.

    Where a version of torch lacks one of the functions, its work is done as often as that version does it.
    """
    from torch._inductor import sizevars
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
    from torch._inductor.loop_body import LoopBody
    from torch._inductor.utils import sympy_subs
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    set_up: Any = functools.cache(DtypePropagationOpsHandler.__init__)  # of the only instance
    from_arguments: Any = getattr(LoopBody, "indexing_from_args", None)
    simplify: Any = getattr(sizevars, "simplify_index_in_vec_range", None)
    symbols = functools.cache(lambda index: index.free_symbols)
    known: WeakKeyDictionary[Any, dict[Any, dict[str, Any]]] = WeakKeyDictionary()

    def replace_indirect(self: Any, old: Any, new: Any) -> None:
        if str(old) != str(new):
            self.indexing = {
                name: sympy_subs(index, {old: new}) if old in symbols(index) else index
                for name, index in self.indexing.items()
            }

    def indexing_from_args(self: Any, indices: Any, allow_same_symbol_in_index: bool = False) -> Any:
        own, key = known.setdefault(self, {}), (*map(tuple, indices), len(self.indexing_exprs))
        if key not in own:
            own[key] = from_arguments(self, indices, allow_same_symbol_in_index)
        return dict(own[key])

    def simplify_index_in_vec_range(index: Any, var: Any, vec_length: int) -> Any:
        return simplify(index, var, vec_length) if index.has(FloorDiv, ModularIndexing) else index

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(DtypePropagationOpsHandler, "__init__", lambda self: set_up(self)))
        for holder, function in (
            (LoopBody, replace_indirect),
            (LoopBody, indexing_from_args),
            (sizevars, simplify_index_in_vec_range),
        ):
            if hasattr(holder, function.__name__):
                stack.enter_context(mock.patch.object(holder, function.__name__, function))
        yield
