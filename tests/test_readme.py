"""Every Python example in README.md and docs/ runs, and prints what it says it prints.

The blocks of a page share their names, in order. A block that starts with `>>>` is a doctest; any
other is executed.
"""

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_IN_DEV = {"executorch", "openvino", "torchao"}
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run_examples(text: str, name: str) -> list[str]:
    """Run a page's examples and return what failed; an exception in a plain block is raised."""
    names: dict[str, Any] = {"__name__": "__example__"}
    failures: list[str] = []
    for match in BLOCK.finditer(text):
        source, line = match.group(1), text.count("\n", 0, match.start()) + 1
        if source.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(source, names, name, name, line)
            test.globs = names  # the parser copies; examples share one namespace
            doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(
                test, out=failures.append, clear_globs=False
            )
        else:
            exec(compile("\n" * line + source, name, "exec"), names)
    return failures


def pages() -> list[Path]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        failures = run_examples(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NOT_IN_DEV:
            raise
        pytest.skip(str(error))
    assert not failures, "\n".join(failures)


def test_a_wrong_example_is_seen() -> None:
    assert run_examples("```python\n>>> 1 + 1\n3\n\n```\n", "page") != []
    assert run_examples("```python\nx = 2\n```\n\n```python\n>>> x + 1\n3\n\n```\n", "page") == []
    with pytest.raises(ZeroDivisionError):
        run_examples("text\n\n```python\n1 / 0\n```\n", "page")
