"""TensorBoard logs of a run: loss, accuracy, learning rate, and per layer what the optimizer did to it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lamb16.lab.errors import require

LAYER_VALUES = ("trust_ratio", "weight_norm", "update_norm")
SAMPLES_PER_EPOCH = 32


class TensorBoardLog:
    """Writes event files into `folder`. A context manager, so that they are complete even after an error."""

    def __init__(self, folder: Path) -> None:
        self._writer = require("torch.utils.tensorboard").SummaryWriter(str(folder))
        self._samples: dict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def sample_layers(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the layer values of the step just made, where the optimizer tells them."""
        layer_stats: Callable[[], dict[str, dict[str, Any]]] | None = getattr(optimizer, "layer_stats", None)
        if layer_stats is None:
            return
        for layer, values in layer_stats().items():
            for value in LAYER_VALUES:
                self._samples[f"{value}/{layer}"].append(float(values[value]))

    def end_epoch(self, epoch: int, scalars: dict[str, float]) -> None:
        """Write `scalars`, and per layer a histogram and the mean of what was sampled in this epoch."""
        for tag, number in scalars.items():
            self._writer.add_scalar(tag, number, epoch)
        for tag, sampled in self._samples.items():
            finite = [x for x in sampled if math.isfinite(x)]  # a diverged run has others: no histogram
            if finite:
                kind, layer = tag.split("/", 1)
                self._writer.add_histogram(tag, torch.tensor(finite), epoch)
                self._writer.add_scalar(f"{kind}_mean/{layer}", sum(finite) / len(finite), epoch)
        self._samples.clear()
        self._writer.flush()
