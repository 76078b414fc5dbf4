"""What every rule must have, and that its page in the documentation says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import steadynorm.doctor.rules as package
from steadynorm.doctor import Severity
from steadynorm.doctor.rules import all_rules, find_rule
from steadynorm.doctor.rules.pages import page, pages, plain, write
from steadynorm.doctor.rules.rule import Rule

ROOT = Path(__file__).resolve().parents[2]
RULES = {rule.code: rule for rule in all_rules()}
NEEDS = {"1": "state", "2": "model", "3": "data", "4": "run"}


def test_one_rule_a_file_named_by_it() -> None:
    files = sorted(path.stem for path in Path(package.__file__).parent.glob("sn*.py"))
    named = [f"{rule.code}_{rule.name}".lower().replace("-", "_") for rule in all_rules()]
    assert named == files
    assert list(RULES) == sorted(RULES)
    assert len(RULES) == len(files) >= 34


@pytest.mark.parametrize("code", RULES)
def test_a_rule_is_complete(code: str) -> None:
    rule = RULES[code]
    assert re.fullmatch(r"SN[1-4]\d\d", code)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)+", rule.name)
    assert rule.needs == NEEDS[code[2]]
    for text in (rule.summary, rule.why, rule.threshold, rule.cure, rule.source):
        assert text[-1] in ".)", text
        assert len(text) > 20
    assert len(rule.why) > 100
    assert rule.summary.count(".") < 3
    assert isinstance(rule.severity, Severity)
    assert rule.safe in (True, False, None)
    # What is safe can be applied, so there is a line that applies it.
    assert rule.safe is not True or "sn." in rule.line
    assert all(other in RULES and other != code for other in rule.explains)
    assert rule.severity


def explains_in_circles(explains: dict[str, tuple[str, ...]]) -> bool:
    left = dict(explains)
    while ends := [code for code, after in left.items() if not set(after) & left.keys()]:
        for code in ends:
            del left[code]
    return bool(left)


def test_causes_have_no_circles() -> None:
    """The order of a report follows causes back to their roots."""
    assert not explains_in_circles({code: rule.explains for code, rule in RULES.items()})
    assert explains_in_circles({"a": ("b",), "b": ("c",), "c": ("a",), "d": ()})


def test_rules_are_found_by_code_and_name() -> None:
    assert find_rule("sn104") is find_rule("vanishing-variance") is RULES["SN104"]
    with pytest.raises(ValueError, match=r"no rule is called 'SN1'; `steadynorm doctor --list`"):
        find_rule("SN1")


def outdated(folder: Path) -> list[str]:
    """Pages that are not what the rules say, missing, or of rules that are no more."""
    made = pages()
    held = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in {*made, *held} if made.get(name) != held.get(name))


def test_pages_are_current() -> None:
    """Write them by `python -m steadynorm.doctor.rules`."""
    assert outdated(ROOT / "docs" / "rules") == []


def test_an_outdated_page_is_seen(tmp_path: Path) -> None:
    write(tmp_path)
    assert outdated(tmp_path) == []
    (tmp_path / "SN999.md").write_text("of a rule that is no more")
    (tmp_path / "SN101.md").write_text("of before")
    (tmp_path / "SN102.md").unlink()
    assert outdated(tmp_path) == ["SN101.md", "SN102.md", "SN999.md"]
    write(tmp_path)
    assert outdated(tmp_path) == []


@pytest.mark.parametrize("code", RULES)
def test_pages_say_all_of_a_rule(code: str) -> None:
    rule: Rule = RULES[code]
    for text in (page(rule), " ".join(plain(rule).split())):
        for part in (code, rule.name, rule.summary, rule.why, rule.threshold, rule.cure, rule.line):
            assert " ".join(part.split()) in " ".join(text.split())
    for other in rule.explains:
        assert f"({other}.md)" in page(rule)
        assert f"({code}.md)" in page(RULES[other])
    assert max(map(len, plain(rule).splitlines())) <= 100
