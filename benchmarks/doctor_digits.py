"""A digit classifier trained at batch 2: what the doctor says, and what its cures are worth.

    python benchmarks/doctor_digits.py            # print the table
    python benchmarks/doctor_digits.py --write    # and put it into docs/doctor_gallery.md

scikit-learn's handwritten digits; fully connected, with torch's batch norms and defaults; batches
of 2 from the training digits are shown to the doctor, with the loss. `--fix` applies what is safe:
statistics measured anew on the training digits. The doctor's other advice is tried as well: the
same network trained at batch 2 with `Steady`, and at batch 8. Accuracy of inference on the 360 test
digits.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.doctor.gallery.page import replace, where_and_when  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import steadynorm as sn  # noqa: E402
from steadynorm.doctor.fixes import fix  # noqa: E402
from steadynorm.evidence import workers  # noqa: E402
from steadynorm.evidence.digits import batches, load, tensors  # noqa: E402
from steadynorm.evidence.estimates import mean  # noqa: E402
from steadynorm.evidence.networks import build  # noqa: E402
from steadynorm.evidence.training import Recipe, Tick, inference_accuracy, train  # noqa: E402
from steadynorm.statistics import Policy  # noqa: E402

SAMPLES = 9_000


class Outcome(NamedTuple):
    """One seed: findings before and after as (code, layer), independent values in a batch, and
    accuracies of inference in %.
    """

    before: list[tuple[str, str]]
    after: list[tuple[str, str]]
    known: float
    trained: float
    fixed: float
    steady: float
    larger: float


def trained(
    statistics: Policy | str, batch_size: int, seed: int, tick: Tick
) -> tuple[nn.Module, float]:
    network = build("fully connected", statistics, load(), seed)
    train(network, load(), Recipe(batch_size, SAMPLES, points=1), seed=seed, tick=tick)
    _, _, images, labels = tensors(load())
    return network.eval(), 100 * inference_accuracy(network, images, labels)


def run(seed: int, *, tick: Tick) -> Outcome:
    network, before = trained("torch", 2, seed, tick)
    images, labels, test_images, test_labels = tensors(load())
    order = islice(batches(len(labels), 2, seed), len(labels) // 2)
    data = [(images[batch], labels[batch]) for batch in order]
    report = sn.diagnose(network, data, loss=F.cross_entropy)
    fixed = fix(network, report, data, loss=F.cross_entropy)
    after = 100 * inference_accuracy(fixed.model, test_images, test_labels)
    first = report.findings[0]
    return Outcome(
        [(f.code, f.layer) for f in report.findings],
        [(f.code, f.layer) for f in fixed.after.findings],
        float(first.evidence.get("independent_values", 0)),
        before,
        after,
        trained(sn.Steady(), 2, seed, tick)[1],
        trained("torch", 8, seed, tick)[1],
    )


def tally(seen: list[str]) -> str:
    return ", ".join(f"{what} ({count} of {len(seen)})" for what, count in Counter(seen).items())


def table(outcomes: list[Outcome]) -> str:
    firsts = [f"{run.before[0][0]} in layer `{run.before[0][1]}`" for run in outcomes]
    known = mean(run.known for run in outcomes).plus_minus
    rows = [
        ("trained at batch 2", [run.trained for run in outcomes]),
        ("after `--fix`", [run.fixed for run in outcomes]),
        ("gain of `--fix`, paired", [run.fixed - run.trained for run in outcomes]),
        ("trained at batch 2 with `Steady`, as advised", [run.steady for run in outcomes]),
        ("trained at batch 8, as advised", [run.larger for run in outcomes]),
    ]
    lines = [
        f"Named first: {tally(firsts)}; a batch counts for {known} independent values. Stale "
        f"statistics, SN302, in {sum('SN302' in dict(run.before) for run in outcomes)} of "
        f"{len(outcomes)} before `--fix`, in "
        f"{sum('SN302' in dict(run.after) for run in outcomes)} after it. Accuracy rises by "
        f"`--fix` in {sum(run.fixed > run.trained for run in outcomes)} of {len(outcomes)} seeds.",
        "",
        f"| | accuracy of inference, %, {len(outcomes)} seeds |",
        "|---|---|",
        *(f"| {name} | {mean(values).plus_minus} |" for name, values in rows),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, help="processes; all cores by default")
    parser.add_argument("--write", action="store_true", help="put it into docs/doctor_gallery.md")
    arguments = parser.parse_args()
    steps = 2 * SAMPLES // 2 + SAMPLES // 8
    work = [workers.Job("digits", (seed,), steps, run, (seed,)) for seed in range(arguments.seeds)]
    outcomes = {job.key: outcome for job, outcome in workers.run(work, workers=arguments.workers)}
    found = [outcomes[key] for key in sorted(outcomes)]
    text = f"{where_and_when('doctor_digits.py')}\n\n{table(found)}"
    print(text)
    if arguments.write:
        replace("digits", text)


if __name__ == "__main__":
    main()
