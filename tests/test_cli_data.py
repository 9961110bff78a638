"""The data sets: IDX files as they are found in the wild, whole and broken, and scikit-learn's digits."""

from __future__ import annotations

import gzip
import os
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lamb16.lab.data import load, read_idx
from lamb16.lab.errors import CommandError

MNIST = Path(os.environ.get("LAMB16_DATA") or Path(__file__).parents[2] / "shared" / "data" / "mnist")
NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx(tensor: Tensor) -> bytes:
    """The IDX file of a uint8 tensor, written from the format's description."""
    header = bytes([0, 0, 8, tensor.dim()]) + b"".join(n.to_bytes(4, "big") for n in tensor.shape)
    return header + bytes(tensor.flatten().tolist())


def small_set(train: int = 30, test: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.uint8)

    return {
        "train_images": draw(256, train, 28, 28),
        "train_labels": draw(10, train),
        "test_images": draw(256, test, 28, 28),
        "test_labels": draw(10, test),
    }


def write_set(folder: Path, tensors: dict[str, Tensor], *, zipped: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, tensor in tensors.items():
        content = idx(tensor)
        name = NAMES[key] + (".gz" if zipped else "")
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torchvision's downloads fail as they do without a network; the addresses it tried are returned."""
    mnist = pytest.importorskip("torchvision.datasets.mnist")
    tried: list[str] = []

    def fail(url: str, **_: object) -> None:
        tried.append(url)
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(mnist, "download_and_extract_archive", fail)
    monkeypatch.delenv("LAMB16_DATA", raising=False)
    return tried


@pytest.mark.parametrize("shape", [(5,), (3, 28, 28), (2, 4, 7), (0, 28, 28)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_an_idx_file_is_read_back(tmp_path: Path, shape: tuple[int, ...], pack: Callable[[bytes], bytes]) -> None:
    tensor = torch.randint(256, shape, dtype=torch.uint8)
    path = tmp_path / "file"
    path.write_bytes(pack(idx(tensor)))
    read = read_idx(path)
    assert read.dtype == torch.uint8
    assert torch.equal(read, tensor)


WHOLE = idx(torch.ones(3, 28, 28, dtype=torch.uint8))
ZIPPED = gzip.compress(WHOLE, mtime=0)  # a time would be in tests' names, on which the processes of xdist must agree


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file"),
        (b"\x89PNG\r\n\x1a\n", "no IDX file of images or labels: it starts with 0x89504e47"),
        (b"\x00\x00\x0d\x03" + WHOLE[4:], "no IDX file"),  # 0x0d: 32-bit floats
        (b"\x00\x00\x08\x02" + WHOLE[4:], "no IDX file"),  # a matrix: neither images nor labels
        (WHOLE[:10], "damaged"),
        (WHOLE[:-1], "declares 3x28x28 bytes, it has 2351"),
        (WHOLE + b"\x00", "declares 3x28x28 bytes, it has 2353"),
        (ZIPPED[:-20], "cannot read"),
        (ZIPPED[:12] + b"\xff\xff\xff\xff" + ZIPPED[16:], "cannot read"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(CommandError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_files_are_found_in_every_usual_layout(tmp_path: Path, place: str, zipped: bool) -> None:
    tensors = small_set()
    write_set(tmp_path / place, tensors, zipped=zipped)
    data = load("mnist", tmp_path)
    assert data.train_images.shape == (30, 1, 28, 28)
    assert data.test_images.shape == (10, 1, 28, 28)
    assert torch.equal(data.train_labels, tensors["train_labels"].long())
    assert torch.equal(data.test_labels, tensors["test_labels"].long())


def test_the_environment_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, small_set(train=7))
    monkeypatch.setenv("LAMB16_DATA", str(tmp_path))
    assert len(load("mnist").train_labels) == 7


def test_images_lie_in_0_to_1_or_are_normalized_by_the_training_images(tmp_path: Path) -> None:
    tensors = small_set()
    write_set(tmp_path, tensors)
    plain = load("mnist", tmp_path)
    assert torch.equal(plain.test_images.squeeze(1), tensors["test_images"].float() / 255)
    data = plain.normalized()
    assert data.train_images.dtype == torch.float32
    assert data.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_images.std().item() == pytest.approx(1, abs=1e-5)
    scaled = tensors["train_images"].double() / 255
    expected = (tensors["test_images"].double() / 255 - scaled.mean()) / scaled.std()
    torch.testing.assert_close(data.test_images.squeeze(1), expected.float())


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_images": torch.zeros(30, 27, 28, dtype=torch.uint8)}, "28x28"),
        ({"train_images": torch.zeros(0, 28, 28, dtype=torch.uint8)}, "28x28"),
        ({"test_labels": torch.zeros(9, dtype=torch.uint8)}, r"10 images in .*t10k-images.* \[9\] labels in"),
        ({"train_labels": torch.full((30,), 10, dtype=torch.uint8)}, "holds the label 10"),
        (
            {"test_labels": torch.tensor([9, 2, 1, 1, 6, 1, 4, 6, 5, 7], dtype=torch.uint8)},
            "to fashion-mnist, not",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, replaced: dict[str, Tensor], message: str) -> None:
    write_set(tmp_path, small_set() | replaced)
    with pytest.raises(CommandError, match=message):
        load("mnist", tmp_path)


def test_missing_data_says_what_was_looked_for_and_what_else_there_is(tmp_path: Path, no_network: list[str]) -> None:
    write_set(tmp_path, small_set())
    (tmp_path / f"{NAMES['test_labels']}.gz").unlink()
    with pytest.raises(CommandError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert no_network, "torchvision was not asked to download"
    assert all(name in message for name in NAMES.values())
    assert str(tmp_path) in message
    assert "--dataset digits" in message
    assert "LAMB16_DATA" in message
    assert "\n" not in message


def test_without_a_folder_the_cache_is_used(
    tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CommandError, match=str(tmp_path / ".cache" / "lamb16")):
        load("fashion-mnist")
    write_set(tmp_path / ".cache" / "lamb16" / "FashionMNIST" / "raw", small_set(train=3))
    assert len(load("fashion-mnist").train_labels) == 3


def test_a_download_is_read_from_where_torchvision_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist = pytest.importorskip("torchvision.datasets.mnist")
    source = tmp_path / "source"
    write_set(source, small_set(train=5))

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        zipped = (source / filename).read_bytes()
        (Path(download_root) / filename).write_bytes(zipped)
        (Path(download_root) / filename).with_suffix("").write_bytes(gzip.decompress(zipped))

    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    monkeypatch.setattr(mnist.MNIST, "_load_data", lambda self: (None, None))
    assert len(load("mnist", tmp_path / "target").train_labels) == 5


def test_digits_are_split_evenly_and_always_alike() -> None:
    pytest.importorskip("sklearn")
    data = load("digits")
    assert data.train_images.shape == (1437, 1, 28, 28)
    assert data.test_images.shape == (360, 1, 28, 28)
    counts = torch.bincount(data.test_labels, minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
    again = load("digits")
    assert all(torch.equal(a, b) for a, b in zip(vars(data).values(), vars(again).values(), strict=True))


def test_an_unknown_data_set_is_refused_by_name() -> None:
    with pytest.raises(CommandError, match=r"'cifar'.*digits, mnist, fashion-mnist"):
        load("cifar")


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"the MNIST files are not in {MNIST}; LAMB16_DATA names another folder")
def test_the_original_mnist_files() -> None:
    data = load("mnist", MNIST)
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    data = data.normalized()
    # (0 - mean) / std and (255 - mean) / std with the well-known mean 0.1307 and deviation 0.3081
    assert data.train_images.min().item() == pytest.approx(-0.4242, abs=1e-3)
    assert data.train_images.max().item() == pytest.approx(2.8215, abs=1e-3)
    with pytest.raises(CommandError, match="belongs to mnist, not to fashion-mnist"):
        load("fashion-mnist", MNIST)
