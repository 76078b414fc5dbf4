"""The table and the curves of the blind gallery, for docs/blind_gallery.md."""

from __future__ import annotations

from collections import defaultdict
from html import escape
from pathlib import Path
from typing import NamedTuple

from tests.doctor.gallery.blind_trial import Trial
from tests.doctor.gallery.page import DOCS, replace, where_and_when

COSTLY = 0.02
COLUMNS, WIDTH, HEIGHT = 4, 230, 170


class Found(NamedTuple):
    """Trials of faults, and what each healthy network was blamed for."""

    faults: list[Trial]
    healthy: list[list[str]]


def first(trial: Trial) -> bool:
    """Whether the doctor names the fault before anything else."""
    return trial["codes"][:1] == [trial["code"]]


def share(flags: list[bool]) -> str:
    return f"{sum(flags)} of {len(flags)}" if flags else "–"


def by_fault(found: Found) -> dict[str, list[Trial]]:
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in found.faults:
        groups[trial["fault"]].append(trial)
    return dict(sorted(groups.items(), key=lambda item: item[1][0]["code"]))


def table(found: Found) -> str:
    """All figures as Markdown."""
    trials, healthy = found.faults, found.healthy
    costly = [t for t in trials if t["cost"] >= COSTLY]
    cured = [t for t in costly if t.get("own_cure")]
    harmed = [t for t in trials if t.get("gain", 0) < -t.get("error", 0)]
    missed: dict[str, int] = defaultdict(int)
    for trial in costly:
        if not first(trial):
            missed[f"{trial['code']} as {(trial['codes'] or ['nothing'])[0]}"] += 1
    clear = share([first(t) for t in costly if t["cost"] > t["cost_error"]])
    lines = [
        f"- Faults that cost at least 2 points: {share([first(t) for t in costly])} named first, "
        f"{share([t['code'] in t['codes'] for t in costly])} named at all.",
        f"- Of these, faults that cost more than their interval too: {clear} named first.",
        f"- Not named first: {', '.join(f'{k} ({n})' for k, n in missed.items()) or 'none'}.",
        f"- Healthy networks with a warning or an error: {share([bool(h) for h in healthy])}"
        + (f" ({', '.join(sorted({c for h in healthy for c in h}))})." if any(healthy) else "."),
        f"- `--fix` on faults that cost at least 2 points, where it changes anything that concerns "
        f"them: accuracy rises in {share([t['gain'] > 0 for t in cured])}; in all draws, whatever "
        f"it changes, it falls by more than its interval in {len(harmed)}.",
        "",
        "| fault | code | strength | costs 2 points: named first | all draws: named first | "
        "`--fix` raises accuracy |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, group in by_fault(found).items():
        dear = [t for t in group if t["cost"] >= COSTLY]
        gains = [t["gain"] > 0 for t in dear if t.get("own_cure")]
        lines.append(
            f"| {name} | {group[0]['code']} | {group[0]['unit'] or '–'} | "
            f"{share([first(t) for t in dear])} | {share([first(t) for t in group])} | "
            f"{share(gains)} |"
        )
    return "\n".join(lines)


def curves(found: Found) -> str:
    """A small picture for each fault that has a strength: named first (top) or not (bottom) against
    strength, and the share among three neighbours as a line.
    """
    groups = [(n, g) for n, g in by_fault(found).items() if g[0]["unit"]]
    rows = -(-len(groups) // COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * WIDTH} '
        f'{rows * HEIGHT + 24}" font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="8" y="14">Named first (1) or not (0); filled: the fault costs 2 points of '
        "accuracy or more; line: share among three neighbours</text>",
    ]
    for number, (name, group) in enumerate(groups):
        left, top = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT + 24
        parts.append(f'<g transform="translate({left},{top})">{_panel(name, group)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(name: str, group: list[Trial]) -> str:
    group = sorted(group, key=lambda t: t["amount"])
    low, high = group[0]["amount"], group[-1]["amount"]

    def x(amount: float) -> float:
        return 28 + (WIDTH - 44) * (amount - low) / ((high - low) or 1)

    def y(value: float) -> float:
        return HEIGHT - 52 - (HEIGHT - 94) * value

    parts = [
        f'<text x="28" y="12" font-weight="bold">{group[0]["code"]}</text>'
        f'<text x="28" y="25">{escape(name)}</text>'
    ]
    parts += [
        f'<line x1="24" x2="{WIDTH - 12}" y1="{y(value)}" y2="{y(value)}" stroke="#ccc"/>'
        f'<text x="12" y="{y(value) + 3}">{value}</text>'
        for value in (0, 1)
    ]
    near = [group[max(0, i - 1) : i + 2] for i in range(len(group))]
    points = [
        f"{x(t['amount']):.1f},{y(sum(map(first, some)) / len(some)):.1f}"
        for t, some in zip(group, near, strict=True)
    ]
    parts.append(
        f'<polyline points="{" ".join(points)}" fill="none" stroke="#00796b" stroke-width="2"/>'
    )
    for trial in group:
        fill = "#00796b" if trial["cost"] >= COSTLY else "white"
        parts.append(
            f'<circle cx="{x(trial["amount"]):.1f}" cy="{y(first(trial)):.1f}" r="4" '
            f'fill="{fill}" stroke="#00796b"/>'
        )
    parts.append(
        f'<text x="28" y="{HEIGHT - 36}">{low:.3g}</text>'
        f'<text x="{WIDTH - 16}" y="{HEIGHT - 36}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{WIDTH / 2 + 6}" y="{HEIGHT - 22}" text-anchor="middle">'
        f"{escape(group[0]['unit'])}</text>"
    )
    return "".join(parts)


def write(found: Found) -> None:
    """Table and curves into docs/."""
    draws = len(found.faults) // max(len(by_fault(found)), 1)
    start = min(trial["number"] for trial in found.faults)
    command = f"blind_gallery.py --first {start} --draws {draws} --healthy {len(found.healthy)}"
    text = f"{where_and_when(command)}\n\n{table(found)}"
    replace("blind", text, DOCS / "blind_gallery.md")
    picture: Path = DOCS / "images" / "blind_gallery.svg"
    picture.write_text(curves(found), encoding="utf-8")
