"""Image data sets, whole in memory: MNIST and Fashion-MNIST from IDX files, digits from scikit-learn."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import socket
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lamb16.lab.errors import CommandError, require

DATASETS = ("digits", "mnist", "fashion-mnist")
DATA_VARIABLE = "LAMB16_DATA"
CACHE = Path("~/.cache/lamb16")
SIDE = 28
CLASSES = 10

_TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Both data sets use the same file names and sizes, so a wrong folder would go unnoticed but for the labels.
_FIRST_TEST_LABELS = {
    "mnist": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9],
    "fashion-mnist": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7],
}


@dataclass(frozen=True)
class ImageData:
    """float32 images `[n, 1, 28, 28]` in [0, 1] and int64 labels `[n]`, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on `device`."""
        return ImageData(*(t.to(device) for t in vars(self).values()))

    def head(self, train: int, test: int) -> ImageData:
        """The first `train` training and the first `test` test images."""
        return ImageData(
            self.train_images[:train],
            self.train_labels[:train],
            self.test_images[:test],
            self.test_labels[:test],
        )

    def normalized(self) -> ImageData:
        """All images shifted and scaled by the mean and deviation of the training images."""
        std, mean = torch.std_mean(self.train_images)
        std = std.clamp_min(1e-6)  # images of one colour carry nothing, but are no reason to divide by 0
        train, test = (self.train_images - mean) / std, (self.test_images - mean) / std
        return ImageData(train, self.train_labels, test, self.test_labels)


def load(dataset: str, folder: str | os.PathLike[str] | None = None) -> ImageData:
    """Load a data set by name. `folder` (default: $LAMB16_DATA) holds the IDX files; digits needs none."""
    if dataset not in DATASETS:
        raise CommandError(f"unknown data set '{dataset}'; there are {', '.join(DATASETS)}")
    if dataset == "digits":
        return _load_digits()
    files = _find_files(dataset, folder)
    train_images, train_labels, test_images, test_labels = (read_idx(f) for f in files)
    _check_pair(files[0], train_images, files[1], train_labels)
    _check_pair(files[2], test_images, files[3], test_labels)
    _check_identity(dataset, files[3], test_labels)
    return _images(train_images.float() / 255, train_labels, test_images.float() / 255, test_labels)


def read_idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes, gzipped or not, as a uint8 tensor of the shape it declares."""
    content = _read_maybe_gzipped(path)
    dimensions = content[3] if len(content) >= 4 else 0
    if content[:3] != b"\x00\x00\x08" or dimensions not in (1, 3):
        raise CommandError(f"{path} is no IDX file of images or labels: it starts with 0x{content[:4].hex()}")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) < start or len(content) - start != math.prod(shape):
        raise CommandError(
            f"{path} is damaged: its header declares {'x'.join(map(str, shape))} bytes, "
            f"it has {max(0, len(content) - start)}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def _read_maybe_gzipped(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"cannot read {path}: {error}") from error


def _check_pair(images_path: Path, images: Tensor, labels_path: Path, labels: Tensor) -> None:
    if images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise CommandError(f"{images_path} should hold {SIDE}x{SIDE} images, not {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise CommandError(f"{len(images)} images in {images_path}, but {list(labels.shape)} labels in {labels_path}")
    if labels.max() >= CLASSES:
        raise CommandError(f"{labels_path} holds the label {int(labels.max())}; there are {CLASSES} classes")


def _check_identity(dataset: str, path: Path, test_labels: Tensor) -> None:
    first = test_labels[:10].tolist()
    for name, labels in _FIRST_TEST_LABELS.items():
        if name != dataset and first == labels:
            raise CommandError(f"{path} belongs to {name}, not to {dataset}")


def _find_files(dataset: str, folder: str | os.PathLike[str] | None) -> list[Path]:
    """The four files, from the named folder or the cache, downloaded where there is a network."""
    chosen = folder or os.environ.get(DATA_VARIABLE)
    root = Path(chosen or CACHE).expanduser()
    places = _places(dataset, root)
    for place in places:
        files = [_existing(place, stem) for stem in _STEMS]
        found = [f for f in files if f is not None]
        if len(found) == len(_STEMS):
            return found
    failure = _download(dataset, root)
    files = [_existing(places[0], stem) for stem in _STEMS]
    found = [f for f in files if f is not None]
    if failure or len(found) < len(_STEMS):
        raise CommandError(_not_found(dataset, places, failure or "it left files out"))
    return found


def _places(dataset: str, root: Path) -> list[Path]:
    """Where the files may lie under `root`: torchvision's layout first, the folder itself last."""
    return [root / _TORCHVISION_CLASS[dataset] / "raw", root / dataset, root]


def _existing(place: Path, stem: str) -> Path | None:
    return next((p for p in (place / f"{stem}.gz", place / stem) if p.is_file()), None)


def _download(dataset: str, root: Path) -> str | None:
    """Let torchvision fetch the files into `root`; return why that failed, or None."""
    try:
        datasets = require("torchvision.datasets")
        print(f"downloading {dataset} into {root}", file=sys.stderr)
        with _timeout(30), contextlib.redirect_stdout(sys.stderr):  # torchvision reports on stdout
            getattr(datasets, _TORCHVISION_CLASS[dataset])(root, download=True)
    except (CommandError, OSError, RuntimeError) as error:  # URLError is an OSError
        return " ".join(str(error).split()) or type(error).__name__
    return None


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """A network that swallows packets would otherwise hold the command for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _not_found(dataset: str, places: list[Path], failure: str) -> str:
    return (
        f"no {dataset} data: looked for {', '.join(f'{stem}[.gz]' for stem in _STEMS)} "
        f"in {', '.join(map(str, places))}, and the download failed ({failure}). "
        f"Name a folder with --data or {DATA_VARIABLE}, or use --dataset digits, which needs no files"
    )


def _load_digits() -> ImageData:
    """Scikit-learn's embedded 8x8 digits in a fixed stratified 80/20 split, brought to 28x28."""
    digits = require("sklearn.datasets").load_digits()
    pixels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False).squeeze(1)
    labels = torch.tensor(digits.target)
    split = require("sklearn.model_selection").train_test_split
    train, test = split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    return _images(images[train], labels[train], images[test], labels[test])


def _images(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> ImageData:
    """Both sets of images, `[n, 28, 28]`, with a channel."""
    return ImageData(train.unsqueeze(1), train_labels.long(), test.unsqueeze(1), test_labels.long())
