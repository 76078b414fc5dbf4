"""A driver for Triton of a device that is not here: kernels compile, and nothing is launched.

The host's own code then runs to its end on tensors in this machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from benchmarks.machine_code import TARGETS

from steadynorm.kernels.gpu import plan as plans
from steadynorm.kernels.gpu import prepared
from steadynorm.kernels.gpu.backend import GPU

Note = Callable[[str, tuple[int, int, int], dict[str, Any]], None]


def nothing(*_: Any) -> int:
    """In place of a launch, or of a question to the device."""
    return 0


class Driver:
    """Of a device that is not here: compiled kernels are loaded and launched in name alone.

    `note`: called at each launch with the kernel's name, the grid and the arguments by name. Triton
    keeps what launches a compiled kernel, and so the first `note`, for as long as the process runs.
    """

    def __init__(self, note: Note | None = None) -> None:
        self.note = note
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source: Any, _: Any) -> Callable[..., Any]:
        """What launches one compiled kernel."""
        note, kernel = self.note, source.fn
        if note is None:
            return nothing

        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            note(kernel.__name__, (x, y, z), dict(zip(kernel.arg_names, rest[4:], strict=True)))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"]


@contextmanager
def no_device(note: Note | None = None) -> Iterator[None]:
    """The GPU backend switched on for tensors in this machine's memory, with that driver."""
    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver(note)),
        mock.patch.object(plans, "raw_stream", nothing),
        mock.patch.object(prepared, "KINDS", {}),
        mock.patch.object(GPU, "on", True),
        mock.patch.object(GPU, "interpreted", True),
    ):
        yield
