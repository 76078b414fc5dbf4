"""Weights, settings and files from one framework to another, and what is said about losses."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from steadynorm.cli import app
from steadynorm.models.checkpoints import convert_settings, convert_weights
from steadynorm.models.files import read, write

RNG = np.random.default_rng(0)
TORCH = {
    "0.weight": RNG.standard_normal((4, 3)).astype(np.float32),
    "1.weight": RNG.standard_normal(4).astype(np.float32),
    "1.bias": RNG.standard_normal(4).astype(np.float32),
    "1.running_mean": RNG.standard_normal(4).astype(np.float32),
    "1.running_var": RNG.random(4).astype(np.float32) + 0.5,
    "1.num_batches_tracked": np.array(12),
    "block.bn.running_mean": np.zeros(2, np.float32),
    "block.bn.running_var": np.ones(2, np.float32),
}


def test_torch_to_keras_renames_and_divides_the_variance() -> None:
    values, remarks = convert_weights(TORCH, "torch", "keras", values_per_channel=5)
    assert sorted(values) == [
        "1/beta",
        "1/gamma",
        "1/moving_mean",
        "1/moving_variance",
        "block/bn/moving_mean",
        "block/bn/moving_variance",
    ]
    np.testing.assert_array_equal(values["1/gamma"], TORCH["1.weight"])
    np.testing.assert_allclose(values["1/moving_variance"], TORCH["1.running_var"] * 4 / 5, 1e-7)
    assert values["1/moving_variance"].dtype == np.float32
    assert remarks == (
        "1: num_batches_tracked (12) is left out: keras has no place for it.",
        "1 other arrays are left out: they are no batch normalization.",
    )


def test_flax_and_keras_keep_the_same_variance() -> None:
    flax = {"bn.scale": np.ones(3), "bn.mean": np.zeros(3), "bn.var": np.full(3, 2.0)}
    values, remarks = convert_weights(flax, "flax", "keras")
    np.testing.assert_array_equal(values["bn/moving_variance"], flax["bn.var"])
    assert remarks == ()


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("collections", [("", ""), ("params.", "batch_stats.")])
def test_flax_by_slashes_and_with_linens_collections(
    separator: str, collections: tuple[str, str]
) -> None:
    """linen keeps a layer's weight in another collection than its statistics."""
    learned, seen = collections
    flax = {
        f"{learned}block.bn.scale": np.full(3, 2.0),
        f"{learned}block.bn.bias": np.full(3, 3.0),
        f"{seen}block.bn.mean": np.full(3, 4.0),
        f"{seen}block.bn.var": np.full(3, 5.0),
    }
    named = {name.replace(".", separator): array for name, array in flax.items()}
    values, _ = convert_weights(named, "flax", "torch")
    first = {name: array[0] for name, array in values.items() if array.ndim}
    assert first == {
        "block.bn.weight": 2.0,
        "block.bn.bias": 3.0,
        "block.bn.running_mean": 4.0,
        "block.bn.running_var": 5.0,
    }


@pytest.mark.parametrize("other", ["keras", "flax"])
def test_there_and_back_is_the_same_checkpoint(other: str) -> None:
    layers = {name: a for name, a in TORCH.items() if name != "0.weight"}
    options: dict[str, Any] = {
        "values_per_channel": {"1": 7, "block.bn": 9, "block/bn": 9},
        "count_batches": True,
    }
    there = convert_weights(layers, "torch", other, **options).values
    back = convert_weights(there, other, "torch", **options).values
    for name, array in layers.items():
        np.testing.assert_allclose(back[name], array, rtol=1e-6)
        assert back[name].shape == array.shape
    assert int(back["block.bn.num_batches_tracked"]) == 1 << 30


