"""Named lists of parameter shapes to measure on, after well-known models."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]


def mlp() -> list[Shape]:
    """Eight square layers of 1,024 with biases: 8.4 million parameters in 16 tensors."""
    return [shape for _ in range(8) for shape in ((1024, 1024), (1024,))]


def resnet18() -> list[Shape]:
    """ResNet-18 on 1,000 classes: 11.7 million parameters in 62 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            convs = [(width, width_in, 3, 3), (width, width, 3, 3)]
            if block == 0 and width != width_in:
                convs.append((width, width_in, 1, 1))
            for conv in convs:
                shapes += [conv, (width,), (width,)]
            width_in = width
    return [*shapes, (1000, 512), (1000,)]


def resnet50() -> list[Shape]:
    """ResNet-50 on 1,000 classes: 25.6 million parameters in 161 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            convs = [(width, width_in, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            if block == 0:
                convs.append((out, width_in, 1, 1))
            for conv in convs:
                shapes += [conv, (conv[0],), (conv[0],)]
            width_in = out
    return [*shapes, (1000, 2048), (1000,)]


def transformer(layers: int, width: int, embeddings: list[Shape]) -> list[Shape]:
    """Encoder or decoder blocks with separate query, key and value, and two norms each."""
    shapes = list(embeddings)
    for _ in range(layers):
        for _ in range(4):
            shapes += [(width, width), (width,)]
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        shapes += [(width,)] * 4
    return shapes


def small_transformer() -> list[Shape]:
    """Four layers of width 256 with 4,096 words: 4.2 million parameters in 66 tensors."""
    return transformer(4, 256, [(4096, 256), (128, 256)])


def bert_base() -> list[Shape]:
    """BERT-base without its heads: 108.9 million parameters in 197 tensors."""
    return transformer(12, 768, [(30522, 768), (512, 768), (2, 768), (768,), (768,)])


def bert_large() -> list[Shape]:
    """BERT-large without its heads: 334.1 million parameters in 389 tensors."""
    return transformer(24, 1024, [(30522, 1024), (512, 1024), (2, 1024), (1024,), (1024,)])


def gpt2() -> list[Shape]:
    """GPT-2 small, with separate query, key and value: 124.4 million parameters in 196 tensors."""
    return transformer(12, 768, [(50257, 768), (1024, 768), (768,), (768,)])


def tiny_tensors() -> list[Shape]:
    """Four hundred tensors of 1 to 1,000 elements: 0.2 million parameters."""
    return [(1 + 2503 * i % 1000,) for i in range(400)]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "transformer": small_transformer,
    "bert-base": bert_base,
    "bert-large": bert_large,
    "gpt2": gpt2,
    "tiny-tensors": tiny_tensors,
}
