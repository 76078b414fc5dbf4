"""The rules: one defect, one file; see `rule.py` for what a rule is made of.

Its page in docs/rules is made from it, its fixtures are in tests/doctor/fixtures under its code.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from steadynorm.doctor.rules.rule import Needs, Rule

__all__ = ["Needs", "Rule", "all_rules", "find_rule"]


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, ordered by code."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("sn"))
    return tuple(import_module(f"{__name__}.{name}").rule for name in modules)


def find_rule(code: str) -> Rule:
    """The rule of a code or a name. Raises ValueError for an unknown one.

    >>> find_rule("sn101").name
    'statistics-never-updated'
    """
    for rule in all_rules():
        if code.upper() == rule.code or code.lower() == rule.name:
            return rule
    raise ValueError(f"no rule is called {code!r}; `steadynorm doctor --list` names them.")
