"""Native code: copies of packed rows, addresses, and the largest codes, as torch's own functions have them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bits import raw
from helpers import parameters, take_steps
from lamb16 import Lamb16
from lamb16.entries import find_largest
from lamb16.remainder import REMAINDER
from lamb16.step import native
from lamb16.step.blocks import PACKED_ROW, in_place, memory
from lamb16.step.compiled import Compiled
from lamb16.step.kinds import Kind
from lamb16.step.rows import Rows

SIZES = [21, 2100, 1, 256, 257, 4096, *range(1, 300)]


def tensors(dtype: torch.dtype, exact: bool, seed: int) -> list[list[Tensor]]:
    """Random p, g, two moments and, if they are to be ``exact``, remainders of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = (dtype, dtype, torch.float8_e4m3fn, torch.float8_e5m2)
    random = [[torch.rand(n, generator=generator) for n in SIZES] for _ in kinds]
    found = [[x.to(kind) for x in own] for own, kind in zip(random, kinds, strict=True)]
    remainders = [torch.randint(-(2**15), 2**15, (n,), generator=generator, dtype=torch.int16) for n in SIZES]
    return [*found, remainders] if exact else found


@pytest.mark.parametrize(
    ("dtype", "exact", "threads"),
    [
        (torch.float32, False, 1), (torch.float32, False, 3), (torch.bfloat16, False, 1), (torch.bfloat16, True, 3),
        (torch.float16, False, 1),
    ],
)  # fmt: skip
def test_packed_rows_are_what_slices_give(dtype: torch.dtype, exact: bool, threads: int) -> None:
    """So many rows that several threads share them; of tensors at address 0 nothing is touched."""
    torch.set_num_threads(threads)
    try:
        _check_copies(dtype, exact)
    finally:
        torch.set_num_threads(1)


def _check_copies(dtype: torch.dtype, exact: bool) -> None:
    rows = Rows(Kind(torch.device("cpu")), SIZES)
    assert rows.packed_count > 255
    given, before = tensors(dtype, exact, 0), tensors(dtype, exact, 0)
    left_out = {2, 40}
    table = torch.tensor([[0 if i in left_out else x.data_ptr() for i, x in enumerate(own)] for own in given])
    dtypes = [own[0].dtype if own[0].element_size() > 1 else torch.uint8 for own in given]
    buffers = [torch.full((rows.packed_count, PACKED_ROW), 7, dtype=dtype) for dtype in dtypes]
    block = in_place(buffers, rows.places(torch.device("cpu")))
    Compiled().copy(table, block, range(len(given)), False)
    for k, buffer in enumerate(memory(block)):
        for packed in rows.packed_rows:
            own = buffer[packed.row : packed.row + packed.rows].view(-1)
            expected = before[k][packed.tensor_index][packed.start : packed.start + packed.length]
            if packed.tensor_index in left_out:
                assert (own == 7).all()
                continue
            assert torch.equal(raw(own[: packed.length]), raw(expected))
            assert not own[packed.length :].any(), "padding"
        buffer.copy_(buffer.flip(1))
    Compiled().copy(table, block, range(len(given)), True)
    for k, (a, b) in enumerate(zip(given, before, strict=True)):
        assert torch.equal(raw(a[1])[:2048], raw(b[1])[:2048]), "what is not packed"
        as_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a[3].element_size()]
        x, y = a[3].view(as_numbers), b[3].view(as_numbers)
        assert torch.equal(x, y if k == 1 else y.flip(0)), "gradients are not copied back"
        assert all(torch.equal(raw(a[i]), raw(b[i])) for i in left_out)


def test_addresses_are_looked_at() -> None:
    native.library()
    found = [torch.ones(3), nn.Parameter(torch.ones(2)), torch.ones(()), torch.zeros(0)]
    known = torch.tensor([x.data_ptr() for x in found])
    index = torch.tensor([3, 1])
    for there in (native.loaded, lambda: None):
        with mock.patch.object(native, "loaded", there):
            assert native.look(found, known, None, 1, False) == 0
            assert native.look([found[3], found[1]], known, index, 1, False) == 0
            assert native.look(found[2:], known.clone(), torch.tensor([1]), 2, False) == 0
            other = known.clone()
            other[1] += 4
            assert native.look(found, other, None, 1, False) == 1
            assert native.look([found[3], found[1]], other, index, 1, True) == 1
            assert torch.equal(other, known), "noted"
            assert native.look([Subclass(torch.ones(2))], known, None, 1, False) == -1
            assert native.look([torch.ones(2, device="meta")], known, None, 1, False) == 1


class Subclass(Tensor):
    """No plain tensor."""


def test_a_tensor_without_an_address_is_no_plain_one() -> None:
    """data_ptr() raises a C++ exception, which must not cross C."""
    native.library()

    def ask(x: Tensor) -> Tensor:
        assert native.look([x], torch.zeros(1).long(), None, 1, False) == -1
        return x

    torch.func.vmap(ask)(torch.ones(3, 2))


def stepped(steps: int, dtype: torch.dtype = torch.float32) -> Lamb16:
    params = parameters(dtype=dtype)
    optimizer = Lamb16(params, lr=0.01, param_rounding="exact")
    take_steps(optimizer, range(steps))
    return optimizer


def test_what_is_written_to_counts_as_changed() -> None:
    optimizer = stepped(1, torch.bfloat16)
    entries = "exp_avg_codes", "exp_avg_sq_codes", REMAINDER
    written = [x for p, state in optimizer.state.items() for x in (p, *(state[key] for key in entries))]
    before = [x._version for x in written]
    optimizer.step()
    assert all(x._version > version for x, version in zip(written, before, strict=True))


def test_the_largest_codes_are_those_that_torch_finds() -> None:
    native.library()
    generator = torch.Generator().manual_seed(0)
    raws = [
        torch.randint(k, k + n, (n,), generator=generator, dtype=torch.uint8) for k in (0, 100) for n in range(1, 70)
    ]
    raws += [torch.full((300,), 0x80, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)]

    def maxima() -> list[tuple[float, float]]:
        kinds = torch.float8_e4m3fn, torch.float8_e5m2
        states = [dict(zip(("exp_avg_codes", "exp_avg_sq_codes"), map(x.view, kinds), strict=True)) for x in raws]
        find_largest(*states)
        return [(float(state["exp_avg_max"]), float(state["exp_avg_sq_max"])) for state in states]

    with mock.patch.object(native, "largest", return_value=None):
        expected = maxima()
    assert maxima() == expected
    assert len(set(expected)) > 20
    assert native.largest(raws) is not None


def test_codes_that_the_kernel_cannot_read_are_left_to_torch() -> None:
    codes = torch.zeros(4, 4, dtype=torch.uint8)
    native.library()
    assert native.largest([codes]) is not None
    assert native.largest([codes.T[1:]]) is None
    assert native.largest([codes.to("meta")]) is None
    native._loaded.clear()
    assert native.largest([codes]) is None  # eager steps need no compiler
    native.library()
