"""Layers whose names hold what a terminal, a browser or a format would take for its own."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import steadynorm as sn

TITLE = "hostile names: layers' names in every report"

PIECES = (
    *("\x1b[31m", "\x1b]0;title\x07", "\r", "\n", "\0", "\x7f", "\x9b31m"),
    *("\u202e", "\u2066", "\ud800", "é", "ß", "中", "🙂"),
    *("[text](https://example)", "{0}", "[red]", "[/]", "%s", "`", "|", "\\", '"', "'"),
    *("<script>alert(1)</script>", "</script>", "&amp;", "a" * 300),
)


class Network(torch.nn.Module):
    """A bias before a batch norm and statistics never updated: the doctor has something to say."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module("before", torch.nn.Linear(4, 4))
        self.add_module(name, sn.BatchNorm1d(4))
        self.name = name

    def forward(self, x: Any) -> Any:
        return getattr(self, self.name)(self.before(x))


def safe(text: str, where: str) -> None:
    """Neither a control character but line ends, nor one that turns the writing's direction."""
    text.encode()
    bad = {
        c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t\u200d"
    }
    assert not bad, f"{where} holds {', '.join(sorted(map(ascii, bad)))}"


def in_terminal(report: Any) -> None:
    out = io.StringIO()
    Console(file=out, width=120, no_color=True, highlight=False).print(report)
    safe(out.getvalue(), "the terminal's text")


def as_json(report: Any) -> None:
    text = report.to_json()
    json.loads(text)
    safe(text, "the JSON")


def as_sarif(report: Any) -> None:
    text = report.to_sarif()
    safe(text, "the SARIF")
    for run in json.loads(text)["runs"]:
        for result in run["results"]:
            message = result["message"]["text"]
            assert not re.search(r"(?<!\\)\[[^\]]*\]\(", message), "a message holds a link"
            assert not re.search(r"(?<!\{)\{\d+\}(?!\})", message), "a message holds a placeholder"


def as_html(report: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = report.to_html(Path(folder, "report.html")).read_text(encoding="utf-8")
    safe(text, "the page")
    assert "alert(1)</script>" not in text, "the page holds a script"


FORMS = {"terminal": in_terminal, "JSON": as_json, "SARIF": as_sarif, "HTML": as_html}


def report_on(name: str) -> Any:
    return sn.diagnose(Network(name), [torch.randn(8, 4) for _ in range(2)])


def trial(form: str, report: Callable[[], Any]) -> None:
    FORMS[form](report())


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every piece alone, then mixtures, in every form."""
    names = [f"layer {piece}" for piece in PIECES]
    names += ["".join(rng.sample(PIECES, 3)) for _ in range(100 if long else 5)]
    for name in names:
        report = cache(partial(report_on, name))
        for form in FORMS:
            yield f"{form}, {name!a}", partial(trial, form, report)
