"""Real handwritten digits: scikit-learn's 1,797, or MNIST from IDX files; as arrays and batches."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

# The third byte of an IDX file's magic number (LeCun's format; everything is big-endian).
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
SPLIT_SEED = 20150211  # the split is part of the data: the same for every experiment and seed


class Digits(NamedTuple):
    """Grey images (N, H, W), float32 from 0 to 1, with labels (N,) from 0 to 9."""

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return int(self.train_images[0].size)

    def checksum(self) -> str:
        """Of all images and labels: two sets of files may agree in everything else."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self[1:])).hexdigest()[:16]

    def __str__(self) -> str:
        height, width = self.train_images.shape[1:]
        return (
            f"{self.name}, {height}×{width}: {len(self.train_labels):,} to train on, "
            f"{len(self.test_labels):,} to test on"
        )


@lru_cache(maxsize=2)
def load(data_dir: str | Path | None = None) -> Digits:
    """scikit-learn's digits, or MNIST from the IDX files in `data_dir`, reduced to 14×14.

    With both pairs of files (`train-*` and `t10k-*`) the usual split is kept. The 10,000 digits of
    `t10k-*` alone are split 8,000 / 2,000 and scikit-learn's 1,797 are split 1,437 / 360, both in a
    fixed random order, since neither set is shuffled.

    Raises FileNotFoundError when the folder lacks a file, ValueError when one is broken or nothing
    can be trained on what they hold, and ModuleNotFoundError when scikit-learn is needed and
    missing.
    """
    if data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = (digits.images / 16).astype(np.float32)
        return _split("scikit-learn digits", images, digits.target.astype(np.int64))
    folder = Path(data_dir)
    test = _pair(folder, "t10k")
    train = _pair(folder, "train")
    if test is None:
        raise FileNotFoundError(
            f"data_dir must hold t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, as they are or "
            f"with .gz (train-* beside them if you have it); found neither pair in {folder}."
        )
    loaded = Digits("MNIST", *train, *test) if train else _split("MNIST test set", *test)
    _check(loaded, folder)
    return loaded


def _check(digits: Digits, folder: Path) -> None:
    images, test_images = digits.train_images, digits.test_images
    if not (images.size and test_images.size):
        raise ValueError(
            f"{folder}: there must be digits to train on and to test on, of at least 2×2 pixels; "
            f"got {digits}, after reducing to half the resolution."
        )
    if images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{folder}: images to train on and to test on must be of one size; got, reduced to "
            f"half, {images.shape[1:]} and {test_images.shape[1:]}."
        )
    if images.min() == images.max():
        raise ValueError(f"{folder}: the images to train on are blank, all {images.min():g}.")


def _split(name: str, images: Images, labels: Labels) -> Digits:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    train, test = np.split(order, [len(labels) * 4 // 5])
    return Digits(name, images[train], labels[train], images[test], labels[test])


def _pair(folder: Path, prefix: str) -> tuple[Images, Labels] | None:
    """The images and labels whose names start with `prefix`; None when neither is there."""
    stems = [f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    paths = [path for path in (_find(folder, stem) for stem in stems) if path]
    if not paths:
        return None
    if len(paths) < 2:
        raise FileNotFoundError(
            f"{folder}: {' and '.join(stems)} belong together; found {paths[0].name} alone."
        )
    images, labels = map(read_idx, paths)
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{paths[0]}: images must be bytes of shape (N, H, W); "
            f"got {images.dtype} of shape {images.shape}."
        )
    if labels.shape != (len(images),):
        raise ValueError(
            f"{paths[1]}: labels must be one per image, shape ({len(images)},); "
            f"got shape {labels.shape}."
        )
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(
            f"{paths[1]}: labels must lie in 0 to 9; got {labels.min()} to {labels.max()}."
        )
    return halve(np.divide(images, 255, dtype=np.float32)), labels.astype(np.int64)


def _find(folder: Path, stem: str) -> Path | None:
    names = [stem, f"{stem}.gz", stem.replace("-idx", ".idx"), stem.replace("-idx", ".idx") + ".gz"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def halve(images: Images) -> Images:
    """Images at half the resolution, each pixel the mean of four, without an odd last row
    or column.

    >>> halve(np.array([[[0, 1], [1, 2]]], np.float32))
    array([[[1.]]], dtype=float32)
    """
    count, height, width = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    blocks = even.reshape(count, height // 2, 2, width // 2, 2)
    means: Images = blocks.mean(axis=(2, 4), dtype=np.float32)
    return means


def read_idx(path: str | Path) -> NDArray[Any]:
    """The array in an IDX file (MNIST's format), gzipped or not, in the machine's byte order.

    Raises ValueError naming the file when it is not IDX, holds an unknown type, or is longer or
    shorter than its header says.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}).") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(
            f"{path}: not an IDX file: it must start with two zero bytes, a type and the number "
            f"of axes; got {content[:4].hex(' ') or 'an empty file'}."
        )
    kind, axes = content[2], content[3]
    if kind not in IDX_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in IDX_TYPES)
        raise ValueError(f"{path}: IDX type must be one of {known}; got 0x{kind:02x}.")
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(
            f"{path}: the header for {axes} axes takes {start} bytes; the file has {len(content)}."
        )
    shape = struct.unpack(f">{axes}I", content[4:start])
    dtype = np.dtype(IDX_TYPES[kind])
    required = start + prod(shape) * dtype.itemsize
    if len(content) != required:
        raise ValueError(
            f"{path}: shape {shape} of {dtype.name} takes {required} bytes with its header; "
            f"the file has {len(content)}. It may be cut short: fetch it again."
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def tensors(digits: Digits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test ones: images (N, 1, H, W), scaled to mean 0 and
    standard deviation 1 over the training set.
    """
    import torch

    mean, std = digits.train_images.mean(), digits.train_images.std()
    train, test = (
        torch.from_numpy((images - mean) / std).unsqueeze(1)
        for images in (digits.train_images, digits.test_images)
    )
    labels, test_labels = map(torch.from_numpy, (digits.train_labels, digits.test_labels))
    return train, labels, test, test_labels


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Index tensors of exactly `batch_size` from random permutations of `count`, without end. What
    is left over at the end of an epoch starts the next one's first batch.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        yield batch
