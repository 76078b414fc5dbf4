"""The lab's `batch-of-one` on MNIST's test digits, and the picture of docs/steady.md.

    python benchmarks/batch_of_one.py run --data-dir FOLDER --out FOLDER     MNIST's IDX files
    python benchmarks/batch_of_one.py seeds --groups 6 --out FOLDER          more seeds, two pairs
    python benchmarks/batch_of_one.py picture                                of docs/lab/results

`run`: two epochs of 8,000 digits, one for the residual network, and fewer cells than in the lab.
`seeds`: the residual network at 64 under `Steady` and `Batch`, and fully connected layers one at a
time under `Steady` against `Batch` at 64, each with six seeds for a group, on scikit-learn's digits
or MNIST's. The first group is that of the lab's `batch-of-one`, or of `run`. What has finished
before is not repeated.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Optional

import typer
from lab_page import drawn

from steadynorm.evidence import estimates
from steadynorm.evidence.lab import runner
from steadynorm.evidence.lab.experiments import batch_of_one, get
from steadynorm.evidence.lab.runs import Runs
from steadynorm.evidence.lab.store import read
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.files import replace_file

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "batch_of_one.svg"
RESULTS = ROOT / "docs" / "lab" / "results" / "batch-of-one.json"
NETWORKS = 6
SIZES = (1, 2, 4, 8, 64)
COLORS = {
    "two-way": "#0b62b0", "one-way": "#2aa1b3", "batch": "#c8500a", "renorm": "#8a6a00",
    "group": "#0a7d5a", "layer": "#9c3c8b", "none": "#4b5a6e",
}  # fmt: skip

CELLS = (("batch", 64), ("batch", 2), ("two-way", 1), ("two-way", 2))
SETTINGS = [
    {"network": network, "kind": kind, "batch": batch, "networks": NETWORKS}
    | {"samples": 8_000 if network == batch_of_one.RESIDUAL else 16_000}
    for network in batch_of_one.ALLOWED
    for kind, batch in CELLS
    if (network, kind, batch) != (batch_of_one.RESIDUAL, "two-way", 2)
]

PAIRS = {
    batch_of_one.RESIDUAL: (("two-way", 64), ("batch", 64)),
    batch_of_one.FLAT: (("two-way", 1), ("batch", 64)),
}
BOUNDS = {
    batch_of_one.RESIDUAL: {"error": 0.3, "error_calibrated": 0.3},
    batch_of_one.FLAT: {"error": 0.7, "error_calibrated": 0.4},
}
"""Points of error that the first of a pair may have more."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    data_dir: Annotated[Path, typer.Option(help="MNIST's IDX files.")],
    out: Annotated[Path, typer.Option(help="Folder for finished runs and results.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Run what is missing, and print tables and differences."""
    short = replace(get("batch-of-one"), settings=dict.fromkeys(("quick", "full"), SETTINGS))
    (path,) = runner.run([short], profile="full", data_dir=str(data_dir), out=out, workers=workers)
    head, runs = read(path)
    print(f"{head['data']}; {', '.join(head['made_with'])}\n")
    for table in short.figures(runs).tables:
        print(f"{table.title}\n\n{table.markdown()}\n")
    for name, words in (("error", "running"), ("error_calibrated", "calibrated")):
        for network in runs.distinct("network"):
            some = batch_of_one.by_network(runs).where(network=network)
            one, all_ = (
                some.values(name, kind=k, batch=b) for k, b in (("two-way", 1), ("batch", 64))
            )
            print(f"{network}, {words}: {estimates.difference(one, all_).text(2)} points more")


@app.command()
def seeds(
    out: Annotated[Path, typer.Option(help="Folder for finished runs and results.")],
    groups: Annotated[int, typer.Option(min=1, help="Of six seeds each.")] = 6,
    data_dir: Annotated[
        Optional[Path],  # noqa: UP045  typer reads it at run time
        typer.Option(help="MNIST's IDX files, instead of scikit-learn's digits."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Run two pairs with more seeds, and print their differences."""
    whole = get("batch-of-one")
    known = whole.settings["full"] if data_dir is None else SETTINGS
    settings = [
        {**next(s for s in known if s["network"] == network), "kind": kind, "batch": size}
        for network, both in PAIRS.items()
        for kind, size in both
    ]
    more = replace(whole, settings={"full": settings}, verdict=paired)
    folder = None if data_dir is None else str(data_dir)
    (path,) = runner.run(
        [more], profile="full", seeds=groups, data_dir=folder, out=out, workers=workers
    )
    head, _ = read(path)
    print(f"{head['data']}; {', '.join(head['made_with'])}\n{head['verdict']['sentence']}")


def paired(runs: Runs) -> Verdict:
    """The difference of each pair, over all seeds and without the first group's."""
    runs = batch_of_one.by_network(runs)
    findings, said = [], []
    for network, both in PAIRS.items():
        for name, bound in BOUNDS[network].items():
            ours, theirs = (
                runs.values(name, network=network, kind=kind, batch=size) for kind, size in both
            )
            for first in (0, NETWORKS)[: 1 + (len(ours) > NETWORKS)]:
                more = estimates.difference(ours[first:], theirs[first:])
                words = f"{network}, {both[0]} minus {both[1]}, {name}, from seed {first} on"
                findings.append(expect(words, more, below=bound))
                means = f"{fmean(ours[first:]):.2f} against {fmean(theirs[first:]):.2f}"
                said.append(f"{words} ({more.seeds}): {more.text(2)} points, {means}")
    return judge("\n".join(said), findings)


@app.command()
def picture(results: Path = RESULTS, out: Path = PICTURE) -> None:
    """Draw error over batch size: a panel for each network, a line for each kind."""
    _, runs = read(results)
    replace_file(out, drawn(panels(batch_of_one.by_network(runs))))


def panels(runs: Runs) -> dict[str, Any]:
    """One for each network; what never looks across samples is a level, dashed."""
    import altair as alt

    names = batch_of_one.NAMES
    order = [names[kind] for kind in COLORS]
    rows = [
        {"network": run["network"], "kind": names[run["kind"]], "batch": size}
        | {"error": run["error"], "level": run["kind"] in batch_of_one.OUTSIDE}
        for run in runs
        for size in (SIZES if run["kind"] in batch_of_one.OUTSIDE else [run["batch"]])
    ]
    across = alt.X("batch:Q", title="samples normalized together")
    upwards = alt.Y("mean(error):Q", title="error on the test digits, %")
    color = alt.Color("kind:N").scale(domain=order, range=list(COLORS.values()))
    dashes = alt.StrokeDash("level:N", legend=None).scale(
        domain=[False, True], range=[[1, 0], [5, 4]]
    )
    steady = alt.datum.kind == names["two-way"]
    found = []
    for network in batch_of_one.ALLOWED:
        some = [row for row in rows if row["network"] == network]
        line = alt.Chart(alt.InlineData(values=some)).encode(
            x=across.scale(type="log", base=2, nice=False)
            .axis(values=list(SIZES), format="~g", grid=False),
            y=upwards.scale(type="log", domain=[1, 100])
            .axis(values=[1, 2, 5, 10, 20, 50, 100], format="~g"),
            color=color, strokeDash=dashes,
        )  # fmt: skip
        layers = [
            line.mark_line().encode(
                strokeWidth=alt.condition(steady, alt.value(4.0), alt.value(2.0))
            ),
            line.transform_filter("!datum.level").mark_circle(size=45, opacity=1),
        ]
        found.append(alt.layer(*layers).properties(title=network, width=300, height=200))
    spec: dict[str, Any] = alt.vconcat(alt.hconcat(*found[:2]), alt.hconcat(*found[2:])).to_dict()
    return spec


if __name__ == "__main__":
    app()
