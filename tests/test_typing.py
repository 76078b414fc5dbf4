"""What a type checker sees: misspelled names fail in mypy, and torch's names keep their types."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from steadynorm.kernels.activations import ACTIVATIONS, ActivationName
from steadynorm.statistics import PolicyName
from steadynorm.statistics.policies import POLICIES

SOURCE = Path(__file__).resolve().parents[1] / "src"
RIGHT = """
import torch
import steadynorm as sn
import steadynorm.nn as nn
import steadynorm.nn.functional as F

layer = nn.BatchNorm2d(8, statistics="steady", activation="relu")
layer = nn.BatchNorm2d(8, statistics=sn.Ghost(4))
lstm = sn.BatchNormLSTM(2, 3, max_length=4, statistics="running")
model, changes = sn.convert(nn.Linear(2, 3), statistics="steady")
x: torch.Tensor = F.relu(F.batch_norm(torch.ones(2, 3), None, None, statistics="batch"))
"""
WRONG = """
import torch
import steadynorm as sn
import steadynorm.nn as nn
import steadynorm.nn.functional as F

nn.BatchNorm2d(8, statistics="stedy")  # wrong
nn.BatchNorm2d(8, activation="rellu")  # wrong
nn.LazyBatchNorm1d(activation="rellu")  # wrong
nn.BatchNorm1d(8).forward(torch.ones(2, 8), activation="rellu")  # wrong
sn.BatchNormLSTM(2, 3, max_length=4, statistics="stedy")  # wrong
sn.convert(nn.Linear(2, 3), statistics="stedy")  # wrong
F.batch_norm(torch.ones(2, 3), None, None, statistics="stedy")  # wrong
F.batch_norm(torch.ones(2, 3), None, None, activation="rellu")  # wrong
nn.Linear(2, 3, no_such_argument=1)  # wrong
F.no_such_function  # wrong
"""


def test_the_names_for_type_checkers_are_those_of_the_tables() -> None:
    assert get_args(ActivationName) == tuple(ACTIVATIONS)
    assert get_args(PolicyName) == tuple(POLICIES)


def test_mypy_on_right_and_misspelled_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--cache-dir", str(tmp_path / "cache"), "right.py", "wrong.py"]
    environment = {**os.environ, "MYPYPATH": str(SOURCE)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    found = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error:" in line]
    lines = WRONG.splitlines()
    mistakes = [number for number, line in enumerate(lines, 1) if line.endswith("# wrong")]
    assert found == [["wrong.py", str(number)] for number in mistakes], done.stdout + done.stderr
