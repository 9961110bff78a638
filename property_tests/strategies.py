"""What the properties draw: hyperparameters, lists of shapes, weights and gradients of every awkward kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import missing
from lamb16.hyper import ROUNDINGS

# Around every edge of the blocks: 1024 columns, rows from two rows on, packed rows of 256.
EDGES = [
    (),
    (0,),
    (1,),
    (2,),
    (7,),
    (31, 3),
    (1023,),
    (1024,),
    (1025,),
    (2047,),
    (2048,),
    (2049,),
    (3, 1031),
    (5, 7, 11),
]
LARGE = [(4096,), (70, 71), (3 * 1024 + 1,), (16, 1024), (131, 257), (70001,)]

shapes = st.one_of(
    st.sampled_from(EDGES),
    st.sampled_from(LARGE),
    st.lists(st.integers(0, 12), max_size=3).map(tuple),
    st.integers(1, 3000).map(lambda n: (n,)),
)
shape_lists = st.lists(shapes, min_size=1, max_size=5)


HYPERPARAMETERS = {  # those that Lamb16 and the reference share; weight decay is usually not 0
    "lr": st.sampled_from([0.0, 1e-4, 1e-3, 0.01, 0.02, 0.3]),
    "betas": st.tuples(
        st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99]), st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999, 0.9999])
    ),
    "eps": st.integers(-16, -1).map(lambda n: 10.0**n),
    "weight_decay": st.sampled_from([0.01, 0.1, 1.0, 0.0]),
    "trust_scale": st.sampled_from([0.382, 0.0, 0.5, 1.0]),
    "trust_lr": st.sampled_from([1e-3, 0.1]),
    "trust_clip": st.sampled_from([2.0, 0.5, 10.0]),
    "bias_correction": st.booleans(),
    "nesterov": st.booleans(),
    "maximize": st.booleans(),
}
hyperparameters = st.fixed_dictionaries(HYPERPARAMETERS)

GRADIENTS = [
    "normal",
    "growing",
    "lognormal",
    "sparse",
    "constant",
    "outliers",
    "zero",
    "tiny",
    "subnormal",
    "huge",
    "inf",
    "nan",
]


def gradient(kind: str, like: Tensor, exponent: int, generator: torch.Generator, step: int = 0) -> Tensor:
    """A gradient of the given kind for ``like``; magnitudes around 10^exponent where the kind leaves it open."""
    normal = torch.randn(like.shape, generator=generator)
    scale = 10.0**exponent
    if kind == "growing":  # the same signs in every step, ever larger: m / sqrt(v) goes towards its bound
        signs = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).sign()
        normal = signs * scale * 1.11**step
    elif kind == "lognormal":
        normal = normal * (3 * torch.randn(like.shape, generator=generator)).exp() * scale
    elif kind == "sparse":
        normal = normal * (torch.rand(like.shape, generator=generator) < 0.05) * scale
    elif kind == "constant":
        normal = torch.full(like.shape, scale)
    elif kind == "outliers":
        normal = normal * torch.where(torch.rand(like.shape, generator=generator) < 0.01, 1e4, 1.0) * scale
    elif kind == "zero":
        normal = torch.zeros(like.shape)
    elif kind == "tiny":
        normal = normal * 1e-18
    elif kind == "subnormal":
        normal = normal * 1e-39
    elif kind == "huge":
        normal = normal * 1e19  # v overflows for some elements: skipped
    else:
        normal = normal * scale
    if kind in ("inf", "nan") and like.numel():
        normal.view(-1)[like.numel() // 2] = float(kind)
    return normal.to(like.dtype)


@dataclass
class Case:
    """One run: shapes, hyperparameters, and what the gradients of every step are."""

    shapes: list[tuple[int, ...]]
    hyper: dict[str, Any]
    dtype: torch.dtype = torch.float32
    moment_dtype: str = "float8"
    param_rounding: str = "stochastic"
    kinds: list[list[str | None]] = field(default_factory=list)  # [steps][tensors]; None: no gradient
    exponent: int = 0
    weight_exponent: int = 0
    seed: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # what step and salt are set to after the first step

    @property
    def words(self) -> dict[str, str]:
        """The hyperparameters that are no numbers."""
        return {"moment_dtype": self.moment_dtype, "param_rounding": self.param_rounding}

    def weights(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [(torch.randn(s, generator=generator) * 10.0**self.weight_exponent).to(self.dtype) for s in self.shapes]

    def gradients(self, step: int, weights: list[Tensor]) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + step + 1)
        return [
            None if kind is None else gradient(kind, w, self.exponent, generator, step)
            for kind, w in zip(self.kinds[step], weights, strict=True)
        ]


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of weights, moments, their rounding, and caution: what steps are compiled for. Not every combination is: each takes
# as long as the compiler; what these do does not depend on each other.
KINDS = [
    (F32, "float8", "stochastic", False), (F32, "float8", "stochastic", True),
    (F32, "float32", "stochastic", False), (F32, "float32", "stochastic", True),
    (BF16, "float8", "stochastic", False), (BF16, "float32", "stochastic", True), (BF16, "float8", "nearest", False),
    (BF16, "float8", "exact", False), (BF16, "float8", "exact", True), (BF16, "float32", "exact", False),
    (F16, "float8", "stochastic", False), (F16, "float32", "stochastic", True), (F16, "float8", "nearest", False),
]  # fmt: skip


LAST_STEP = 2**31 - 1
# Near the end of the count of steps, and of a salt as an int32 and as a number of 32 bits.
ENDS = [{"step": LAST_STEP - left, "salt": salt} for left in (2, 1, 0) for salt in (2**31 - 1, 2**32 - 1)]


@st.composite
def cases(
    draw: st.DrawFn,
    kinds: list[str] = GRADIENTS,
    dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16),
    moment_dtypes: tuple[str, ...] = ("float8", "float32"),
    roundings: tuple[str, ...] = ROUNDINGS,
    max_steps: int = 5,
) -> Case:
    """A run of three to ``max_steps`` steps over a list of random shapes: the first checks all, the others look."""
    case_shapes = draw(shape_lists)
    one = st.sampled_from([*kinds, None])
    possible = [x for x in KINDS if x[0] in dtypes and x[1] in moment_dtypes and x[2] in roundings]
    dtype, moment_dtype, rounding, caution = draw(st.sampled_from(possible))
    case = Case(
        shapes=case_shapes,
        hyper=draw(hyperparameters) | {"caution": caution},
        dtype=dtype,
        param_rounding=rounding,
        moment_dtype=moment_dtype,
        kinds=draw(
            st.lists(
                st.lists(one, min_size=len(case_shapes), max_size=len(case_shapes)), min_size=3, max_size=max_steps
            )
        ),
        exponent=draw(st.integers(-12, 4)),
        weight_exponent=draw(st.integers(-4, 1)),
        seed=draw(st.integers(0, 2**20)),
        counts=draw(st.sampled_from([{}] * len(ENDS) + ENDS)),
    )
    assert missing([*case.hyper, *case.words]) == set()
    return case
