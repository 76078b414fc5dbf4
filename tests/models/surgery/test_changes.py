"""The record of what was done."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from steadynorm.models.changes import Change, Changes


def test_prints_as_a_table() -> None:
    changes = Changes(
        [
            Change("folded", "layer1.bn", "BatchNorm2d(64)", "Identity", "into layer1.conv"),
            Change("left", "bn", "BatchNorm1d(2)", "BatchNorm1d(2)"),
        ]
    )
    assert str(changes).splitlines() == [
        "what    where      before           after           why",
        "folded  layer1.bn  BatchNorm2d(64)  Identity        into layer1.conv",
        "left    bn         BatchNorm1d(2)   BatchNorm1d(2)",
    ]
    assert changes.tally() == {"folded": 1, "left": 1}
    assert changes.left == [changes[1]]


def test_nothing_to_do_is_said() -> None:
    assert Changes() == []
    assert str(Changes()) == "nothing to do"


def test_records_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Change("left", "bn", "a", "a").why = "because"  # type: ignore[misc]
