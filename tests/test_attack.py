"""The standing attack's own machinery: it counts, describes and writes; it finds what is broken."""

import random
import sys
from itertools import islice
from types import ModuleType

import pytest
from tests.attack import __main__ as command
from tests.attack import cache_faults, hostile_names


@pytest.fixture
def attack(monkeypatch):
    """Two trials, of which one breaks a promise."""

    def fail():
        raise ValueError("off by 3\nmore")

    module = ModuleType("tests.attack.two")
    module.TITLE = "two trials"
    module.cases = lambda rng, long: [("good", lambda: None), (f"bad {rng.random():.3f}", fail)]
    monkeypatch.setitem(sys.modules, "tests.attack.two", module)
    return "two"


def test_every_attack_has_a_title_and_trials():
    assert command.attacks() == [
        "cache_faults", "hostile_files", "hostile_names", "kills", "leaks", "numeric", "replicas",
        "threads",
    ]  # fmt: skip


def test_a_broken_promise_is_counted_and_described(attack):
    result = command.carry_out(attack, 5, long=False)
    again = command.carry_out(attack, 5, long=False)
    other = command.carry_out(attack, 6, long=False)
    assert result.tried == 2
    assert result.broke == again.broke != other.broke
    assert result.broke[0].startswith("bad 0.")
    assert result.broke[0].endswith(": ValueError: off by 3")


def test_the_table_replaces_the_last_one(attack, tmp_path, monkeypatch):
    page = tmp_path / "promises.md"
    page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(command, "PAGE", page)
    text = command.table([command.carry_out(attack, 0, long=False)], 0, long=False)
    command.write(text)
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["before", command.BEGIN, "| attack     |  tried |   held |  broke |"]
    assert "| two trials |      2 |      1 |      1 |" in lines
    assert lines[-2:] == [command.END, "after"]
    assert "old" not in lines


@pytest.mark.parametrize("form", ["terminal", "JSON", "SARIF"])
def test_no_name_of_a_layer_acts_on_the_reader(form):
    name = "\x1b[31m\x9b\x7f\u202e\ud800 [text](https://example) {0}"
    hostile_names.trial(form, lambda: hostile_names.report_on(name))


def test_an_unchecked_cache_would_be_seen(attack, monkeypatch):
    """An attack that cannot fail shows nothing."""
    mutations = islice(cache_faults.cases(random.Random(0), False), 50)
    sys.modules["tests.attack.two"].cases = lambda rng, long: mutations
    monkeypatch.setattr(cache_faults.cache, "_checksum", lambda name, content: bytes(32))
    assert len(command.carry_out(attack, 0, long=False).broke) > 10
