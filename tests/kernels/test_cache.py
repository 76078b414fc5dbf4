"""What is kept between processes: whom it is taken from, who may read it, what a fault costs."""

import logging
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from tests.kernels import processes
from tests.kernels.processes import STRANGER, as_root

from steadynorm.kernels.cpu import cache

NAME, CONTENT = "forward-float32", bytes(range(256)) * 8

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="no owners and modes on Windows")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the cache is, in a folder that does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    return tmp_path / "home" / "cache" / "steadynorm"


@pytest.fixture
def file(folder):
    cache.store(NAME, CONTENT)
    assert cache.load(NAME) == CONTENT
    return folder / NAME


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@on_posix
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_new_folders_and_files_are_the_users_alone(folder, umask):
    before = os.umask(umask)
    try:
        cache.store(NAME, CONTENT)
    finally:
        os.umask(before)
    assert mode(folder / NAME) == 0o600
    assert [mode(f) for f in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3
    assert cache.load(NAME) == CONTENT


@on_posix
def test_a_folder_that_others_may_read_holds_files_that_they_may_read(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    cache.store(NAME, CONTENT)
    assert mode(folder / NAME) == 0o644


def test_any_flipped_bit_and_any_lost_end_is_seen(file):
    whole = file.read_bytes()
    for bit in (*range(0, 8 * len(whole), 97), 8 * len(whole) - 1):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert cache.load(NAME) is None
    for size in (0, 1, 31, 32, 33, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert cache.load(NAME) is None
    file.write_bytes(whole + b"\0")
    assert cache.load(NAME) is None
    cache.store(NAME, CONTENT)  # the next process replaces it
    assert cache.load(NAME) == CONTENT


def test_a_file_under_another_name_is_not_taken_for_it(file):
    shutil.copy(file, file.with_name("backward-float32"))
    assert cache.load("backward-float32") is None


@on_posix
@pytest.mark.parametrize("rights", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_others_can_write_is_not_loaded(file, which, rights, caplog):
    target = file if which == "file" else file.parent
    target.chmod(rights | (0 if which == "file" else 0o100))
    cache._refuse.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cache.load(NAME) is None
        assert cache.load(NAME) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{target} is not used: compiled kernels are loaded from files and folders only that "
        "belong to this user or to root and that no one else can write. Remove it, or take that "
        "right away (chmod go-w)."
    ]


@on_posix
def test_such_a_file_is_replaced_and_such_a_folder_left_alone(file):
    file.chmod(0o666)
    cache.store(NAME, CONTENT)
    assert mode(file) == 0o600
    assert cache.load(NAME) == CONTENT
    file.parent.chmod(0o777)
    cache.store("another", CONTENT)
    assert not file.with_name("another").exists()


@as_root
@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_belongs_to_somebody_else_is_not_loaded(file, which):
    os.chown(file if which == "file" else file.parent, STRANGER, STRANGER)
    assert cache.load(NAME) is None


@as_root
def test_a_link_in_place_of_the_folder_has_to_be_ours(file):
    real = file.parent.rename(file.parent.with_name("elsewhere"))
    file.parent.symlink_to(real)
    assert cache.load(NAME) == CONTENT
    os.lchown(file.parent, STRANGER, STRANGER)
    assert cache.load(NAME) is None
    cache.store("another", CONTENT)
    assert not (real / "another").exists()


@on_posix
def test_no_link_and_no_pipe_is_read_in_place_of_a_file(file):
    real = file.rename(file.with_name("real"))
    file.symlink_to(real)
    assert cache.load(NAME) is None
    cache.store(NAME, b"new")  # the link goes, what it led to stays
    assert cache.load(NAME) == b"new"
    assert CONTENT in real.read_bytes()
    file.unlink()
    os.mkfifo(file)
    assert cache.load(NAME) is None
    cache.store(NAME, CONTENT)
    assert cache.load(NAME) == CONTENT


@pytest.mark.parametrize("obstacle", ["file", "loop", "long", "relative"])
def test_folders_that_cannot_be_used_do_no_harm(tmp_path, monkeypatch, obstacle):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "place"
    if obstacle == "file":
        place.write_text("where a folder would have to be")
    elif obstacle == "loop":
        place.symlink_to(place)
    elif obstacle == "long":
        place = tmp_path / ("x" * 300)
    else:
        place = Path("place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    cache.store(NAME, CONTENT)
    assert cache.load(NAME) is None
    assert not Path("place/steadynorm").exists()


def test_a_full_disk_leaves_nothing_behind(folder):
    resource = pytest.importorskip("resource", reason="no limit on file sizes here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        cache.store(NAME, CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.load(NAME) is None
    assert list(folder.iterdir()) == []


def test_named_folders_come_first(folder, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("cannot be written")
    monkeypatch.setenv(cache.VARIABLE, os.pathsep.join(map(str, (first, second))))
    cache.store(NAME, CONTENT)
    assert cache.load(NAME) == CONTENT
    assert (second / NAME).exists()
    assert not folder.exists()
    monkeypatch.setenv(cache.VARIABLE, str(first))
    cache.store(NAME, CONTENT)
    assert (folder / NAME).exists()


AS_A_STRANGER = """
    from steadynorm.kernels.cpu import cache
    assert cache.load("shared") == b"from root"
    cache.store("mine", b"from me")
    assert cache.load("mine") == b"from me"
"""


@processes.as_a_stranger
def test_a_folder_that_can_only_be_read_is_read_and_the_next_is_written(public, monkeypatch):
    shared, home = public / "shared", public / "home"
    for made in (shared, home):
        made.mkdir()
        made.chmod(0o755)
    os.chown(home, processes.STRANGER, processes.STRANGER)
    environment = {cache.VARIABLE: str(shared), "XDG_CACHE_HOME": str(home)}
    monkeypatch.setenv(cache.VARIABLE, str(shared))
    cache.store("shared", b"from root")
    before = shared.stat().st_mtime
    processes.run(AS_A_STRANGER, stranger=True, **environment)
    assert shared.stat().st_mtime == before
    assert [f.name for f in (home / "steadynorm").iterdir()] == ["mine"]
