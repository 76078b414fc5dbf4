"""Many architectures' variants converted and folded: what was kept, refused, and wrong.

    python benchmarks/survey.py            # print the table
    python benchmarks/survey.py --write    # and put it into docs/surgery.md

Every model is built small from its configuration, with random weights and statistics, in float64,
and nothing is downloaded. Compared are, at 1e-7: its answers in inference with those after convert,
fold, and fold after convert; and the outputs, gradients and running statistics of one training step
with those after convert. No example inputs are given to convert, so that it verifies nothing
itself. A difference is the norm of the difference over the norm; what is below a thousandth of the
largest of its kind is compared with that.

"kept": batch norms converted. "refused": left as they were, with the reason; or a whole model that
convert or fold refuses. "wrong": a variant with a larger difference, or with an error where the
original has none. Exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the networks, which the tests share

import torch  # noqa: E402
from benchmarks.surgery_table import put, where_and_when  # noqa: E402
from rich.progress import track  # noqa: E402
from tests.models.surgery.test_models import inference, step  # noqa: E402
from tests.models.surgery.variants import VARIANTS  # noqa: E402
from tests.models.surgery.zoo import Entry, disturb  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from steadynorm.models.convert import convert  # noqa: E402
from steadynorm.models.equivalence import in_double  # noqa: E402
from steadynorm.models.fold import fold  # noqa: E402
from steadynorm.models.layers import recognize  # noqa: E402

LIMIT = 1e-7


class Found(NamedTuple):
    """One variant. `reasons`: why batch norms were left; `wrong`: what differs, empty if nothing.

    `largest`: the largest difference of all that was compared.
    """

    name: str
    norms: int
    kept: int
    fused: int
    folded: int
    largest: float
    reasons: tuple[str, ...]
    wrong: tuple[str, ...]


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest relative difference; infinity for other shapes, or NaN on one side alone."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    floor = 1e-3 * max((float(t.norm()) for t in expected), default=0.0) + 1e-30
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if not bool((a.isnan() == b.isnan()).all()):
            return float("inf")
        off = float((a - b).nan_to_num().norm()) / max(float(a.nan_to_num().norm()), floor)
        worst = max(worst, off)
    return worst


def examine(name: str, entry: Entry) -> Found:
    """Builds, converts, folds and compares one variant."""
    torch.manual_seed(0)
    model, inputs = disturb(entry.build()).double(), in_double(entry.inputs())
    norms = sum(recognize(module) is not None for module in model.modules())
    expected, trained = inference(model, inputs), step(copy.deepcopy(model), inputs)
    assert norms, f"{name} has no batch norm"
    assert trained["gradients"], f"{name} has no gradient"
    assert all(bool(t.isfinite().all()) for t in expected), f"{name} does not answer"
    differences: dict[str, float] = {}
    wrong: list[str] = []
    reasons: list[str] = []
    tallies: Counter[str] = Counter()

    def attempt(what: str, run: Any) -> Any:
        try:
            return run()
        except (ValueError, TypeError) as error:  # as convert and fold refuse
            reasons.append(f"{what} refuses the model: {error}")
        return None

    def compare(what: str, model: nn.Module) -> None:
        try:
            differences[what] = difference(expected, inference(model, inputs))
        except Exception as error:  # noqa: BLE001  the original raises none
            wrong.append(f"{what}: {type(error).__name__}: {error}")

    converted = attempt("convert", lambda: convert(model))
    if converted is not None:
        ours, changes = converted
        tallies.update(changes.tally())
        reasons += [
            f"{row.before} left: {row.why}" for row in changes.left if "after it" not in row.before
        ]
        compare("inference after convert", ours)
        after = step(copy.deepcopy(ours), inputs)
        for part, values in trained.items():
            differences[f"{part} of a training step"] = difference(values, after[part])
    for what, start in (("fold", model), ("fold after convert", converted and converted[0])):
        folded = attempt(what, lambda start=start: fold(start.eval(), inputs)) if start else None
        if folded is not None:
            tallies[what] = folded[1].tally().get("folded", 0)
            compare(what, folded[0])
    wrong += [f"{what}: off by {off:.1g}" for what, off in differences.items() if not off <= LIMIT]
    return Found(
        name, norms, tallies["converted"], tallies["fused"], tallies["fold"],
        max(differences.values(), default=0.0), tuple(reasons), tuple(wrong),
    )  # fmt: skip


def table(rows: list[Found]) -> str:
    """A row for each architecture, and what was left and why."""
    lines = [
        "| architecture | variants | batch norms | kept | calls merged | folded | refused | wrong "
        "| largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def cells(title: str, group: list[Found]) -> str:
        sums = [sum(getattr(row, field) for row in group) for field in Found._fields[1:5]]
        refused = sum(row.norms - row.kept for row in group)
        wrong = sum(bool(row.wrong) for row in group)
        largest = max(row.largest for row in group)
        figures = (len(group), *sums, refused, wrong, f"{largest:.0e}")
        return f"| {title} | {' | '.join(map(str, figures))} |"

    groups: dict[str, list[Found]] = {}
    for row in rows:
        groups.setdefault(row.name.partition(" (")[0], []).append(row)
    lines += [cells(title, group) for title, group in groups.items()]
    lines.append(cells("**all**", rows))
    reasons = Counter(reason for row in rows for reason in row.reasons)
    if reasons:
        lines += ["", "Refused, and why:", ""]
        lines += [f"- {count} times: {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/surgery.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [examine(*item) for item in track(VARIANTS.items(), "variants", transient=True)]
    text = f"{where_and_when('float64', 'benchmarks/survey.py')}\n\n{table(rows)}"
    print(text)
    for row in rows:
        for what in row.wrong:
            print(f"wrong: {row.name}: {what}")
    if arguments.write:
        put("survey", text)
    sys.exit(any(row.wrong for row in rows))


if __name__ == "__main__":
    main()
