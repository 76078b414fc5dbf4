"""Files from anybody: reading costs at most a stated multiple of their size; writing is exclusive.

`LARGEST_EXPANSION` is that multiple, for all arrays of a file together.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import steadynorm.files
from steadynorm.cli import app
from steadynorm.files import replace_file, replacing
from steadynorm.models.files import entries, keras_settings, read_data, read_tensors, write

FACTORY = """
from torch import nn


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def batches():
    import torch

    return [torch.randn(4, 7)]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop_of_hostile_files.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def expanded_tensors(path: Path) -> None:
    """Each below the limit by itself; 1,500 of them 8 GB."""
    one = torch.zeros(1)
    torch.save({f"{n}.weight": one.expand(1_400_000) for n in range(1500)}, path)


def linked_data(path: Path) -> None:
    """Two thousand names of one compressed array."""
    import h5py

    with h5py.File(path, "w") as file:
        first = file.create_group("layers/bn_0/vars")
        first.create_dataset("0", data=np.zeros(800_000, np.float32), compression="gzip")
        for number in range(1, 2000):
            file.create_group(f"layers/bn_{number}/vars")["0"] = first["0"]


def compressed_arrays(path: Path) -> None:
    arrays = {f"a{n}": np.zeros(400_000, np.float32) for n in range(200)}
    np.savez_compressed(path, **arrays)


def compressed_torch(path: Path) -> None:
    whole = path.with_suffix(".whole")
    torch.save({"weight": torch.zeros(30_000_000)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    whole.unlink()


BOMBS: dict[str, Callable[[Path], None]] = {
    "expanded.pt": expanded_tensors,
    "linked.weights.h5": linked_data,
    "compressed.npz": compressed_arrays,
    "compressed.pt": compressed_torch,
}
READ = """
import resource, sys
from pathlib import Path
import torch, h5py
from steadynorm.models.files import read_data, read_tensors, load_weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (read_tensors, read_data, lambda p: load_weights(torch.nn.Linear(2, 3), p)):
    try:
        read(Path(sys.argv[1]))
    except ValueError as error:
        print(error)
print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_cannot_fill_the_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    BOMBS[name](path)
    size = path.stat().st_size
    assert size < 5_000_000
    command = [sys.executable, "-c", READ, str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *lines, used = shown.stdout.splitlines()
    assert len(lines) == 3, shown.stdout
    assert all("larger than such a file can hold" in s or "compressed" in s for s in lines)
    assert int(used.split()[1]) < 200


@pytest.mark.parametrize("name", ["expanded.pt", "compressed.npz"])
@pytest.mark.parametrize("command", ["fold", "convert", "calibrate", "doctor"])
def test_every_command_refuses_them(folder: Path, name: str, command: str) -> None:
    BOMBS[name](folder / name)
    data = ["--data", "shop_of_hostile_files:batches"] if command in ("calibrate",) else []
    arguments = [command, "shop_of_hostile_files:network", "--weights", name, *data]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "larger than such a file can hold" in result.stderr


def test_settings_of_keras_that_are_padded(tmp_path: Path) -> None:
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps({"config": " " * 10_000_000}))
    with pytest.raises(ValueError, match="its settings would be larger than such a file can hold"):
        keras_settings(path)


def test_half_precision_and_shared_tensors_are_within_the_limit(tmp_path: Path) -> None:
    shared = torch.zeros(300_000, dtype=torch.bfloat16)
    write({"a": shared, "b": shared}, tmp_path / "w.safetensors")
    torch.save({"a": shared, "b": shared}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        read = read_tensors(tmp_path / name)
        assert read["b"].dtype == torch.bfloat16


@pytest.mark.parametrize("command", ["fold", "calibrate"])
def test_a_pipe_is_refused_at_once(folder: Path, command: str) -> None:
    os.mkfifo(folder / "w.pt")
    data = ["--data", "shop_of_hostile_files:batches"] if command == "calibrate" else []
    arguments = [command, "shop_of_hostile_files:network", "--weights", "w.pt", *data]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr == f"steadynorm {command}: w.pt is no regular file.\n"


def test_a_batch_that_does_not_fit_is_one_line(folder: Path) -> None:
    given = ["shop_of_hostile_files:network", "--data", "shop_of_hostile_files:batches"]
    result = CliRunner().invoke(app, ["calibrate", *given])
    assert result.exit_code == 2
    assert result.stderr.startswith("steadynorm calibrate: mat1 and mat2 shapes cannot be")
    assert result.stderr.count("\n") == 1


# Writing ---------------------------------------------------------------------------------------


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for number in range(os.getpid() - 5, os.getpid() + 5):
        (tmp_path / f".out.{number}.npz").symlink_to(victim)
    write({"a": np.zeros(2)}, tmp_path / "out.npz")
    assert victim.read_text() == "mine"
    with replacing(tmp_path / "w.pt") as part:
        name = part.name
        assert part.stat().st_mode & 0o777 == 0o600  # nobody else's until it is whole
        part.write_bytes(b"x")
    with replacing(tmp_path / "w.pt") as part:
        assert part.name != name
        part.write_bytes(b"y")


def test_permissions_are_kept_by_every_writer(folder: Path) -> None:
    source = folder / "a.npz"
    layer = {f"bn.{n}": np.ones(2) for n in ("scale", "bias", "mean", "var")}
    write(layer, source)
    out = folder / "b.npz"
    out.touch(mode=0o600)
    out.chmod(0o600)
    arguments = ["convert-weights", str(source), str(out), "--source", "flax", "--target", "keras"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert out.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.pt"])
def test_folders_are_made_and_links_are_followed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "new" / "folder" / name
    link = tmp_path / name
    link.symlink_to(target)
    write({"a": np.zeros(2)}, link)
    assert link.is_symlink()
    assert target.is_file()
    with entries(target) as held:
        assert held["a"].shape == (2,)
    assert [path.name for path in target.parent.iterdir()] == [name]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", tmp_path):
        with pytest.raises(ValueError, match="is no regular file, and cannot be replaced by one"):
            replace_file(path, "x")


def test_what_kills_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [tmp_path / f".w.pt.{name}.part" for name in ("abcdefgh", "12345678")]
    others = [tmp_path / ".w.pt.short.part", tmp_path / ".v.pt.abcdefgh.part", tmp_path / "w.part"]
    for path in (*old, *others):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    young = tmp_path / ".w.pt.a1b2c3d4.part"
    young.write_bytes(b"half")
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / ".w.pt.zyxwvuts.part").symlink_to(victim)
    replace_file(tmp_path / "w.pt", "new")
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in (*others, young, victim))
    monkeypatch.setattr(steadynorm.files, "STALE_AFTER", -1.0)
    with replacing(tmp_path / "w.pt") as living:
        living.write_bytes(b"1")
        replace_file(tmp_path / "w.pt", "2")  # another writer at the same time
        assert living.exists()
    assert not young.exists()
    assert (tmp_path / "w.pt").read_bytes() == b"1"


def test_the_limit_on_memory_is_measured(tmp_path: Path) -> None:
    """The measurement itself sees 200 MB."""
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(25_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = read_data(path)
    held += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert held.numel() == 25_000_000
    assert grown > 0
