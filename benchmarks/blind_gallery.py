"""How often the doctor finds a fault, against its strength, and how often it blames the healthy.

    python benchmarks/blind_gallery.py            # print the table
    python benchmarks/blind_gallery.py --write    # and put table and curves into docs/

Faults of random strength are planted at random places in small networks of transformers and MONAI
that read digits (`tests/doctor/gallery/blind.py`). A fault costs the points of accuracy on digits
that no network saw by which inference is worse than the same network without it. Everything is
trained here; nothing is downloaded. `--draws` and `--healthy` say how many.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the networks, which the tests share

import torch  # noqa: E402
from rich.progress import track  # noqa: E402
from tests.doctor.gallery import blind_page  # noqa: E402
from tests.doctor.gallery.blind import FAULTS  # noqa: E402
from tests.doctor.gallery.blind_trial import healthy_trial, trial  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/")
    parser.add_argument("--draws", type=int, default=10, help="of each fault")
    parser.add_argument("--healthy", type=int, default=100, help="networks")
    parser.add_argument("--only", default="", help="faults whose code or name contains this")
    parser.add_argument("--record", type=Path, help="a JSON file that keeps every trial")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = [name for name, f in FAULTS.items() if arguments.only in f"{f.code} {name}"]
    planned = [(name, number) for name in chosen for number in range(arguments.draws)]
    trials = [trial(*one, of=arguments.draws) for one in track(planned, "faults", transient=True)]
    numbers = track(range(arguments.healthy), "healthy networks", transient=True)
    blamed = [healthy_trial(number) for number in numbers]
    found: dict[str, Any] = {"faults": trials, "healthy": blamed}
    if arguments.record:
        arguments.record.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(blind_page.table(found))
    if arguments.write:
        blind_page.write(found)


if __name__ == "__main__":
    main()
