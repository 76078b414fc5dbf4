"""What the doctor says of networks with one fault each, and of healthy ones.

    python benchmarks/doctor_gallery.py            # print both tables
    python benchmarks/doctor_gallery.py --write    # and put them into docs/doctor_gallery.md

Exits with 1 where a fault is not named first or a healthy network gets an error or a warning.
Everything is trained here, on digits; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the networks, which the tests share

import torch  # noqa: E402
from rich.progress import track  # noqa: E402
from tests.doctor.gallery.all_patients import PATIENTS  # noqa: E402
from tests.doctor.gallery.healthy import HEALTHY  # noqa: E402
from tests.doctor.gallery.page import replace, where_and_when  # noqa: E402

from steadynorm.doctor import Report, Severity  # noqa: E402


def first_of(report: Report) -> tuple[str, str]:
    """Code and layer of what is said first."""
    if not report.findings:
        return "nothing", ""
    first = report.findings[0]
    return first.code, first.layer or "(model)"


def broken() -> tuple[str, int]:
    """The table of faults, and how many were not named first."""
    rows, wrong = [], 0
    ordered = sorted(PATIENTS.items(), key=lambda item: item[1].code)
    for fault, patient in track(ordered, "faults", transient=True):
        torch.manual_seed(0)
        report = patient.build().diagnose()
        code, layer = first_of(report)
        wrong += code != patient.code
        also = dict.fromkeys(f.code for f in report.findings if f.code != code)
        name = report.findings[0].name if report.findings else ""
        verdict = code if code == patient.code else f"**{code}**, not {patient.code}"
        rows.append(f"| {fault} | {verdict} {name} | `{layer}` | {', '.join(also) or '–'} |")
    head = "| the fault planted | said first | where | said after it |\n|---|---|---|---|"
    total = f"{len(rows) - wrong} of {len(rows)} faults are named first."
    return "\n".join([total, "", head, *rows]), wrong


def healthy() -> tuple[str, int]:
    """The table of healthy networks, and how many got an error or a warning."""
    rows, wrong = [], 0
    for name, build in track(HEALTHY.items(), "healthy networks", transient=True):
        report = build().diagnose()
        counts = [
            sum(finding.severity == severity for finding in report.findings)
            for severity in (Severity.ERROR, Severity.WARNING, Severity.INFO)
        ]
        wrong += counts[0] + counts[1] > 0
        data: Any = report.evidence.data
        codes = ", ".join(dict.fromkeys(finding.code for finding in report.findings))
        gap = "–" if data.gap is None else f"{data.gap:.2f}"
        cells = [name, len(report.evidence.layers), gap, *counts, codes or "–"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    head = (
        "| network | batch norms | outputs, training to inference | errors | warnings | remarks | "
        "of these rules |\n|---|---|---|---|---|---|---|"
    )
    total = f"{len(rows) - wrong} of {len(rows)} healthy networks get no error and no warning."
    return "\n".join([total, "", head, *rows]), wrong


PARTS = {"broken": broken, "healthy": healthy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/doctor_gallery.md")
    parser.add_argument("--part", choices=PARTS, help="this table alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    failures = 0
    for marker in (arguments.part,) if arguments.part else PARTS:
        table, wrong = PARTS[marker]()
        failures += wrong
        text = f"{where_and_when('doctor_gallery.py')}\n\n{table}"
        print(f"{text}\n")
        if arguments.write:
            replace(marker, text)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
