"""The one writer: a file is replaced whole or not at all; and the one text of JSON."""

from __future__ import annotations

import glob
import importlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# On Windows stale files stay.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
STALE_AFTER = 60.0
"""Seconds after which an unlocked temporary file is one that a killed process left behind."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write to, put in the place of `path` once it is whole and on disk.

    A reader, and a kill at any moment, meets the old file or the new one, never a part. The
    temporary file lies in the same folder under an unpredictable name, made exclusively, so that
    no planted link is followed; what earlier kills left is removed. Missing folders are made. A
    link is followed: what it points to is replaced, and the link stays. An existing file keeps its
    permissions.

    Raises ValueError where something other than a file is in that place, and OSError where none
    can be written.
    """
    target = _target(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        handle, name = _temporary(target.parent, target)
    except OSError as error:
        raise _not_written(error, path) from error
    part = Path(name)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)  # says that a living process writes it
        yield part
        part.chmod(_mode(target))
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    except OSError as error:  # a full disk names no file, or the temporary one
        if error.errno is None or error.filename not in (None, name):
            raise
        raise _not_written(error, path) from error
    finally:
        os.close(handle)
        part.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises as `replacing` would, before the work whose result goes to `path`. Leaves nothing
    behind: missing folders are not made.
    """
    target = _target(path)
    folder = next(parent for parent in target.parents if parent.exists())
    try:
        handle, name = _temporary(folder, target)
    except OSError as error:
        raise _not_written(error, path) from error
    os.close(handle)
    Path(name).unlink()


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is no regular file, and cannot be replaced by one.")
    return target


def _temporary(folder: Path, target: Path) -> tuple[int, str]:
    return tempfile.mkstemp(dir=folder, prefix=f".{target.name}.", suffix=".part")


def _not_written(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The error with the file that was asked for in place of the temporary one."""
    return type(error)(error.errno, f"cannot be written ({error.strerror})", str(path))


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes `content`, text as UTF-8, in the place of `path`; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def _remove_stale(target: Path) -> None:
    """Removes temporary files for `target` that no living process holds."""
    if fcntl is None:
        return
    for left in target.parent.glob(f".{glob.escape(target.name)}.????????.part"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(handle)
                if stat.S_ISREG(found.st_mode) and found.st_mtime < time.time() - STALE_AFTER:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
            finally:
                os.close(handle)


def _mode(path: Path) -> int:
    """The file's permissions, or those of a new file: mkstemp's are for its owner alone."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut, where the system can say so of a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_text(record: object) -> str:
    r"""JSON without NaN or infinity, which it does not have; what does not print is escaped.

    >>> json_text({"é": "\x7f"})
    '{\n "é": "\\u007f"\n}\n'
    """
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else escaped(c) for c in text)


def escaped(character: str) -> str:
    """The character as a JSON string can hold it in ASCII."""
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
