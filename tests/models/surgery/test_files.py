"""Files: read without running anybody's code, replaced whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from steadynorm.files import replacing
from steadynorm.models import files, named
from steadynorm.models.files import load_weights, read_data, read_tensors, write

STATE = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.npz"])
def test_written_and_read_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    write(STATE, path)
    read = read_tensors(path)
    assert all(torch.equal(read[key], value) for key, value in STATE.items())
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_shared_tensors_and_views_are_written_whole(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    write({"a": shared, "b": shared, "c": shared.t()}, tmp_path / "w.safetensors")
    read = read_tensors(tmp_path / "w.safetensors")
    assert torch.equal(read["b"], shared)
    assert torch.equal(read["c"], shared.t())


def test_types_of_other_machines_and_of_other_libraries(tmp_path: Path) -> None:
    np.savez(tmp_path / "big.npz", a=np.arange(3, dtype=">f4"))
    np.save(tmp_path / "big.npy", np.arange(3, dtype=">f4"))
    assert torch.equal(read_tensors(tmp_path / "big.npz")["a"], torch.arange(3.0))
    assert torch.equal(read_data(tmp_path / "big.npy"), torch.arange(3.0))
    write({"a": torch.ones(2).to(torch.float8_e4m3fn), "b": np.ones(2)}, tmp_path / "w.safetensors")
    assert {
        name: str(array.dtype) for name, array in files.read(tmp_path / "w.safetensors").items()
    } == {
        "a": "float32",
        "b": "float64",
    }
    with pytest.raises(ValueError, match=r"weights must be arrays of numbers; .* \['name'\]"):
        write({"name": np.array("x")}, tmp_path / "w.safetensors")


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model"])
def test_nested_checkpoints(tmp_path: Path, nest: str) -> None:
    torch.save({nest: STATE, "epoch": 3}, tmp_path / "w.pt")
    assert torch.equal(read_tensors(tmp_path / "w.pt")["bias"], STATE["bias"])


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weight": Evil()}, tmp_path / "w.pt")
    for read in (read_tensors, read_data):
        with pytest.raises(
            ValueError, match=r"w\.pt cannot be read: it would run \w+\.mkdir, which"
        ):
            read(tmp_path / "w.pt")
    np.save(tmp_path / "d.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"d\.npy cannot be read"):
        read_data(tmp_path / "d.npy")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        read_tensors(tmp_path / "w.pt")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    write(STATE, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"(?s)does not fit the model.*size mismatch"):
        load_weights(nn.Linear(4, 2), tmp_path / "w.pt")


def test_data(tmp_path: Path) -> None:
    x, y = torch.randn(2, 3), torch.randn(4)
    np.save(tmp_path / "d.npy", x.numpy())
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    torch.save((x, y), tmp_path / "d.pt")
    write({"x": x}, tmp_path / "d.safetensors")
    assert torch.equal(read_data(tmp_path / "d.npy"), x)
    assert torch.equal(read_data(tmp_path / "d.npz")["y"], y)
    assert torch.equal(read_data(tmp_path / "d.pt")[1], y)
    assert torch.equal(read_data(tmp_path / "d.safetensors"), x)


@pytest.mark.parametrize(
    ("spec", "error", "why"),
    [
        ("torch.nn", ValueError, "MODEL must be package.module:name; got 'torch.nn'"),
        ("no.such.thing:f", ValueError, "cannot be found: No module"),
        ("torch.nn:NoSuchThing", ValueError, "MODEL 'torch.nn:NoSuchThing' cannot be found"),
        ("builtins:dict", TypeError, "builtins:dict made dict"),
    ],
)
def test_models_that_are_none(spec: str, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        named.model(spec)


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path) as beside:
            beside.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write(STATE, path)
    assert path.stat().st_mode & 0o777 == 0o640


WRITER = """
    import sys, time
    from pathlib import Path
    import torch
    from safetensors import torch as safetensors
    from steadynorm.models import files, formats

    def slowly(weights, path):
        whole = safetensors.save(weights)
        with open(path, "wb") as file:
            file.write(whole[: len(whole) // 2])
            file.flush()
            print("half", flush=True)
            time.sleep(60)
            file.write(whole[len(whole) // 2 :])

    formats.WRITERS[".safetensors"] = slowly
    files.write({"weight": torch.zeros(1000)}, Path(sys.argv[1]))
"""


def test_a_kill_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(STATE, path)
    before = path.read_bytes()
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"  # it is in the middle of writing
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert path.read_bytes() == before
    write({"weight": torch.ones(1)}, path)  # and what it left beside is in nobody's way
    assert torch.equal(read_tensors(path)["weight"], torch.ones(1))


def test_names_that_npz_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the names 'a' and 'a.npy' apart; write .safetensors"):
        write({"a": torch.zeros(2), "a.npy": torch.ones(2)}, tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())


def test_npz_takes_the_names_that_numpy_has_for_its_own(tmp_path: Path) -> None:
    weights = {name: np.array([at]) for at, name in enumerate(["file", "allow_pickle", "a/b"])}
    write(weights, tmp_path / "w.npz")
    assert files.read(tmp_path / "w.npz") == weights
    with np.load(tmp_path / "w.npz") as archive:
        assert {name: archive[name] for name in archive.files} == weights


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_weights_of_a_lightning_module_and_of_an_averaged_model_load(tmp_path: Path) -> None:
    trained = network()
    lightning = {f"model.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": lightning}, tmp_path / "w.ckpt")
    torch.save(torch.optim.swa_utils.AveragedModel(trained).state_dict(), tmp_path / "w.pt")
    for name in ("w.ckpt", "w.pt"):
        model = network()
        load_weights(model, tmp_path / name)
        assert torch.equal(model[0].weight, trained[0].weight)


def test_tied_weights_load_from_the_one_name_that_safetensors_keeps(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        first = nn.Linear(3, 3)
        return nn.ModuleDict({"a": first, "b": nn.Linear(3, 3), "c": first})

    trained, model = tied(), tied()
    save_model(trained, str(tmp_path / "w.safetensors"))
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model["c"].weight, trained["a"].weight)


def test_a_prefix_that_stands_in_the_way_is_named(tmp_path: Path) -> None:
    weights = {f"net.{name}": value for name, value in network().state_dict().items()}
    write(weights | {"loss.weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"It would without 'net\.' before its names"):
        load_weights(network(), tmp_path / "w.pt")
