"""Files kept between processes, and loaded only if nobody else can have written them.

What is kept here is machine code, so a file is trusted no more than the program itself: it and its
folder must belong to this user or to root, nobody else may write them, and a checksum over name and
content must hold (a flipped bit in machine code ends the process). What is not believed is not
read; whoever calls makes it anew. No fault of a folder is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import sys
from functools import cache
from pathlib import Path
from typing import Any

VARIABLE = "STEADYNORM_CACHE"
LARGEST = 1 << 26
"""Bytes; the largest kernel has 1e5."""

_log = logging.getLogger(__name__)


def folders() -> list[Path]:
    """Where files are looked for, in this order; the first that can be written takes new ones.

    First those that the environment variable `STEADYNORM_CACHE` names (separated as in `PATH`),
    then `steadynorm` in the user's cache folder, if there is a user with a home. A relative path
    would be another folder wherever a process starts, and is left out.
    """
    named = [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    with contextlib.suppress(RuntimeError):  # no HOME, and no such user
        named.append(_user_cache() / "steadynorm")
    return [folder for folder in named if folder.is_absolute()]


def _user_cache() -> Path:
    """The platform's folder for what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def load(name: str) -> bytes | None:
    """What was stored under the name; None if there is nothing, or nothing to be believed."""
    for folder in folders():
        with contextlib.suppress(OSError):
            if _is_safe(folder) and (content := _read(folder, name)) is not None:
                return content
    return None


def store(name: str, content: bytes) -> None:
    """Keep the content under the name, in the first folder that takes it.

    New folders have mode 0700 and files 0600, whatever the umask; in a folder that others may read,
    they may read the file, too. Not written aside and renamed: until a file is whole its checksum
    does not hold, and so a killed process leaves nothing but what the next one replaces.
    """
    for folder in folders():
        path = folder / name
        try:
            _make(folder)
            if not _is_safe(folder):
                continue
            path.unlink(missing_ok=True)
            with open(path, "xb", opener=_private) as file:
                file.write(_checksum(name, content) + content)
                if hasattr(os, "fchmod"):
                    os.fchmod(file.fileno(), 0o600 | folder.stat().st_mode & 0o044)
        except OSError as error:  # read-only, full, not a folder, out of reach
            _log.debug("%s is not written: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        else:
            return


def _make(folder: Path) -> None:
    """Make the folder and those above it, each for this user alone."""
    if not folder.is_dir():
        _make(folder.parent)
        with contextlib.suppress(FileExistsError):  # another process was first
            folder.mkdir(mode=0o700)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _unfollowed(path: str, flags: int) -> int:
    """No link is followed, and a pipe without a writer is not waited for."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _read(folder: Path, name: str) -> bytes | None:
    with open(folder / name, "rb", opener=_unfollowed) as file:
        status = os.fstat(file.fileno())
        if not (stat.S_ISREG(status.st_mode) and _is_ours(status) and _is_closed(status)):
            _refuse(folder / name)
            return None
        whole = file.read(LARGEST)
    size = hashlib.sha256().digest_size
    checksum, content = whole[:size], whole[size:]
    return content if checksum == _checksum(name, content) else None


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


def _is_safe(folder: Path) -> bool:
    """Whether the folder, and a link in its place, are this user's or root's alone."""
    target = folder.stat()
    if _is_ours(folder.lstat()) and _is_ours(target) and _is_closed(target):
        return True
    _refuse(folder)
    return False


def _is_ours(status: os.stat_result) -> bool:
    # Windows has no such owners; there a user's folders are closed to others by inheritance.
    return not hasattr(os, "geteuid") or status.st_uid in (os.geteuid(), 0)


def _is_closed(status: os.stat_result) -> bool:
    return sys.platform == "win32" or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def _refuse(path: Path) -> Any:
    """Say so, once; not as a warning of Python's, which may be an error."""
    _log.warning(
        "%s is not used: compiled kernels are loaded from files and folders only that belong to "
        "this user or to root and that no one else can write. Remove it, or take that right away "
        "(chmod go-w).",
        path,
    )
