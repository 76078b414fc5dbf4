"""Real networks converted and folded: what was done, what was left and why, how far answers moved.

    python benchmarks/surgery_table.py            # print the table
    python benchmarks/surgery_table.py --write    # and put it into docs/surgery.md

Every model is built small from its configuration, nothing is downloaded. It is taken twice: with
random weights and randomized statistics, and after a few real training steps; the larger
difference is reported. A difference is the norm of the difference over the norm, largest over all
outputs (or gradients, or buffers; one below a thousandth of the largest is measured against that).
Gradients are compared in float64, since many batch norms over
few values amplify float32's own rounding.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the networks, which the tests share

import monai  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rich.progress import track  # noqa: E402
from tests.models.surgery.test_models import inference, relative, step  # noqa: E402
from tests.models.surgery.zoo import ZOO, Entry, disturb, train_briefly  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from steadynorm.files import replace_file  # noqa: E402
from steadynorm.models.changes import Changes  # noqa: E402
from steadynorm.models.convert import convert  # noqa: E402
from steadynorm.models.fold import fold  # noqa: E402
from steadynorm.models.layers import recognize  # noqa: E402
from steadynorm.report.machine import processor  # noqa: E402

PAGE = ROOT / "docs" / "surgery.md"


class Row(NamedTuple):
    """One model: counts, reasons, and the largest relative differences."""

    name: str
    norms: int
    converted: int
    fused: int
    folded: int
    inference: float
    training: float
    gradients: float
    buffers: float
    fold: float
    unfused: Counter[str]
    unfolded: Counter[str]


def measure(name: str, entry: Entry) -> Row:
    rows = []
    for trained in (False, True):
        torch.manual_seed(0)
        model, inputs = entry.build(), entry.inputs()
        model = train_briefly(model, inputs) if trained else disturb(model)
        rows.append(measure_one(name, model, inputs))
    worst = {
        field: max(getattr(row, field) for row in rows)
        for field in ("inference", "training", "gradients", "buffers", "fold")
    }
    assert all(row[1:5] == rows[0][1:5] for row in rows)
    return rows[0]._replace(**worst)


def measure_one(name: str, model: nn.Module, inputs: Any) -> Row:
    converted, conversion = convert(model, example_inputs=inputs)
    folded, folding = fold(model.eval(), inputs)
    expected = inference(model, inputs)
    in_inference = relative(expected, inference(converted, inputs))
    after_fold = relative(expected, inference(folded, inputs))
    theirs, ours = (step(m.double(), inputs.double()) for m in (model, converted))
    return Row(
        name,
        sum(recognize(m) is not None for m in model.modules()),
        conversion.tally().get("converted", 0),
        conversion.tally().get("fused", 0),
        folding.tally().get("folded", 0),
        in_inference,
        relative(theirs["outputs"], ours["outputs"]),
        floored(theirs["gradients"], ours["gradients"]),
        floored(theirs["buffers"], ours["buffers"]),
        after_fold,
        reasons(conversion),
        reasons(folding),
    )


def floored(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """As `relative`, but what is zero but for rounding is compared with the largest one."""
    floor = 1e-3 * max((float(t.norm()) for t in theirs), default=0.0)
    pairs = zip(theirs, ours, strict=True)
    return max((float((a - b).norm()) / max(float(a.norm()), floor) for a, b in pairs), default=0.0)


def reasons(changes: Changes) -> Counter[str]:
    """Why things were left, without the names of single layers."""
    found: Counter[str] = Counter()
    for change in changes.left:
        why = change.why.replace(change.where, "it")
        if "torch.fx cannot follow" in why:
            why = "torch.fx cannot follow " + why.split("follow ")[1].split(" (")[0]
        elif "goes to" in why or "comes from" in why:
            why = "its neighbours are no linear layers or convolutions of its own"
        elif change.before.endswith(" after it"):
            why = f"{change.before}: {why}"
        found[why] += 1
    return found


def table(rows: list[Row]) -> str:
    lines = [
        "| model | batch norms | converted | fused | folded | inference | training | gradients "
        "| buffers | fold |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        differences = (row.inference, row.training, row.gradients, row.buffers, row.fold)
        cells = [row.name, *map(str, row[1:5]), *(f"{d:.0e}" for d in differences)]
        lines.append(f"| {' | '.join(cells)} |")
    totals = [str(sum(row[column] for row in rows)) for column in range(1, 5)]
    worst = [f"{max(row[column] for row in rows):.0e}" for column in range(5, 10)]
    lines.append(f"| **all {len(rows)}** | {' | '.join([*totals, *worst])} |")
    lines += ["", "Left, and why:", ""]
    for row in rows:
        for title, left in (("not fused", row.unfused), ("not folded", row.unfolded)):
            lines += [f"- {row.name}, {count} {title}: {why}." for why, count in left.items()]
    return "\n".join(lines)


def where_and_when(types: str, command: str) -> str:
    return (
        f"Measured {date.today().isoformat()} on {processor()}, {types}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"MONAI {monai.__version__}, by `python {command}`."
    )


def put(name: str, text: str) -> None:
    """Write what stands between the marks of this name in docs/surgery.md."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = PAGE.read_text("utf-8").split(begin)
    replace_file(PAGE, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/surgery.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [measure(name, entry) for name, entry in track(ZOO.items(), "models", transient=True)]
    types = "float32 (gradients, training and buffers in float64)"
    text = f"{where_and_when(types, 'benchmarks/surgery_table.py')}\n\n{table(rows)}"
    print(text)
    if arguments.write:
        put("table", text)


if __name__ == "__main__":
    main()
