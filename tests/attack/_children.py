"""Forked children: what crashes, hangs or fills the memory there leaves the attack as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Ended(NamedTuple):
    """How a child ended: its exit code, or minus the signal; what it said; its largest memory."""

    code: int
    said: str
    peak: int  # KiB


class Child:
    """`work` in a process of its own, for so many seconds at most.

    It says what `work` returns and ends with 0, or says what was raised and ends with 1.
    """

    def __init__(self, work: Callable[[], object], seconds: int) -> None:
        self.output, end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(seconds)
            torch.set_num_threads(1)  # of its OpenMP threads a forked child has none
            code = 0
            try:
                said = str(work() or "")
            except BaseException as error:  # noqa: BLE001
                said, code = f"{type(error).__name__}: {error}", 1
            os.write(end, said.encode(errors="replace")[:60_000])
            os._exit(code)
        os.close(end)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        with os.fdopen(self.output, "rb") as stream:
            said = stream.read().decode()
        _, status, used = os.wait4(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), said, used.ru_maxrss)


def together(works: Sequence[Callable[[], object]], seconds: int) -> list[Ended]:
    """All at once, and how each ended."""
    children = [Child(work, seconds) for work in works]
    return [child.wait() for child in children]
