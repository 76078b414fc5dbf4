"""How many forwards are done, of how many that are known to come."""

from __future__ import annotations

import pytest
from tests.doctor.outside import data, trained
from torch.nn import functional as F

from steadynorm.doctor.evidence.model import probe_model
from steadynorm.doctor.evidence.passes import Forwards


@pytest.mark.parametrize("small", [False, True])
def test_progress_counts_every_forward_that_it_said_would_come(small: bool) -> None:
    shown: list[tuple[int, int]] = []
    given = data(6, 2) if small else data(6)
    probe_model(
        trained(), given, loss=F.cross_entropy, against=data(4, seed=3),
        forwards=Forwards(lambda done, total: shown.append((done, total))),
    )  # fmt: skip
    assert all(done <= total for done, total in shown)
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert shown[-1][0] == shown[-1][1] > 18
