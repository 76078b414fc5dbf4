"""The report: from saved results alone, in a real browser, by the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("altair", reason="charts need the extra lab")

from tests.evidence.lab.tiny import TINY

from steadynorm.cli import app
from steadynorm.evidence.lab import report
from steadynorm.evidence.lab.experiments import get
from steadynorm.evidence.lab.store import Store, read

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
cli = CliRunner()


def invented(experiment, folder):
    """Results of runs that never took place: error falls with the batch, Batch is worst."""
    store = Store(folder, "invented digits")
    planned = experiment.planned("quick")
    for run in planned:
        bad = 20.0 if run.setting["policy"] == "batch" and run.setting["batch"] < 8 else 0.5
        error = None if bad > 1 and run.setting["batch"] == 1 else 1 + bad + run.seed / 100
        stopped = None if error else "one value per channel </script><script>"
        store.put(experiment, run, {"error": error, "stopped": stopped})
    return store.finish(experiment, "quick", planned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("lab")
    invented(get("small-batches"), out)
    unknown = replace(TINY, name="gone", claim="a | b")
    store = Store(out, "invented digits")
    for run in unknown.planned("quick"):
        store.put(unknown, run, {"accuracy": 0.5})
    store.finish(unknown, "quick", unknown.planned("quick"))
    shutil.rmtree(out / "runs")
    report.write(out)
    return out


def test_verdict_and_tables_come_from_the_file(folder):
    first, second = report.saved(folder / "results")
    assert (first.name, second.name) == ("small-batches", "gone"), "the lab's order"
    assert first.head["verdict"]["outcome"] == "supported"
    flat = first.figures().tables[0]
    batch = next(row for row in flat.rows if row[0] == "Batch")
    assert list(batch[1:]) == ["1.5 ± 0.0", "1.5 ± 0.0", "21.0 ± 0.0", "cannot train"]
    assert second.figures().text == [
        "Saved by another version of the lab: its figures are in the file."
    ]


def test_markdown_has_a_row_for_each(folder):
    rows = (folder / "report.md").read_text().splitlines()
    assert len(rows) == 4
    assert (
        "| **supported** | Batch at 2 minus at 8, fully connected: 19.5 (19.5 to 19.5) | 3 |"
        in (rows[2])
    )
    assert "a \\| b" in rows[3]


def test_a_changed_experiment_shows_no_charts_of_old_results(folder, monkeypatch):
    newer = replace(get("small-batches"), revision=2)
    monkeypatch.setattr(report, "get", lambda name: newer)
    assert report.saved(folder / "results")[0].figures().charts == ()


def test_report_as_json(folder):
    result = cli.invoke(app, ["lab", "report", "--out", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    written = {"report": str(folder / "report.html"), "table": str(folder / "report.md")}
    assert json.loads(result.stdout) == written


def test_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold results; found none"):
        report.saved(tmp_path)
    result = cli.invoke(app, ["lab", "report", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "steadynorm lab run --all" in result.output


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": []}', '{"runs": [{}]}', "\udcff"])
def test_a_file_that_holds_no_results_is_named(tmp_path, content):
    path = tmp_path / "results" / "bias.json"
    path.parent.mkdir()
    path.write_text(content, "utf-8", "surrogateescape")
    result = cli.invoke(app, ["lab", "report", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith(f"steadynorm lab: {path}: no results file of the lab (")


def test_the_results_file_has_a_run_on_a_line(folder):
    path = folder / "results" / "small-batches.json"
    head, runs = read(path)
    assert json.loads(path.read_text())["runs"][3]["setting"] == runs[3].setting
    lines = path.read_text().splitlines()
    assert sum(line.startswith('  {"result"') for line in lines) == len(runs) == 216
    assert head["rule"] == get("small-batches").rule


def test_the_page_draws_itself_and_asks_for_nothing(folder):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if BROWSER is None:
        pytest.skip("needs chromium on the path")
    address = (folder / "report.html").as_uri()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=BROWSER,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        requests, complaints = [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(address)
        tab.wait_for_selector("html[data-charts=drawn]", timeout=60_000)
        assert requests == [address]
        assert complaints == []
        drawn = "document.querySelectorAll('.chart svg .mark-line path').length"
        charts = tab.evaluate("document.querySelectorAll('.chart svg').length")
        assert charts == 4, "two networks, clipped and not"
        assert tab.evaluate(drawn) >= 8, "a line for each policy"
        assert "Small batches" in tab.inner_text("table")
        browser.close()


def test_list_names_all():
    result = cli.invoke(app, ["lab", "list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for name in ("convergence", "small-batches", "steady-parts"):
        assert name in result.output


@pytest.mark.parametrize("arguments", [[], ["convergence", "--all"]])
def test_run_wants_names_or_all(arguments, tmp_path):
    result = cli.invoke(app, ["lab", "run", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "name the experiments, or say --all" in result.output


def test_run_says_which_names_there_are(tmp_path):
    result = cli.invoke(app, ["lab", "run", "magic", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "must be one of convergence" in result.output


def test_run_goes_on_from_what_is_stored_and_reports(tmp_path):
    path = invented(get("small-batches"), tmp_path)
    store = Store(tmp_path, "invented digits")
    before = path.read_bytes()
    path.unlink()
    from steadynorm.evidence.lab import runner

    given = pytest.MonkeyPatch()
    given.setattr(runner, "load", lambda folder: store.data)
    try:
        words = ["lab", "run", "small-batches", "--out", str(tmp_path)]
        result, as_json = cli.invoke(app, words), cli.invoke(app, [*words, "--json"])
    finally:
        given.undo()
    assert result.exit_code == 0, result.output
    assert "Small batches: supported. From batch 8 to batch 2" in result.output
    assert path.read_bytes() == before
    (told,) = json.loads(as_json.stdout)["experiments"]
    assert told.pop("file") == str(path)
    assert told == read(path)[0], "--json: the results' head, and nothing else on stdout"
    assert Path(tmp_path / "report.html").stat().st_size > 100_000


def test_help_loads_no_framework():
    code = (
        "import sys; from typer.testing import CliRunner; from steadynorm.cli import app\n"
        "print('--profile' in CliRunner().invoke(app, ['lab', 'run', '--help']).output)\n"
        "print(sorted({'torch', 'numba', 'sklearn', 'altair', 'jax', 'keras'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["True", "[]"]


def test_says_in_one_line_what_to_install(monkeypatch):
    monkeypatch.setattr("steadynorm._extras.find_spec", lambda name: None)
    result = cli.invoke(app, ["lab", "run", "--all"])
    assert result.exit_code == 2
    assert result.output == (
        'steadynorm lab: needs torch, which is not installed: pip install "steadynorm[torch]"\n'
    )
