"""Checkpoints alone: layers by their names in every format, and files that nobody should trust."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.doctor.fixtures.small import small
from torch import nn
from typer.testing import CliRunner

from steadynorm.cli import app
from steadynorm.doctor import diagnose
from steadynorm.doctor.evidence import checkpoint as stored
from steadynorm.doctor.evidence.checkpoint import probe_state
from steadynorm.doctor.rules import all_rules
from steadynorm.models.checkpoints import convert_weights
from steadynorm.models.files import entries, write
from steadynorm.models.formats import Entry

FEW = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def state() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in small().state_dict().items()}


def save_pt(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": small().state_dict(), "note": "x"}, path)


def save_legacy(path: Path) -> None:
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=False)


def save_arrays(path: Path) -> None:
    write(state(), path)


def save_flax(path: Path) -> None:
    write(convert_weights(state(), "torch", "flax").values, path)


def save_h5(path: Path) -> None:
    """What Keras 3 writes: the variables of a layer are numbered."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, layer in (("1", small()[1]), ("4", small()[4])):
            group = file.create_group(f"layers/batch_normalization_{name}/vars")
            tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            for number, tensor in enumerate(tensors):
                group.create_dataset(str(number), data=tensor.detach().numpy())


def save_keras(path: Path, epsilon: tuple[float, float] = (1e-3, 1e-3)) -> None:
    inner = path.with_suffix(".inner.h5")
    save_h5(inner)
    layers = [
        {"class_name": "BatchNormalization", "config": {"momentum": 0.05, "epsilon": e}}
        for e in epsilon
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "model.weights.h5")
        archive.writestr("config.json", json.dumps({"config": {"layers": layers}}))
    inner.unlink()


SAVERS: dict[str, Callable[[Path], None]] = {
    "a.pt": save_pt,
    "a.pth": save_legacy,
    "a.safetensors": save_arrays,
    "a.npz": save_flax,
    "a.weights.h5": save_h5,
    "a.keras": save_keras,
}


@pytest.fixture(params=SAVERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    SAVERS[request.param](path)
    return path


def test_layers_are_found_in_every_format(saved: Path) -> None:
    evidence = probe_state(saved)
    names = [layer.name for layer in evidence.layers]
    if saved.suffix in (".h5", ".keras"):
        assert names == ["layers/batch_normalization_1", "layers/batch_normalization_4"]
    else:
        assert names == ["1", "4"]
    for layer in evidence.layers:
        assert layer.state.running_mean == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert layer.state.running_var == pytest.approx([1, 2, 3, 4])
        assert layer.state.weight == pytest.approx([0.7, 0.9, 1.1, 1.3])
        assert layer.state.bias == pytest.approx([0.1, -0.1, 0.2, -0.2])
        assert set(layer.state.dtypes.values()) == {"float32"}
        assert layer.usage is layer.data is None
    assert evidence.model is None
    assert evidence.target == str(saved)
    frameworks = {"a.npz": "flax", "a.weights.h5": "keras", "a.keras": "keras"}
    expected = frameworks.get(saved.name, "torch")
    assert {layer.state.framework for layer in evidence.layers} == {expected}
    counts = {layer.state.num_batches_tracked for layer in evidence.layers}
    assert counts == ({100} if expected == "torch" else {None})
    report = diagnose(saved)
    found = [(f.code, f.layer, str(f.severity)) for f in report.findings]
    momentum = [("SN107", name, "warning") for name in names]
    assert found == (momentum if saved.suffix == ".keras" else [])
    assert report.codes == tuple(rule.code for rule in all_rules() if rule.needs == "state")


def test_keras_settings_are_taken_where_layers_agree(tmp_path: Path) -> None:
    save_keras(tmp_path / "a.keras", epsilon=(1e-3, 1e-5))
    layer = probe_state(tmp_path / "a.keras").layers[0].state
    assert (layer.momentum, layer.eps, layer.known_eps) == (0.05, None, 1e-3)


def test_types_are_those_in_the_file(tmp_path: Path) -> None:
    model = small()
    model[1].to(torch.bfloat16)
    model[4].running_var = model[4].running_var.half()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    layers = probe_state(tmp_path / "a.pt").layers
    assert set(layers[0].state.dtypes.values()) == {"bfloat16"}
    assert layers[1].state.dtypes["running_var"] == "float16"
    report = diagnose(tmp_path / "a.pt")
    found = [(f.code, f.layer, str(f.severity)) for f in report.findings]
    # Cast whole, to be shipped; the other in its statistics alone.
    assert found == [("SN109", "4", "warning"), ("SN109", "1", "info")]


def test_a_state_dict_in_memory() -> None:
    held = small().state_dict()
    assert [layer.name for layer in probe_state(held).layers] == ["1", "4"]
    assert held["1.running_mean"].dtype == torch.float32
    nested = {"epoch": 3, "state_dict": {**held, "betas": [1, [2]]}}
    assert [layer.name for layer in probe_state(nested).layers] == ["1", "4"]
    alone = nn.BatchNorm1d(3)
    assert [layer.name for layer in probe_state(alone.state_dict()).layers] == [""]
    assert [f.code for f in diagnose(alone.state_dict()).findings] == ["SN101"]


@pytest.mark.parametrize(
    ("count", "expected"), [(np.array([7]), 7), (np.array(["x"]), None), (np.array(np.nan), None)]
)
def test_a_count_in_another_shape_or_none(count: np.ndarray, expected: int | None) -> None:
    (layer,) = probe_state(
        {"running_mean": np.ones(2), "running_var": np.ones(2), "num_batches_tracked": count}
    ).layers
    assert layer.state.num_batches_tracked == expected


@pytest.mark.parametrize(
    ("argument", "value"), [("forward", len), ("max_batches", 3), ("exporting", True)]
)
def test_what_a_checkpoint_has_no_use_for_is_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"diagnose: `{argument}` needs a model to go with it"):
        diagnose(small().state_dict(), **{argument: value})


