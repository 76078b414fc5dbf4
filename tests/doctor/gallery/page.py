"""The page that the tables go into."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path

import torch

from steadynorm.report.machine import processor

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE = DOCS / "doctor_gallery.md"


def replace(marker: str, text: str, page: Path = PAGE) -> None:
    """Put `text` between a marker's beginning and end."""
    begin, end = (f"<!-- {marker}: {side} -->" for side in ("begin", "end"))
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def where_and_when(command: str) -> str:
    return (
        f"{date.today().isoformat()}, {processor()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, by `python benchmarks/{command} --write`."
    )
