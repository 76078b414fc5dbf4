"""The rules: one defect, one file. This module finds them all.

A rule is a module named by its code and name, `sn101_statistics_never_updated.py`, with one
subclass of `Rule`. Its page in docs/rules is made from the class, its fixtures are in
tests/doctor/fixtures under the same code.
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
    found = []
    for name in modules:
        module = import_module(f"{__name__}.{name}")
        kinds = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Rule)]
        found += [kind() for kind in kinds if kind.__module__ == module.__name__]
    return tuple(sorted(found, key=lambda rule: rule.code))


def find_rule(code: str) -> Rule:
    """The rule of a code or a name. Raises ValueError for an unknown one.

    >>> find_rule("sn101").name
    'statistics-never-updated'
    """
    for rule in all_rules():
        if code.upper() == rule.code or code.lower() == rule.name:
            return rule
    raise ValueError(f"no rule is called {code!r}; `steadynorm doctor --list` names them.")
