"""Copies of small tensors by their addresses: the same bytes as torch's own functions give."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bits import assert_same_bits, raw
from helpers import DEVICE, parameters, take_steps
from lamb16 import Lamb16
from lamb16.entries import find_largest
from lamb16.remainder import REMAINDER
from lamb16.step import cpu_copying
from lamb16.step.blocks import PACKED_ROW, Block, in_place
from lamb16.step.packing import AddressPacking, ForeachPacking, PackedRows, TablePacking, memory
from lamb16.step.rows import cut

SIZES = [21, 2100, 1, 256, 257, 4096, *range(1, 70)]
OF_COMPILED_STEPS = AddressPacking if DEVICE.type == "cpu" else TablePacking


def tensors(dtype: torch.dtype, exact: bool, seed: int) -> list[list[Tensor]]:
    """Random p, g, two moments and, if they are to be ``exact``, remainders of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = (dtype, dtype, torch.float8_e4m3fn, torch.float8_e5m2)
    random = [[torch.rand(n, generator=generator) for n in SIZES] for _ in kinds]
    found = [[x.to(kind) for x in own] for own, kind in zip(random, kinds, strict=True)]
    remainders = [torch.randint(-(2**15), 2**15, (n,), generator=generator, dtype=torch.int16) for n in SIZES]
    return [*found, remainders] if exact else found


def packing(name: type, packed_rows: list[PackedRows], dtype: torch.dtype, exact: bool) -> tuple[Any, Block]:
    """A packing of this class, and its block, full of other things."""
    rows = sum(packed.rows for packed in packed_rows)
    p, g = (torch.full((rows, PACKED_ROW), 7, dtype=dtype) for _ in range(2))
    m, v = (torch.full((rows, PACKED_ROW), 9, dtype=torch.uint8) for _ in range(2))
    remainders = [torch.full((rows, PACKED_ROW), 11, dtype=torch.int16)] * exact
    block = in_place([p, g, m, v, *remainders])
    if name is AddressPacking:
        function = cpu_copying.kernel()
        assert function is not None
        return AddressPacking(packed_rows, block, function), block
    moments = torch.float8_e4m3fn, torch.float8_e5m2
    return ForeachPacking(packed_rows, block, [(packed.length,) for packed in packed_rows], moments), block


@pytest.mark.parametrize(
    ("dtype", "exact", "threads"),
    [
        (torch.float32, False, 1), (torch.float32, False, 3), (torch.bfloat16, False, 1), (torch.bfloat16, True, 3),
        (torch.float16, False, 1),
    ],
)  # fmt: skip
def test_addresses_give_the_bytes_of_foreach(dtype: torch.dtype, exact: bool, threads: int) -> None:
    """So many tensors that several threads share them."""
    assert len(SIZES) > 63
    torch.set_num_threads(threads)
    try:
        _check_addresses(dtype, exact)
    finally:
        torch.set_num_threads(1)


def _check_addresses(dtype: torch.dtype, exact: bool) -> None:
    packed_rows = cut(SIZES)[1]
    assert any(packed.start for packed in packed_rows)
    both = [packing(name, packed_rows, dtype, exact) for name in (AddressPacking, ForeachPacking)]
    for seed in (0, 1, 1):  # other memory, twice with the same values
        given = [tensors(dtype, exact, seed) for _ in both]
        for (own, block), x in zip(both, given, strict=True):
            sources = own.sources(x)
            own.pack(sources, [1])
            own.pack(sources, [0, *range(2, len(x))])
            for k, buffer in enumerate(memory(block)):
                if k == 1:
                    continue
                buffer.copy_(buffer.flip(0))
            own.unpack(sources)
        for a, b in zip(*(memory(block) for _, block in both), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(*given, strict=True):
            for x, y in zip(a, b, strict=True):
                assert_same_bits(raw(x), raw(y))
        for k, (a, b) in enumerate(zip(given[0], tensors(dtype, exact, seed), strict=True)):
            assert torch.equal(raw(a[0]), raw(b[0])) == (k == 1)  # gradients are not copied back


def test_compiled_steps_copy_by_addresses() -> None:
    optimizer = stepped(1)
    assert [type(batch.packing) for plan in optimizer._stepper.last for batch in plan.batches] == [OF_COMPILED_STEPS]


def stepped(steps: int, dtype: torch.dtype = torch.float32) -> Lamb16:
    params = parameters(dtype=dtype)
    optimizer = Lamb16(params, lr=0.01, param_rounding="exact")
    take_steps(optimizer, range(steps))
    return optimizer


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on CUDA Triton copies, the C++ is for the CPU only")
def test_without_a_working_kernel_steps_are_the_same(caplog: pytest.LogCaptureFixture) -> None:
    expected = stepped(2)
    broken = mock.patch("torch._inductor.codecache.CppPythonBindingsCodeCache.load_pybinding", side_effect=OSError)
    cpu_copying.kernel.cache_clear()
    try:
        with broken, caplog.at_level(logging.WARNING, "lamb16"):
            optimizer = stepped(2)
    finally:
        cpu_copying.kernel.cache_clear()
    assert caplog.text.count("does not compile (OSError)") == 1
    assert [type(batch.packing) for plan in optimizer._stepper.last for batch in plan.batches] == [ForeachPacking]
    for p, q in zip(expected.state, optimizer.state, strict=True):
        assert torch.equal(p, q)
        values = zip(expected.state[p].values(), optimizer.state[q].values(), strict=True)
        for x, y in values:
            assert_same_bits(raw(x), raw(y))


def test_what_is_written_to_counts_as_changed() -> None:
    optimizer = stepped(1, torch.bfloat16)
    assert {type(batch.packing) for plan in optimizer._stepper.last for batch in plan.batches} == {OF_COMPILED_STEPS}
    entries = "exp_avg_codes", "exp_avg_sq_codes", REMAINDER
    written = [x for p, state in optimizer.state.items() for x in (p, *(state[key] for key in entries))]
    before = [x._version for x in written]
    optimizer.step()
    assert all(x._version > version for x, version in zip(written, before, strict=True))


def test_the_largest_codes_are_those_that_torch_finds() -> None:
    cpu_copying.kernel()
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

    with mock.patch.object(cpu_copying, "largest", return_value=None):
        expected = maxima()
    assert maxima() == expected
    assert len(set(expected)) > 20
    assert cpu_copying.largest(raws) is not None


def test_codes_that_the_kernel_cannot_read_are_left_to_torch() -> None:
    codes = torch.zeros(4, 4, dtype=torch.uint8)
    cpu_copying.kernel()
    assert cpu_copying.largest([codes]) is not None
    assert cpu_copying.largest([codes.T[1:]]) is None
    assert cpu_copying.largest([codes.to("meta")]) is None
    cpu_copying.kernel.cache_clear()
    assert cpu_copying.largest([codes]) is None  # eager steps need no compiler
    cpu_copying.kernel()
