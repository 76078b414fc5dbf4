"""A file is replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from steadynorm.files import check_writable, replace_file, replacing


def test_writes_text_and_bytes_and_makes_folders(tmp_path):
    path = replace_file(tmp_path / "a" / "b.txt", "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    replace_file(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


def test_keeps_the_permissions_of_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o640)
    assert replace_file(path, "new").stat().st_mode & 0o777 == 0o640
    ordinary = tmp_path / "b"
    ordinary.touch()
    assert replace_file(tmp_path / "c", "").stat().st_mode == ordinary.stat().st_mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("steadynorm.files.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_named_before_the_work_and_in_it(tmp_path):
    (tmp_path / "a").touch()
    below = tmp_path / "a" / "deep" / "b.txt"
    for attempt in (check_writable, lambda path: replace_file(path, "new")):
        with pytest.raises(OSError, match=r"cannot be written \(.*\): '.*b\.txt'") as raised:
            attempt(below)
        assert raised.value.filename == str(below)
    with pytest.raises(ValueError, match="is no regular file"):
        check_writable(tmp_path)


def test_checking_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new" / "b.txt")
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("old", "old")]


def test_a_full_disk_names_the_file_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message was "[Errno 28] No space left on device" alone."""

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)") as caught:
        replace_file(path, "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "old")]


def test_errors_about_other_files_pass_as_they_are(tmp_path: Path) -> None:
    other = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "report.html"):
        other.read_bytes()
    assert caught.value.filename == str(other)