def test_only_the_arrays_of_batch_norms_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of any size costs what its batch norms cost."""
    loaded: list[str] = []

    @contextmanager
    def watched(path: Path) -> Iterator[dict[str, Entry]]:
        with entries(path) as held:
            yield {name: entry._replace(load=watch(name, entry)) for name, entry in held.items()}

    def watch(name: str, entry: Entry) -> Callable[[], np.ndarray]:
        return lambda: (loaded.append(name), entry.load())[1]

    save_arrays(tmp_path / "a.safetensors")
    monkeypatch.setattr(stored, "entries", watched)
    assert len(probe_state(tmp_path / "a.safetensors").layers) == 2
    assert sorted(loaded) == sorted(set(state()) - {"0.weight", "3.weight"})


NOT_A_NORM = {
    "values of other ranks": {"a.running_mean": np.zeros((2, 2)), "a.running_var": np.ones((2, 2))},
    "of different lengths": {"a.running_mean": np.zeros(2), "a.running_var": np.ones(3)},
    "a mean and a var of anything": {"latents.mean": np.zeros(2), "latents.var": np.ones(2)},
    "nothing": {},
}


@pytest.mark.parametrize("held", NOT_A_NORM.values(), ids=NOT_A_NORM)
def test_what_is_no_layer(held: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^the state dict holds no batch normalization layer: no "
    ):
        probe_state(held)


# --- files that nobody should trust


class Command:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def doctor(path: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", str(path)])
    return result.exit_code, result.stderr


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_command_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "evil.pt"
    held = {**small().state_dict(), "last": Command(tmp_path / "ran")}
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)  # the file does hold the command
    (tmp_path / "ran").rmdir()
    code, line = doctor(path)
    assert code == 2
    assert line == (
        f"steadynorm doctor: {path} cannot be read: it would run posix.mkdir, which may be harmful "
        f"and is not run; save the state dict alone, or as .safetensors.\n"
    )
    assert not (tmp_path / "ran").exists()


def huge_safetensors(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def huge_npz(path: Path) -> None:
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        held, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.scale", "a.bias", "a.mean", "a.var"):
            archive.writestr(f"{name}.npy", held.getvalue())


def huge_h5(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        group = file.create_group("layers/batch_normalization/vars")
        for number in range(4):
            group.create_dataset(str(number), shape=(10**12,), chunks=(1024,), dtype="f4")


def linked_h5(path: Path) -> None:
    """Data that lies in another file of the reader's machine."""
    import h5py

    other = path.with_name("private.bin")
    other.write_bytes(np.ones(4, np.float32).tobytes())
    with h5py.File(path, "w") as file:
        group = file.create_group("layers/batch_normalization/vars")
        for number in range(4):
            group.create_dataset(str(number), (4,), "f4", external=[(str(other), 0, 16)])