def test_what_is_not_known_is_said() -> None:
    keras = {"bn/moving_mean": np.zeros(2), "bn/moving_variance": np.ones(2)}
    values, remarks = convert_weights(keras, "keras", "torch")
    assert remarks == (
        "bn: the running variance stays as it is, biased where torch keeps it unbiased: "
        "inference gives the same output. To go on training as torch would have trained, give "
        "values_per_channel.",
        "bn: the number of batches seen is not known: num_batches_tracked is 1073741824, so that "
        "the next batch is one of many.",
    )
    np.testing.assert_array_equal(values["bn.running_var"], 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({}, "torch", "keras"), "weights hold no batch normalization layer of torch"),
        ((TORCH, "onnx", "keras"), "source must be one of torch, keras, flax; got 'onnx'."),
        ((TORCH, "torch", "mlx"), "target must be one of torch, keras, flax; got 'mlx'."),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        convert_weights(*arguments)
    with pytest.raises(ValueError, match=r"values_per_channel must be at least 1; got 0 for '1'\."):
        convert_weights(TORCH, "torch", "flax", values_per_channel=0)


def test_settings_change_their_words() -> None:
    assert convert_settings({}, "keras", "torch") == (
        {"momentum": 0.01, "eps": 1e-3, "affine": True},
        (),
    )
    assert convert_settings({"momentum": 0.9, "use_bias": False}, "flax", "torch").values == {
        "momentum": 0.1, "eps": 1e-5, "affine": True, "bias": False,
    }  # fmt: skip
    assert convert_settings({"affine": False, "eps": 1e-4}, "torch", "flax").values == {
        "momentum": 0.9, "epsilon": 1e-4, "use_scale": False, "use_bias": False,
    }  # fmt: skip
    values, remarks = convert_settings({"momentum": None}, "torch", "keras")
    assert values["momentum"] == 0.99
    assert remarks[0].startswith("momentum=None averages over all batches; keras has no such")
    assert convert_settings({"scale": False}, "keras", "torch").remarks == (
        "torch learns no bias without a weight: the weight is 1, and learned.",
    )
    with pytest.raises(ValueError, match=r"that have a counterpart; got \['axis'\]"):
        convert_settings({"axis": 1}, "keras", "torch")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files_round_trip_and_an_old_one_stays_whole(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write(TORCH, path)
    found = read(path)
    assert found.keys() == TORCH.keys()
    for name, array in TORCH.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"arrays of numbers; got objects under \['last'\]"):
        write({**TORCH, "last": np.array([object()])}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_torch_files_are_read_without_running_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("ran").touch, ())

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3).bfloat16())
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found["1.running_var"].dtype == np.float32
    torch.save({"x": Evil()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt cannot be read: it would run \w+, which may be"):
        read(tmp_path / "b.pt")
    assert not (tmp_path / "ran").exists()


def test_the_command_converts_a_file_and_says_what_was_lost(tmp_path: Path) -> None:
    write(TORCH, tmp_path / "a.safetensors")
    arguments = ["--source", "torch", "--target", "flax", "--values-per-channel", "5"]
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.npz")]
    result = CliRunner().invoke(app, ["convert-weights", *files, *arguments])
    assert result.exit_code == 0, result.output
    assert "6 arrays written to" in result.output
    assert "num_batches_tracked (12) is left out: flax has no place for it." in result.output
    np.testing.assert_array_equal(read(tmp_path / "b.npz")["1.scale"], TORCH["1.weight"])
    for bad in ([files[0], "b.txt"], ["missing.npz", files[1]]):
        result = CliRunner().invoke(app, ["convert-weights", *bad, *arguments])
        assert result.exit_code == 2
        assert result.stderr.startswith("steadynorm convert-weights: ")


def test_the_command_does_not_write_over_its_source(tmp_path: Path) -> None:
    """The file would hold its batch norms alone then."""
    held = {**TORCH, "0.weight": np.ones((3, 3))}
    write(held, tmp_path / "a.safetensors")
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "folder" / ".." / "a.safetensors")]
    (tmp_path / "folder").mkdir()
    arguments = ["--source", "torch", "--target", "flax"]
    result = CliRunner().invoke(app, ["convert-weights", *files, *arguments])
    assert result.exit_code == 2
    assert "TARGET_FILE must be another file than SOURCE_FILE" in result.stderr
    assert read(tmp_path / "a.safetensors").keys() == held.keys()


