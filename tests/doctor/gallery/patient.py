"""A network with one fault, and the code that must come first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from tests.doctor.fixtures.case import Case
from torch.nn import functional as F

from steadynorm.doctor import Report


class Diagnosed(Protocol):
    """A case, or a run that was watched."""

    def diagnose(self) -> Report: ...


Build = Callable[[], Diagnosed]


class Patient(NamedTuple):
    """`build()` plants the fault; `code` is what the doctor must say first."""

    code: str
    build: Build


PATIENTS: dict[str, Patient] = {}


def patient(code: str, fault: str) -> Callable[[Build], None]:
    def add(build: Build) -> None:
        assert fault not in PATIENTS, fault
        PATIENTS[fault] = Patient(code, build)

    return add


def seen(network: Any, data: Iterable[Any], **more: Any) -> Case:
    """The network with labelled batches."""
    return Case(network, {"batches": data, "loss": F.cross_entropy, **more})
