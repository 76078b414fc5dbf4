"""A rule's page, made from the rule: for the documentation, and for `doctor --explain`."""

from __future__ import annotations

import textwrap
from pathlib import Path

from steadynorm.doctor.rules import all_rules, find_rule
from steadynorm.doctor.rules.rule import Rule

NEEDS = {
    "state": "a checkpoint or a model",
    "model": "a model",
    "data": "a model and batches",
    "run": "a watched training run",
}
SAFE = {True: "safe, `--fix` applies it", False: "a decision", None: "by hand"}
WIDTH = 88


def page(rule: Rule) -> str:
    """The page of a rule as Markdown."""
    facts = "\n".join(f"| {name} | {what} |" for name, what in _facts(rule))
    parts = [f"# {rule.code}: {rule.name}", rule.summary, f"| | |\n|---|---|\n{facts}"]
    parts += [f"## {title}\n\n{text}" for title, text in _sections(rule)]
    if rule.line:
        parts[-1] += f"\n\n```text\n{rule.line}\n```"
    for title, others in _related(rule):
        links = ", ".join(f"[{other.code} {other.name}]({other.code}.md)" for other in others)
        parts.append(f"## {title}\n\n{links}")
    parts.append(f"Source: {rule.source}")
    return "\n\n".join(parts) + "\n"


def plain(rule: Rule) -> str:
    """The same for a terminal."""
    (_, severity), (_, needs), (_, safe) = _facts(rule)
    facts = f"{severity}; needs {needs}; cure: {safe}".replace("`", "")
    parts = [f"{rule.code} {rule.name}", rule.summary, facts]
    parts += [f"{title}\n{text}" for title, text in _sections(rule)]
    if rule.line:
        parts[-1] += f"\n    {rule.line}"
    for title, others in _related(rule):
        parts.append(f"{title}: {', '.join(f'{other.code} {other.name}' for other in others)}")
    parts.append(f"Source: {rule.source}")
    wrapped = [_wrapped(line) for part in parts for line in (*part.splitlines(), "")]
    return "\n".join(wrapped).rstrip()


def _wrapped(line: str) -> str:
    return line if line.startswith("    ") else textwrap.fill(line, WIDTH, break_on_hyphens=False)


def _facts(rule: Rule) -> list[tuple[str, str]]:
    return [
        ("severity", f"up to {rule.severity}"),
        ("needs", NEEDS[rule.needs]),
        ("cure", SAFE[rule.safe]),
    ]


def _sections(rule: Rule) -> list[tuple[str, str]]:
    return [("Why it matters", rule.why), ("When it speaks", rule.threshold), ("Cure", rule.cure)]


def _related(rule: Rule) -> list[tuple[str, list[Rule]]]:
    """Rules that this one explains, and that may explain it."""
    causes = [other for other in all_rules() if rule.code in other.explains]
    related = [("Explains", [find_rule(c) for c in rule.explains]), ("May follow from", causes)]
    return [(title, others) for title, others in related if others]


def index() -> str:
    """The page that lists all rules."""
    rows = [
        f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.severity} | {rule.summary} |"
        for rule in all_rules()
    ]
    return (
        "# Rules of the doctor\n\n"
        "SN1 by the state alone, of a checkpoint or a model; SN2 by the model; SN3 by batches; "
        "SN4 by a watched training run.\n\n"
        "| code | name | up to | what is wrong |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    return {"index.md": index(), **{f"{rule.code}.md": page(rule) for rule in all_rules()}}


def write(folder: Path) -> None:
    """Writes all pages and removes those of rules that no longer exist."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    for old in folder.glob("SN*.md"):
        if old.name not in made:
            old.unlink()