def keras_file(path: Path, layers: dict[str, tuple[dict[str, Any], int, bool]]) -> None:
    """A file as Keras 3 writes it: by layer its settings, arrays, and whether a count follows."""
    h5py = pytest.importorskip("h5py")
    weights = path.with_name("model.weights.h5") if path.suffix == ".keras" else path
    with h5py.File(weights, "w") as file:
        for place, (name, (_, arrays, counted)) in enumerate(layers.items()):
            group = file.create_group(f"layers/batch_normalization_{place}/vars")
            group.attrs["name"] = name
            for number in range(arrays):
                group[str(number)] = np.full(3, number + 1.0, np.float32)
            if counted:
                group[str(arrays)] = np.int32(6)
    if path.suffix == ".keras":
        config = [
            {"class_name": "BatchNormalization", "config": {"name": name, **settings}}
            for name, (settings, *_) in layers.items()
        ]
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps({"config": {"layers": config}}))
            archive.write(weights, "model.weights.h5")


LAYERS = {
    "plain": ({}, 4, True),
    "center": ({"scale": False}, 3, True),
    "scale": ({"center": False}, 3, False),
    "bare": ({"scale": False, "center": False}, 2, False),
    "renorm": ({"renorm": True}, 7, False),
    "bare renorm": ({"renorm": True, "scale": False, "center": False}, 5, False),
}


def test_keras_settings_tell_what_a_layers_arrays_are(tmp_path: Path) -> None:
    keras_file(tmp_path / "a.keras", LAYERS)
    values, remarks = convert_weights(read(tmp_path / "a.keras"), "keras", "flax")
    found = {name.removeprefix("layers."): float(value[0]) for name, value in values.items()}
    expected = {
        0: ("scale", "bias", "mean", "var"),
        1: ("bias", "mean", "var"),
        2: ("scale", "mean", "var"),
        3: ("mean", "var"),
        4: ("scale", "bias", "mean", "var"),
        5: ("mean", "var"),
    }
    assert found == {
        f"batch_normalization_{place}.{name}": number + 1.0
        for place, names in expected.items()
        for number, name in enumerate(names)
    }
    own = "moving_stddev, renorm_mean, renorm_stddev of renorm=True are left out: flax has no place"
    assert [own in remark for remark in remarks].count(True) == 2
    assert not any("other arrays" in remark for remark in remarks)


def test_keras_arrays_without_settings_are_named_where_their_number_tells(tmp_path: Path) -> None:
    keras_file(tmp_path / "a.weights.h5", LAYERS)
    values, remarks = convert_weights(read(tmp_path / "a.weights.h5"), "keras", "flax")
    assert {name.split(".")[1] for name in values} == {
        "batch_normalization_0",
        "batch_normalization_4",
    }
    unclear = [remark for remark in remarks if "may be a batch normalization with" in remark]
    assert [remark.partition(":")[0] for remark in unclear] == [
        f"layers/batch_normalization_{place}" for place in (1, 2, 3, 5)
    ]
    assert not any("no batch normalization" in remark for remark in remarks)
    layer_norm = {f"layers/layer_normalization_1/{i}": np.ones(3) for i in range(2)}
    weights = read(tmp_path / "a.weights.h5") | layer_norm
    assert len(convert_weights(weights, "keras", "flax").remarks) == len(remarks) + 1
    keras_file(tmp_path / "b.weights.h5", {"center": LAYERS["center"]})
    with pytest.raises(
        ValueError, match=r"4 arrays are left out: they may be a batch norm.*\.keras"
    ):
        convert_weights(read(tmp_path / "b.weights.h5"), "keras", "flax")