def bomb_pt(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
        archive.writestr("a/version", "3")


def bomb_keras(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(10**7))


def other_things(path: Path) -> None:
    torch.save([1, 2, 3], path)


def script(path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


def zeros(path: Path) -> None:
    """30 GB that take no room on the disk."""
    with path.open("wb") as file:
        file.truncate(30 << 30)


CANNOT = {
    "zeros.pt": (zeros, "cannot be read: "),
    "zeros.safetensors": (zeros, "cannot be read: SafetensorError: "),
    "zeros.npz": (zeros, "cannot be read: This file contains pickled (object) data.\n"),
    "zeros.h5": (zeros, "cannot be read: OSError: "),
    "zeros.keras": (zeros, "cannot be read: BadZipFile: "),
    "huge.safetensors": (huge_safetensors, "SafetensorError"),
    "huge.npz": (huge_npz, "'a.scale' of shape (1000000000000,) is larger than such a file can"),
    "huge.weights.h5": (huge_h5, "'layers/batch_normalization/gamma' of shape (1000000000000,) is"),
    "linked.h5": (linked_h5, "its arrays lie in other files, which are not opened"),
    "bomb.pt": (bomb_pt, "it is compressed, which torch.save never does"),
    "bomb.keras": (bomb_keras, "its weights would be larger than such a file can hold"),
    "list.pt": (other_things, "it holds no state dict of tensors"),
    "text.pt": (lambda path: path.write_text("weights\n" * 99), "cannot be read: "),
    "hello.pt": (lambda path: path.write_text("hello"), "it is damaged, or of another kind."),
    "empty.pt": (lambda path: path.touch(), "empty.pt is empty."),
    "folder.pt": (lambda path: path.mkdir(), "is a folder; name the checkpoint file in it."),
    "missing.pt": (lambda path: None, "no such file: "),
    "picture.png": (lambda path: path.write_bytes(b"x"), "path must end in one of .safetensors, "),
    "linear.safetensors": (
        lambda path: write({"weight": np.ones((2, 2))}, path),
        "holds no batch normalization layer",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    make, words = CANNOT[name]
    make(tmp_path / name)
    code, line = doctor(tmp_path / name)
    assert code == 2
    assert line.startswith("steadynorm doctor: ")
    assert words in line
    assert line.count("\n") == 1
    assert len(line) < 500


def test_torchscript_is_refused(tmp_path: Path) -> None:
    script(tmp_path / "script.pt")
    code, line = doctor(tmp_path / "script.pt")
    assert (code, line.count("\n")) == (2, 1)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut off, or some bytes changed; heads and tails, where formats keep their numbers, as often
    as the middle."""
    if draw(st.integers(0, 5)) == 0:
        share = draw(st.floats(0, 0.999))
        return lambda data: data[: int(share * len(data))]
    changes = draw(
        st.lists(
            st.tuples(st.integers(-600, 6000), st.sampled_from([0, 1, 127, 128, 255])),
            min_size=1, max_size=8,
        )
    )  # fmt: skip

    def mutate(data: bytes) -> bytes:
        held = bytearray(data)
        for place, value in changes:
            held[place % len(held)] = value
        return bytes(held)

    return mutate


def refusal(path: Path) -> str:
    """Why a file is refused, which the command prints with exit code 2; empty if it is not."""
    try:
        diagnose(path)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", SAVERS)
@FEW
@given(mutate=mutations())
def test_mutated_bytes_are_read_or_refused(
    tmp_path: Path, name: str, mutate: Callable[[bytes], bytes]
) -> None:
    whole, broken = tmp_path / name, tmp_path / f"broken-{name}"
    if not whole.exists():
        SAVERS[name](whole)
    broken.write_bytes(mutate(whole.read_bytes()))
    line = refusal(broken)
    assert line == "" or line.startswith(str(broken))
    assert "\n" not in line


@pytest.mark.parametrize("name", SAVERS)
def test_half_a_file_is_refused(tmp_path: Path, name: str) -> None:
    """So the mutations above do break files, and the command says it in one line."""
    SAVERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    code, line = doctor(tmp_path / name)
    assert (code, line.count("\n")) == (2, 1)
    assert line.startswith(f"steadynorm doctor: {tmp_path / name} cannot be read: ")


def test_keras_and_flax_get_no_code_for_torch():
    arrays = [np.ones(4, "f4"), np.zeros(4, "f4"), np.zeros(4, "f4"), np.ones(4, "f4")]
    for framework, names in {
        "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
        "flax": ("scale", "bias", "mean", "var"),
        "torch": ("weight", "bias", "running_mean", "running_var"),
    }.items():
        separator = "/" if framework == "keras" else "."
        held = {f"norm{separator}{name}": a for name, a in zip(names, arrays, strict=True)}
        report = diagnose(held)
        (finding,) = report.findings
        assert finding.code == "SN101"
        assert bool(finding.line) is (framework == "torch")
        assert ("sn." in str(report)) is (framework == "torch")
