"""Times side by side: who is called how often and in which order, and what the ratios say."""

from __future__ import annotations

import gc

import pytest

from steadynorm.evidence.timing import SpeedUp, in_turns, interleaved, milliseconds, speed_up


def test_every_round_calls_each_once_in_another_order():
    calls, ticks = [], []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = interleaved(contenders, 3, least=0.0, tick=ticks.append)
    assert "".join(calls) == "abc" * 2 + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert ticks == [1] * 5


def test_seconds_are_of_one_call_and_quick_calls_are_repeated(monkeypatch):
    now, calls = [0.0], []

    def takes(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    monkeypatch.setattr("steadynorm.evidence.timing.perf_counter", lambda: now[0])
    found = interleaved({"a": takes("a", 0.25), "b": takes("b", 0.5)}, 2, least=2.0)
    assert "".join(calls) == "ab" * 2 + "aaaabbbb" + "bbbbaaaa"
    assert found == {"a": [0.25, 0.25], "b": [0.5, 0.5]}


def test_warm_up_rounds_do_not_count():
    counts = {"a": iter(range(9)), "b": iter(range(9))}
    ticks = []
    found = in_turns(
        {name: count.__next__ for name, count in counts.items()}, 3, warm_up=2, tick=ticks.append
    )
    assert found == {"a": [2, 3, 4], "b": [2, 3, 4]}
    assert ticks == [1] * 5


@pytest.mark.parametrize("on", [True, False])
def test_garbage_collection_rests_and_is_as_it_was(on):
    before = gc.isenabled()
    seen = []
    try:
        (gc.enable if on else gc.disable)()
        interleaved({"a": lambda: seen.append(gc.isenabled())}, 2, least=0.0)
        fails_when_timed = iter([1, 1]).__next__  # the two calls before go well
        with pytest.raises(StopIteration):
            interleaved({"a": fails_when_timed}, 1, least=0.0)
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()
    assert seen[2:] == [False, False]


def test_ratio_is_of_rounds_not_of_medians():
    found = speed_up([1.0, 10.0, 100.0], [1.0, 5.0, 25.0])
    assert found == SpeedUp(1.0, 2.0, 4.0)
    assert str(found) == "2.00× (1.00 to 4.00)"
    with pytest.raises(ValueError, match=r"^speed_up: at least 2 rounds .* timed; got 1"):
        speed_up([1.0], [1.0])
    with pytest.raises(ValueError, match="shorter"):
        speed_up([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (SpeedUp(1.1, 1.25, 1.5), "1.25 times as fast"),
        (SpeedUp(0.5, 0.8, 0.9), "slower, 0.80 times as fast"),
        (SpeedUp(0.9, 1.05, 1.2), "neither faster nor slower for certain (1.05×)"),
    ],
)
def test_losses_are_said(found, words):
    assert found.words == words


def test_milliseconds_is_the_median():
    assert milliseconds([0.001, 0.002, 0.1]) == 2.0
