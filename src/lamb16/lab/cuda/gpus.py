"""What GPUs can do, by their makers' figures, and how long a kernel takes by them.

A kernel takes as long as the busiest of what it needs: memory's bytes, issue slots, or one of the pipes that execute
instructions. That is a lower bound: latencies, caches, and what keeps a memory from its full bandwidth are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .sass import OTHER, PIPES

ISSUE = 128  # issue slots of one multiprocessor per clock: four schedulers, one instruction of a warp (32 threads) each
ADAMW_BYTES = 28  # per parameter: fused AdamW reads p, g, m and v and writes p, m and v, float32
LAMB16_BYTES = 20  # per parameter: g twice, p read and written, two codes read and written

# Results (one per thread and instruction) of one multiprocessor per clock, by compute capability.
# From the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide 12.6,
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions-throughput-native-arithmetic-instructions:
#   fp32        32-bit floating-point add, multiply, multiply-add
#   multiply    32-bit integer multiply, multiply-add
#   integer     the least of 32-bit integer add, shift, bitwise operations, and compare, minimum, maximum: 64 all
#   fp64        64-bit floating-point add, multiply, multiply-add
#   conversion  all other type conversions: 16 where the guide has 16, and for 9.0 too (the guide's versions differ)
#   special     32-bit floating-point reciprocal, reciprocal square root, log2, exp2, sine, cosine
#   shuffle     warp shuffle
#   reduce      warp reduce
# and from the white papers of the architectures (Turing TU102, GA100, GA102, AD102, H100), the figure of a
# multiprocessor:
#   memory      load/store units
# 10.0 is given the rates of 9.0: that table of the guide has no column for it.
# An integer multiply-add is executed by the pipe of the float32 ones (see sass.PIPES), so it counts there too, and a
# packed float32 operation counts there twice.
RATES: dict[int, dict[str, int]] = {
    75: {"fp32": 64, "multiply": 64, "integer": 64, "fp64": 2, "conversion": 16, "special": 16, "shuffle": 16,
         "reduce": 16, "memory": 16},
    80: {"fp32": 64, "multiply": 64, "integer": 64, "fp64": 32, "conversion": 16, "special": 16, "shuffle": 32,
         "reduce": 16, "memory": 32},
    86: {"fp32": 128, "multiply": 64, "integer": 64, "fp64": 2, "conversion": 16, "special": 16, "shuffle": 32,
         "reduce": 16, "memory": 16},
    89: {"fp32": 128, "multiply": 64, "integer": 64, "fp64": 2, "conversion": 16, "special": 16, "shuffle": 32,
         "reduce": 16, "memory": 16},
    90: {"fp32": 128, "multiply": 64, "integer": 64, "fp64": 64, "conversion": 16, "special": 16, "shuffle": 32,
         "reduce": 16, "memory": 32},
}  # fmt: skip
RATES[100] = RATES[90]


@dataclass(frozen=True)
class GPU:
    """A GPU by its maker's figures."""

    name: str
    capability: int  # compute capability, without the point
    multiprocessors: int
    clock: float  # boost clock, Hz
    bandwidth: float  # of the device's memory, bytes per second

    @property
    def rates(self) -> dict[str, int]:
        """Results per multiprocessor and clock, by pipe."""
        return RATES[self.capability]


GPUS = (
    # NVIDIA T4 data sheet: 320 GB/s, 8.1 TFLOPS float32; Turing architecture white paper: 40 SM, 1590 MHz.
    GPU("T4", 75, 40, 1.590e9, 320e9),
    # NVIDIA A10 data sheet: 600 GB/s, 31.2 TFLOPS float32, 9,216 cores (72 SM of 128), which is 1695 MHz.
    GPU("A10", 86, 72, 1.695e9, 600e9),
    # NVIDIA Ampere GA102 white paper, table of the RTX 3090: 82 SM, 1695 MHz, 936 GB/s.
    GPU("RTX 3090", 86, 82, 1.695e9, 936e9),
    # NVIDIA Ada white paper, table of the RTX 4090: 128 SM, 2520 MHz, 1008 GB/s.
    GPU("RTX 4090", 89, 128, 2.520e9, 1008e9),
    # NVIDIA L4 data sheet: 300 GB/s, 30.3 TFLOPS float32; 7,424 cores (58 SM of 128), which is 2040 MHz.
    GPU("L4", 89, 58, 2.040e9, 300e9),
    # NVIDIA A100 data sheet, 80 GB SXM: 2039 GB/s, 19.5 TFLOPS float32; A100 white paper: 108 SM, 1410 MHz.
    GPU("A100", 80, 108, 1.410e9, 2039e9),
    # NVIDIA H100 data sheet, SXM: 3.35 TB/s, 67 TFLOPS float32; H100 white paper: 132 SM of 128 cores: 1980 MHz.
    GPU("H100", 90, 132, 1.980e9, 3350e9),
    # NVIDIA DGX B200 data sheet: 64 TB/s for eight; HGX B200: 600 TFLOPS float32 for eight; 148 SM by the device's
    # properties (cudaDeviceProp), which is 1980 MHz.
    GPU("B200", 100, 148, 1.980e9, 8000e9),
)


@dataclass(frozen=True)
class Work:
    """What a kernel does per parameter: bytes that memory moves, and issue slots by pipe."""

    moved: float
    slots: Mapping[str, float]

    @property
    def total(self) -> float:
        """Issue slots per parameter."""
        return sum(self.slots.values())


def times(work: Work, gpu: GPU) -> dict[str, float]:
    """Seconds per parameter that each resource of the GPU needs: "bytes", "issue", and the pipes by name."""
    clocks = gpu.multiprocessors * gpu.clock
    found = {"bytes": work.moved / gpu.bandwidth, "issue": work.total / (ISSUE * clocks)}
    for pipe, rate in gpu.rates.items():
        slots = work.slots.get(pipe, 0.0)
        if pipe == "fp32":
            slots += work.slots.get("multiply", 0.0) + 2 * work.slots.get("packed", 0.0)
        found[pipe] = slots / (rate * clocks)
    return found


@dataclass(frozen=True)
class Prediction:
    """How long kernels that run one after the other take on a GPU, all in seconds per parameter."""

    time: float
    resources: dict[str, float]  # each resource's time alone, summed over the kernels
    bounds: list[str]  # of each kernel, the resource that it waits for

    @property
    def pipe(self) -> str:
        """The busiest pipe."""
        pipes = [name for name in self.resources if name in PIPES]
        return max(pipes, key=self.resources.__getitem__)


def predict(kernels: Sequence[Work], gpu: GPU) -> Prediction:
    """The time of kernels that run one after the other: of each, that of its busiest resource."""
    found = [times(work, gpu) for work in kernels]
    bounds = [max(each, key=each.__getitem__) for each in found]
    return Prediction(
        sum(each[bound] for each, bound in zip(found, bounds, strict=True)),
        {name: sum(each[name] for each in found) for name in found[0]},
        bounds,
    )


def columns() -> list[str]:
    """The pipes in the order in which tables show them."""
    return [*PIPES, OTHER]
