"""Docstrings show their doctests without markup; Markdown would read `>>>` as a quotation.

This fences them as Python before the reference pages are made. An example runs from its `>>>` to
the next blank line.
"""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^|(?<=\n))((?:>>> [^\n]*\n?)(?:[^\n]+\n?)*)")


def fenced(text: str) -> str:
    """The text with every doctest that stands at its margin in a fence of its own."""
    return EXAMPLE.sub(lambda match: f"```python\n{match.group(1).rstrip()}\n```\n", text)


class FenceDoctests(griffe.Extension):
    """Applies `fenced` to every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
