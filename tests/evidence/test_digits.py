"""The digits: an IDX parser against files written here byte by byte, and fixed splits."""

from __future__ import annotations

import gzip
import re
import struct

import numpy as np
import pytest

from steadynorm.evidence.digits import halve, load, read_idx

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}


def idx(values: np.ndarray, code: int) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape)
    return header + values.astype(">" + TYPES[code]).tobytes()


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (0, 4)])
def test_reads_every_type_and_rank(tmp_path, code, shape):
    values = (np.arange(np.prod(shape)) * 7 % 120).reshape(shape).astype(TYPES[code])
    path = tmp_path / "some-idx"
    path.write_bytes(idx(values, code))
    read = read_idx(path)
    assert read.dtype == np.dtype(TYPES[code])
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, values)


def test_reads_gzip(tmp_path):
    path = tmp_path / "some-idx.gz"
    path.write_bytes(gzip.compress(idx(np.array([5, 0, 4]), 0x08)))
    np.testing.assert_array_equal(read_idx(path), [5, 0, 4])


WHOLE = idx(np.array([1, 2, 3]), 0x08)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "not an IDX file: it must start with two zero bytes, a type and the number of axes; "
            "got an empty file.",
        ),
        (
            b"\x89PNG",
            "not an IDX file: it must start with two zero bytes, a type and the number of axes; "
            "got 89 50 4e 47.",
        ),
        (
            b"\0\0\x07\x01\0\0\0\0",
            "IDX type must be one of 0x08, 0x09, 0x0b, 0x0c, 0x0d, 0x0e; got 0x07.",
        ),
        (WHOLE[:6], "the header for 1 axes takes 8 bytes; the file has 6."),
        (
            WHOLE[:-1],
            "shape (3,) of uint8 takes 11 bytes with its header; the file has 10. "
            "It may be cut short: fetch it again.",
        ),
        (
            WHOLE + b"\0",
            "shape (3,) of uint8 takes 11 bytes with its header; the file has 12. "
            "It may be cut short: fetch it again.",
        ),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, content, message):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
        read_idx(path)


def test_a_cut_gzip_file_is_named(tmp_path):
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(bytes(1000))[:-9])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a whole gzip file"):
        read_idx(path)


def write_pair(folder, prefix, images, labels, suffix=""):
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(values, 0x08)
        path = folder / f"{prefix}-{kind}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if suffix else content)


@pytest.fixture
def mnist_like():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10, 6, 6)), np.arange(10)


def test_the_test_files_alone_are_split_four_to_one(tmp_path, mnist_like):
    images, labels = mnist_like
    write_pair(tmp_path, "t10k", images, labels, ".gz")
    digits = load(str(tmp_path))
    assert str(digits) == "MNIST test set, 3×3: 8 to train on, 2 to test on"
    both = np.concatenate([digits.train_labels, digits.test_labels])
    assert sorted(both) == list(labels)
    assert list(both) != list(labels), "the file's order is not random, the split must be"
    shown = np.concatenate([digits.train_images, digits.test_images])
    expected = images.reshape(10, 3, 2, 3, 2).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(shown, expected[both], rtol=1e-6)


def test_with_the_training_files_the_usual_split_is_kept(tmp_path, mnist_like):
    images, labels = mnist_like
    write_pair(tmp_path, "t10k", images[:3], labels[:3])
    write_pair(tmp_path, "train", images, labels)
    digits = load(str(tmp_path))
    assert digits.name == "MNIST"
    np.testing.assert_array_equal(digits.train_labels, labels)
    np.testing.assert_array_equal(digits.test_labels, labels[:3])


def test_a_folder_without_the_files(tmp_path):
    message = (
        "data_dir must hold t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, as they are or "
        f"with .gz (train-* beside them if you have it); found neither pair in {tmp_path}."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load(str(tmp_path))


def test_images_and_labels_must_belong_together(tmp_path, mnist_like):
    images, labels = mnist_like
    write_pair(tmp_path, "t10k", images, labels[:9])
    with pytest.raises(ValueError, match=r"labels must be one per image, shape \(10,\); got shape"):
        load(str(tmp_path))


def test_labels_must_be_digits(tmp_path, mnist_like):
    images, labels = mnist_like
    write_pair(tmp_path, "t10k", images, labels + 1)
    with pytest.raises(ValueError, match="labels must lie in 0 to 9; got 1 to 10"):
        load(str(tmp_path))


def test_half_a_pair_of_training_files_is_no_reason_to_train_on_the_test_files(
    tmp_path, mnist_like
):
    for prefix in ("t10k", "train"):
        write_pair(tmp_path, prefix, *mnist_like)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    message = (
        f"{tmp_path}: train-images-idx3-ubyte and train-labels-idx1-ubyte belong together; found "
        "train-images-idx3-ubyte alone."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images[:1], labels[:1]), "there must be digits to train on and"),
        (lambda images, labels: (images[:, :1], labels), "of at least 2×2 pixels; got MNIST"),
        (lambda images, labels: (0 * images + 51, labels), "images to train on are blank, all 0.2"),
    ],
)
def test_files_that_nothing_can_be_trained_on(tmp_path, mnist_like, change, message):
    write_pair(tmp_path, "t10k", *change(*mnist_like))
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_images_to_train_on_and_to_test_on_have_one_size(tmp_path, mnist_like):
    images, labels = mnist_like
    write_pair(tmp_path, "t10k", images, labels)
    write_pair(tmp_path, "train", images[:, 2:], labels)
    with pytest.raises(
        ValueError, match=r"must be of one size; got, reduced .* \(2, 3\) and \(3, 3\)"
    ):
        load(str(tmp_path))


def test_the_checksum_tells_digits_of_the_same_name_and_size_apart(tmp_path, mnist_like):
    images, labels = mnist_like
    found = []
    for name, shown, told in (("a", images, labels), ("b", images[:, ::-1], labels),
                              ("c", images, labels[::-1]), ("d", images, labels)):  # fmt: skip
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name, "t10k", shown, told)
        found.append(load(str(tmp_path / name)))
    assert len(set(map(str, found))) == 1
    first, other, relabelled, again = (digits.checksum() for digits in found)
    assert first == again
    assert len({first, other, relabelled}) == 3


def test_scikit_learns_digits_are_all_there_once():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from sklearn.datasets import load_digits

    digits = load()
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    assert digits.train_images.max() == 1.0
    together = np.concatenate([digits.train_images, digits.test_images]).reshape(1797, -1)
    original = load_digits().data / 16
    order = np.lexsort(together.T), np.lexsort(original.T)
    np.testing.assert_allclose(together[order[0]], original[order[1]], rtol=1e-6)


def test_halve_leaves_out_an_odd_row_and_column():
    images = np.arange(15, dtype=np.float32).reshape(1, 3, 5)
    np.testing.assert_array_equal(halve(images), [[[3.0, 5.0]]])
