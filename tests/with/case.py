"""What a case of `tools.py` is, and the models that the tools are tried on."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import steadynorm as sn

WORKS, RAISES, WARNS = "works", "raises", "warns"


class Case(NamedTuple):
    """One thing that a tool does.

    `run` raises AssertionError where a result is wrong. Where the tool is to refuse, or to warn
    (`result`), `raises` is what it says, and `cure`, which the table shows, is what `cured` does.
    """

    tool: str
    does: str
    run: Callable[[], None]
    needs: tuple[str, ...] = ()
    raises: str | None = None
    cure: str = ""
    cured: Callable[[], None] | None = None
    result: str = WORKS

    @property
    def row(self) -> str:
        """Its row of the table, as it has to be."""
        return f"| {self.tool} | {self.does} | {self.result} | {self.cure} |"


CASES: list[Case] = []


def case(tool: str, does: str, *needs: str) -> Callable[[Callable[[], None]], None]:
    def add(run: Callable[[], None]) -> None:
        CASES.append(Case(tool, does, run, needs))

    return add


def refusal(
    tool: str,
    does: str,
    *needs: str,
    raises: str,
    cure: str,
    cured: Callable[[], None],
    result: str = RAISES,
) -> Callable[[Callable[[], None]], None]:
    def add(run: Callable[[], None]) -> None:
        CASES.append(Case(tool, does, run, needs, raises, cure, cured, result))

    return add


def verdict(case: Case) -> str:
    """The result that it has to have (a cure works, too), or what went wrong."""
    try:
        case.run()
    except AssertionError as error:
        if case.raises is None or not re.search(case.raises, str(error)):
            return f"wrong: {error}"
    except Exception as error:  # noqa: BLE001  any tool's
        if case.raises is None or not re.search(case.raises, str(error)):
            return f"fails: {type(error).__name__}: {error}"
    else:
        return case.result if case.raises is None else "silent: it did not raise"
    assert case.cured is not None
    try:
        case.cured()
    except Exception as error:  # noqa: BLE001
        return f"the cure fails: {type(error).__name__}: {error}"
    return case.result


def table(before: str) -> str:
    """The cases as a table in Markdown, each run; of a tool that is not installed, as before."""
    logging.disable()
    rows = ["| tool | what it does | result | cure |", "|---|---|---|---|"]
    for each in CASES:
        installed = all(find_spec(name) for name in each.needs)
        if not installed and each.row in before:
            rows.append(each.row)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(each._replace(result=verdict(each)).row)
    return "\n".join(rows) + "\n"


# --- models and comparisons

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block, as everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        out = self.relu(out)
        return out  # noqa: RET504  as in most code


def theirs() -> Any:
    """A network of torch's layers that has seen some batches, in inference."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(10):
            network(X)
    return network.eval()


def ours(statistics: str = "steady") -> Any:
    """The same, converted."""
    return sn.convert(theirs(), statistics=statistics)[0]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    found, expected = found.detach().float(), expected.detach().float()
    largest = float(expected.abs().max()) or 1.0  # buffers that nothing has moved
    off = float((found - expected).abs().max()) / largest
    assert found.shape == expected.shape, "another shape"
    assert off <= tolerance, f"off by {off:.2g} of the largest value"


def same_answers(network: nn.Module, tolerance: float = 1e-5) -> None:
    """The converted model answers in inference as the one it was made of."""
    with torch.no_grad():
        close(network(X), theirs()(X), tolerance)


def trains(step: Callable[[Any], Any], network: Any, tolerance: float = 1e-5) -> None:
    """Three forwards in training through a tool, and three without, leave the same model."""
    alone = copy.deepcopy(network).train()
    through = step(network.train())
    for _ in range(3):
        close(through(X), alone(X), tolerance)
    for found, expected in zip(network.eval().buffers(), alone.eval().buffers(), strict=True):
        close(found, expected, tolerance)
