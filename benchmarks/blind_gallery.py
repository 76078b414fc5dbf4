"""How often the doctor finds a fault, against its strength, and how often it blames the healthy.

    python benchmarks/blind_gallery.py            # print the table
    python benchmarks/blind_gallery.py --write    # and put table and curves into docs/

Faults of random strength are planted at random places in small networks of transformers and MONAI
that read digits (`tests/doctor/gallery/blind.py`). A fault costs the points of accuracy on digits
that no network saw by which inference is worse than the same network without it. Everything is
trained here; nothing is downloaded. `--draws` and `--healthy` say how many; `--minutes` ends it.
Rules were tuned on draws and healthy networks below 3000; `--first` says where a test begins.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the networks, which the tests share

import torch  # noqa: E402
from rich.progress import track  # noqa: E402
from tests.doctor.gallery import blind_page  # noqa: E402
from tests.doctor.gallery.all_faults import FAULTS  # noqa: E402
from tests.doctor.gallery.blind_trial import healthy_trial, trial  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/")
    parser.add_argument("--draws", type=int, default=10, help="of each fault")
    parser.add_argument("--healthy", type=int, default=100, help="networks")
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--only", default="", help="faults whose code or name has one of these")
    parser.add_argument("--minutes", type=float, default=60, help="begin no draw after so many")
    parser.add_argument("--record", type=Path, help="a file of lines of JSON, gone on with")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in recorded(arguments.record)]
    end = monotonic() + 60 * arguments.minutes
    for kind, key in track(planned(arguments), "draws", transient=True):
        if any([kind, list(key)] == line[:2] for line in lines):
            continue
        if monotonic() > end:
            break
        lines.append([kind, list(key), trial(*key) if kind == "fault" else healthy_trial(*key)])
        if arguments.record:
            with arguments.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    found = blind_page.Found(
        *([line[2] for line in lines if line[0] == kind] for kind in ("fault", "healthy"))
    )
    print(blind_page.table(found))
    if arguments.write:
        blind_page.write(found)


def recorded(record: Path | None) -> list[str]:
    return record.read_text("utf-8").splitlines() if record and record.exists() else []


def planned(arguments: argparse.Namespace) -> list[tuple[str, tuple[Any, ...]]]:
    """All faults once, some healthy networks, all faults again, so that any part is a fair one."""
    parts = arguments.only.split(",")
    names = [n for n, f in FAULTS.items() if any(part in f"{f.code} {n}" for part in parts)]
    share = -(-arguments.healthy // arguments.draws)
    made: list[tuple[str, tuple[Any, ...]]] = []
    first = arguments.first
    for draw in range(arguments.draws):
        made += [("fault", (name, first + draw)) for name in names]
        sound = range(share * draw, min(share * (draw + 1), arguments.healthy))
        made += [("healthy", (first + number,)) for number in sound]
    return made


if __name__ == "__main__":
    main()
